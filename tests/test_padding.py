"""ChatGLM3's feed-forward width, filled up with zeros: the same function, in faster blocks."""

from __future__ import annotations

import numpy as np
import pytest

from convert.quantize import quantize
from convert.replica import replica_slots, write_replica
from engine import native
from engine.gguf_header import read_header
from engine.registry import models
from tests.checkpoints import make_checkpoint
from tests.test_logits import log_softmax, run

SPEC = models()["chatglm3-6b"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One checkpoint converted with and without padding, unquantized and not."""
    folder = tmp_path_factory.mktemp("padding")
    checkpoint = make_checkpoint(folder / "c", "chatglm3")
    return {
        (ftype, pad): quantize(checkpoint, folder / f"{ftype}-{pad}.gguf", ftype, pad_ff=pad).path
        for ftype in ("F16", "Q4_K_M")
        for pad in (False, True)
    }


def test_the_function_is_unchanged(files):
    ids = np.random.default_rng(5).integers(0, 1280, 100).tolist()
    plain, padded = (log_softmax(run(files["F16", pad], ids)) for pad in (False, True))
    assert np.abs(plain - padded).max() < 5e-3
    assert (plain.argmax(axis=-1) == padded.argmax(axis=-1)).mean() > 0.98


def test_no_block_falls_back(files):
    plain, padded = (read_header(files["Q4_K_M", pad]) for pad in (False, True))
    assert {t.qtype for t in plain.tensors} >= {"Q5_0"}
    assert {t.qtype for t in padded.tensors} == {"F32", "Q4_K", "Q6_K"}
    assert padded.metadata["fourbit.n_ff"] == 288
    assert padded.metadata["chatglm.feed_forward_length"] == 512
    assert "fourbit.n_ff" not in plain.metadata


def test_quantized_padded_file_runs(files):
    ids = np.random.default_rng(6).integers(0, 1280, 50).tolist()
    exact = log_softmax(run(files["F16", False], ids))
    for pad in (False, True):
        found = log_softmax(run(files["Q4_K_M", pad], ids))
        assert (np.exp(exact) * (exact - found)).sum(axis=-1).mean() < 0.2


def test_full_size(tmp_path):
    plain, padded = (replica_slots(SPEC, "Q4_K_M", pad_ff=pad) for pad in (False, True))
    sizes = [sum(slot.n_bytes for slot in slots) for slots in (plain, padded)]
    assert [round(size / 1e9, 2) for size in sizes] == [4.14, 3.88]
    path = write_replica(SPEC, "Q4_K_M", tmp_path / "r.gguf", n_layer=1, pad_ff=True).path
    assert read_header(path).metadata["chatglm.feed_forward_length"] == 13824
    with native.Model(path) as model:
        assert model.n_vocab == SPEC.shape.n_vocab


def test_types_without_large_blocks_are_left_alone():
    for ftype in ("F16", "Q8_0", "Q4_0"):
        down = next(s for s in replica_slots(SPEC, ftype) if s.name == "blk.0.ffn_down.weight")
        assert down.shape[0] == 13696
