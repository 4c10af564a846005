"""Replicas: a model's exact shapes and types, loadable, and labelled as what they are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from convert.mixture import choose_qtypes
from convert.replica import replica_slots, write_replica
from engine import native
from engine.errors import OutputError
from engine.gguf_header import read_header
from engine.registry import checkpoints, models

# GB of tensors at full size, as llama.cpp's own quantizer makes them
FULL_SIZE_GB = {"qwen-7b-chat": 4.900, "chatglm3-6b": 4.141, "deepseek-llm-7b-chat": 4.219}


def tiny(key):
    spec = models()[key]
    n_head_kv = 2 if spec.shape.n_head_kv < spec.shape.n_head else 4
    return replace(spec, shape=replace(spec.shape, n_layer=2, n_embd=256, n_head=4, n_head_kv=n_head_kv, n_ff=512))


@pytest.mark.parametrize("key", checkpoints())
def test_runs_and_says_that_it_is_one(key, tmp_path):
    path = write_replica(tiny(key), "Q4_K_M", tmp_path / "replica.gguf").path
    header = read_header(path)
    assert header.metadata["fourbit.replica"] is True
    assert header.metadata["fourbit.model"] == key
    with native.Model(path) as model:
        assert model.n_vocab == models()[key].shape.n_vocab
        context = native.Context(model, 32, n_threads=1)
        context.decode([300, 301, 302], 0)
        assert np.isfinite(context.logits()).all()
        assert context.logits().std() > 0


@pytest.mark.parametrize("key", checkpoints())
def test_full_size_is_that_of_llama_cpps_own_file(key):
    slots = replica_slots(models()[key], "Q4_K_M", pad_ff=False)
    assert sum(slot.n_bytes for slot in slots) / 1e9 == pytest.approx(FULL_SIZE_GB[key], abs=0.0006)


def test_chatglm3_falls_back_where_rows_are_no_multiple_of_256_unless_padded():
    slots = replica_slots(models()["chatglm3-6b"], "Q4_K_M", pad_ff=False)
    assert {slot.qtype for slot in slots if "ffn_down" in slot.name} == {"Q5_0", "Q8_0"}


def test_vectors_stay_floats():
    shapes = [("blk.0.attn_norm.weight", (256,)), ("blk.0.attn_qkv.bias", (768,)), ("output.weight", (256, 512))]
    found = choose_qtypes("Q4_K_M", shapes)
    assert found == {"blk.0.attn_norm.weight": "F32", "blk.0.attn_qkv.bias": "F32", "output.weight": "Q6_K"}


def test_does_not_overwrite_unless_told(tmp_path):
    spec, out = tiny("chatglm3-6b"), tmp_path / "replica.gguf"
    write_replica(spec, "Q4_0", out)
    with pytest.raises(OutputError, match="already there"):
        write_replica(spec, "Q4_0", out)
    write_replica(spec, "Q4_0", out, overwrite=True)
