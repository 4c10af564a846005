"""Shards and headers from anyone: read right when right, refused with one of our errors when not."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert.checkpoint import open_checkpoint
from convert.pickle_index import read_pickle_index
from convert.safetensors_shard import read_safetensors
from convert.shard import LocalShard
from convert.torch_shard import read_torch_bin
from engine.errors import CheckpointError, FourbitError, GGUFError, UnsafeCheckpoint
from engine.gguf_header import read_header
from tests.checkpoints import FAMILIES, make_checkpoint, stored, torch_pickle, write_safetensors, write_torch_bin

WEIGHTS = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.linspace(-1, 1, 7, dtype=np.float32)}
MANY = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
EDITS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4)


def mutated(data: bytes, edits, until: int | None = None) -> bytes:
    changed = bytearray(data)
    for place, value in edits:
        changed[int(place * (until or len(data)))] = value
    return bytes(changed)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(
    ("write", "read"), [(write_safetensors, read_safetensors), (write_torch_bin, read_torch_bin)], ids=["st", "bin"]
)
def test_tensors_lie_where_the_reader_says(tmp_path, write, read, dtype):
    path = tmp_path / "shard"
    write(path, WEIGHTS, dtype)
    data, found = path.read_bytes(), read(LocalShard(path))
    assert set(found) == set(WEIGHTS)
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (dtype, WEIGHTS[name].shape)
        assert data[tensor.offset : tensor.offset + tensor.n_bytes] == stored(WEIGHTS[name], dtype)


def test_agrees_with_the_official_package(tmp_path):
    official = pytest.importorskip("safetensors.numpy")
    official.save_file(WEIGHTS, tmp_path / "theirs")
    write_safetensors(tmp_path / "ours", WEIGHTS, "F32")
    found = read_safetensors(LocalShard(tmp_path / "theirs"))
    assert {name: t.shape for name, t in found.items()} == {name: w.shape for name, w in WEIGHTS.items()}
    loaded = official.load_file(tmp_path / "ours")
    assert all(np.array_equal(loaded[name], WEIGHTS[name]) for name in WEIGHTS)


def test_what_ours_accepts_the_official_package_accepts(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    path = tmp_path / "shard"
    write_safetensors(path, WEIGHTS, "F32")
    data = path.read_bytes()
    header_end = 8 + int.from_bytes(data[:8], "little")

    @MANY
    @given(EDITS)
    def check(edits):
        changed = mutated(data, edits, header_end)
        path.write_bytes(changed)
        try:
            read_safetensors(LocalShard(path))
        except CheckpointError:
            return
        safetensors.deserialize(changed)

    check()


@pytest.mark.parametrize("read", [read_safetensors, read_torch_bin])
def test_truncated_anywhere_is_refused(tmp_path, read):
    path = tmp_path / "shard"
    (write_safetensors if read is read_safetensors else write_torch_bin)(path, WEIGHTS, "F32")
    data = path.read_bytes()
    for end in range(0, len(data) - 1, 13):
        path.write_bytes(data[:end])
        with pytest.raises(CheckpointError):
            read(LocalShard(path))


def test_mutated_bin_is_read_or_refused(tmp_path):
    path = tmp_path / "shard"
    write_torch_bin(path, WEIGHTS, "F32")
    data = path.read_bytes()

    @MANY
    @given(EDITS)
    def check(edits):
        path.write_bytes(mutated(data, edits))
        try:
            found = read_torch_bin(LocalShard(path))
        except CheckpointError:
            return
        assert all(t.offset >= 0 and t.offset + t.n_bytes <= len(data) for t in found.values())

    check()


def test_mutated_pickle_is_read_or_refused_and_imports_nothing():
    data = torch_pickle(WEIGHTS, "F32")
    before = set(sys.modules)

    @MANY
    @given(EDITS)
    def check(edits):
        with contextlib.suppress(FourbitError):
            assert isinstance(read_pickle_index(mutated(data, edits)), dict)

    check()
    assert not {name for name in set(sys.modules) - before if name.startswith(("torch", "os.", "subprocess"))}


class Call:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("function", [os.system, eval, exec, __import__, getattr, print, np.load], ids=repr)
def test_calls_in_a_pickle_are_refused_unrun(tmp_path, capsys, function, protocol):
    data = pickle.dumps({"x": Call(function, f"open({str(tmp_path / 'canary')!r}, 'w')")}, protocol=protocol)
    with pytest.raises(UnsafeCheckpoint):
        read_pickle_index(data)
    assert not (tmp_path / "canary").exists()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("value", [1, "text", [1], None, {"a": [1]}, ("a",)], ids=repr)
def test_other_things_than_tensors_are_refused(value):
    with pytest.raises(UnsafeCheckpoint):
        read_pickle_index(pickle.dumps(value, protocol=2))


def test_mutated_gguf_header_is_read_or_refused(converted, tmp_path):
    data = converted("chatglm3").read_bytes()
    header_bytes = read_header(converted("chatglm3")).data_offset
    path = tmp_path / "x.gguf"

    @MANY
    @given(EDITS)
    def check(edits):
        path.write_bytes(mutated(data, edits, header_bytes))
        try:
            header = read_header(path)
        except GGUFError:
            return
        assert all(t.offset + t.n_bytes <= len(data) for t in header.tensors)

    check()


def test_gguf_header_truncated_anywhere_is_refused(converted, tmp_path):
    data = converted("chatglm3").read_bytes()
    path = tmp_path / "x.gguf"
    for end in [*range(0, 4000, 61), len(data) // 2, len(data) - 200]:
        path.write_bytes(data[:end])
        with pytest.raises(GGUFError):
            read_header(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_official_layouts_open(tmp_path, family):
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", family))
    assert len(checkpoint.shards) == 2
    assert all(
        shard.path.suffix == (".bin" if family == "deepseek-llm" else ".safetensors") for shard in checkpoint.shards
    )


def test_bin_alone_is_read_though_both_indexes_are_there(tmp_path):
    folder = make_checkpoint(tmp_path / "c", "chatglm3")
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    assert {shard.path.suffix for shard in open_checkpoint(folder).shards} == {".bin"}


def test_links_out_of_the_folder_are_refused_and_a_hubs_blobs_are_not(tmp_path):
    repository = tmp_path / "models--x"
    folder = make_checkpoint(repository / "snapshots" / "abc", "qwen")
    shard = sorted(folder.glob("*.safetensors"))[0]
    (repository / "blobs").mkdir()
    shard.rename(repository / "blobs" / "123")
    shard.symlink_to("../../blobs/123")
    assert len(open_checkpoint(folder).shards) == 2
    shard.unlink()
    (repository / "blobs" / "123").rename(tmp_path / "outside")
    shard.symlink_to(tmp_path / "outside")
    with pytest.raises(UnsafeCheckpoint, match="outside"):
        open_checkpoint(folder)
