"""Every tensor's bytes equal those that llama_model_quantize makes from the checkpoint's own float type."""

from __future__ import annotations

from dataclasses import replace

import pytest

from convert.mixture import MIXTURES
from convert.quantize import quantize
from engine.gguf_header import read_header
from engine.registry import models
from tests.checkpoints import FAMILIES, SHAPES, make_checkpoint, make_weights
from tests.stock import padded, quantize_with_llama_cpp, write_unquantized

SPECS = {spec.family: spec for spec in models().values()}


def tensors_of(path):
    data = path.read_bytes()
    return {t.name: (t.qtype, t.shape, data[t.offset : t.offset + t.n_bytes]) for t in read_header(path).tensors}


@pytest.fixture(scope="module", params=[*FAMILIES, "chatglm3 padded"])
def case(request, tmp_path_factory):
    """A checkpoint with the real number of layers, which decides the mixture, and its unquantized GGUF."""
    family, is_padded = request.param.split(" ")[0], " " in request.param
    folder = tmp_path_factory.mktemp(family)
    shape = replace(SHAPES[family], n_layer=SPECS[family].shape.n_layer, n_ff=288 if family == "chatglm3" else 256)
    checkpoint = make_checkpoint(folder / "checkpoint", family, shape=shape, n_shards=3)
    ours = quantize(checkpoint, folder / "ours-F16.gguf", "F16", pad_ff=is_padded).path
    weights = make_weights(family, shape)
    write_unquantized(folder / "source.gguf", ours, family, shape, padded(weights, 512) if is_padded else weights)
    return checkpoint, folder, is_padded


@pytest.mark.parametrize("ftype", MIXTURES)
def test_bytes_equal_llama_cpps_own(case, ftype, tmp_path):
    checkpoint, folder, is_padded = case
    quantize_with_llama_cpp(folder / "source.gguf", tmp_path / "theirs.gguf", MIXTURES[ftype].number)
    quantize(checkpoint, tmp_path / "ours.gguf", ftype, n_threads=3, pad_ff=is_padded)
    ours, theirs = tensors_of(tmp_path / "ours.gguf"), tensors_of(tmp_path / "theirs.gguf")
    assert list(ours) == list(theirs)
    assert {name: ours[name][:2] for name in ours} == {name: theirs[name][:2] for name in theirs}
    assert [name for name in ours if ours[name][2] != theirs[name][2]] == []


def test_metadata_that_llama_cpps_quantizer_writes_is_ours(case, tmp_path):
    checkpoint, folder, is_padded = case
    quantize_with_llama_cpp(folder / "source.gguf", tmp_path / "theirs.gguf", MIXTURES["Q4_K_M"].number)
    ours = read_header(quantize(checkpoint, tmp_path / "ours.gguf", "Q4_K_M", pad_ff=is_padded).path).metadata
    theirs = read_header(tmp_path / "theirs.gguf").metadata
    assert set(ours) == set(theirs)
    for key in ("general.file_type", "general.quantization_version"):
        assert ours[key] == theirs[key]


@pytest.mark.parametrize("n_threads", [1, 2, 5])
def test_threads_cannot_change_a_byte(case, n_threads, tmp_path):
    checkpoint, _, _ = case
    one = quantize(checkpoint, tmp_path / "one.gguf", "Q4_0", n_threads=1).path.read_bytes()
    many = quantize(checkpoint, tmp_path / "many.gguf", "Q4_0", n_threads=n_threads).path.read_bytes()
    assert one == many
