"""Input that anyone could have made: refused with one sentence, nothing run, nothing read past its end."""

from __future__ import annotations

import collections
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from convert.checkpoint import open_checkpoint
from convert.pickle_index import read_pickle_index
from convert.quantize import quantize
from convert.safetensors_shard import read_safetensors
from convert.shard import LocalShard
from convert.torch_shard import read_torch_bin
from engine.errors import CheckpointError, FourbitError, GGUFError, UnsafeCheckpoint
from engine.gguf_check import check_file
from engine.gguf_header import read_header
from engine.vocab import spec_of
from tests.checkpoints import FAMILIES, make_checkpoint, torch_pickle, write_torch_bin, write_zip
from tests.gadgets import CANARY, GADGETS

WEIGHTS = {"a": np.ones((2, 3), np.float32)}


# --- pickles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("gadget", GADGETS, ids=lambda gadget: gadget.name)
def test_no_trick_runs_or_imports_anything(gadget):
    before = set(sys.modules)
    try:
        found = read_pickle_index(gadget.data)
    except UnsafeCheckpoint:
        found = {}
    assert found == {}
    assert set(sys.modules) == before
    assert not os.path.exists(CANARY)


def test_nothing_is_imported_or_run_while_a_shard_is_read(tmp_path):
    write_torch_bin(tmp_path / "shard.bin", WEIGHTS, "F32")
    write_zip(tmp_path / "odd.bin", {"data.pkl": b"}.", "\u4e2d": b"x"})
    code = """
import sys
from pathlib import Path
from convert.shard import LocalShard
from convert.torch_shard import read_torch_bin
from engine.errors import CheckpointError
events = []
sys.addaudithook(lambda event, _: events.append(event))
before = set(sys.modules)
for name in sys.argv[1:]:
    try:
        read_torch_bin(LocalShard(Path(name)))
    except CheckpointError as error:
        print(error)
bad = [e for e in events if e in ("import", "exec", "compile") or e.startswith(("os.", "subprocess", "socket"))]
assert set(sys.modules) == before and not bad, (bad, set(sys.modules) - before)
"""
    command = [sys.executable, "-c", code, tmp_path / "shard.bin", tmp_path / "odd.bin"]
    subprocess.run(command, check=True, timeout=60)


def zip_with(tmp_path, edit):
    path = tmp_path / "shard.bin"
    write_torch_bin(path, WEIGHTS, "F32")
    data = bytearray(path.read_bytes())
    edit(data)
    path.write_bytes(bytes(data))
    return LocalShard(path)


def last(data, signature):
    return bytes(data).rindex(signature)


ZIP_EDITS = {
    "encrypted flag": lambda d: struct.pack_into("<H", d, last(d, b"PK\1\2") + 8, 1),
    "compressed": lambda d: struct.pack_into("<H", d, last(d, b"PK\1\2") + 10, 8),
    "size of the directory differs": lambda d: struct.pack_into("<L", d, last(d, b"PK\1\2") + 24, 1 << 30),
    "offset beyond the file": lambda d: struct.pack_into("<L", d, last(d, b"PK\1\2") + 42, 1 << 30),
    "local name differs": lambda d: d.__setitem__(bytes(d).index(b"archive/data.pkl") + 9, 0x41),
    "two entries at one place": lambda d: struct.pack_into("<L", d, last(d, b"PK\1\2") + 42, 0),
    "a storage of another size": lambda d: d.__setitem__(bytes(d).index(b"K\x06"), 0x4E),
}


@pytest.mark.parametrize("name", ZIP_EDITS)
def test_zips_that_lie(tmp_path, name):
    with pytest.raises(CheckpointError):
        read_torch_bin(zip_with(tmp_path, ZIP_EDITS[name]))


def pickle_of(storage_values, offset, shape, stride):
    """A table of one tensor with any numbers."""
    data = torch_pickle(WEIGHTS, "F32")

    def number(value):
        return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)

    head, rest = data[: data.index(b"tQ")], data[data.index(b"tQ") :]
    head = head[: head.rindex(b"K")] + number(storage_values)
    tail = rest[rest.index(b"\x89c") :]
    sizes = b"(" + b"".join(map(number, shape)) + b"t" + b"(" + b"".join(map(number, stride)) + b"t"
    return head + b"tQ" + number(offset) + sizes + tail


VIEWS = {
    "beyond its storage": (6, 1, (2, 3), (3, 1)),
    "larger than its storage": (6, 0, (2, 4), (4, 1)),
    "negative offset": (6, -1, (2, 3), (3, 1)),
    "negative stride": (6, 0, (2, 3), (-3, 1)),
    "negative size": (6, 0, (-2, -3), (3, 1)),
    "huge": (6, 0, (1 << 40, 1 << 40), (1 << 40, 1)),
    "storage of another size": (1 << 40, 0, (2, 3), (3, 1)),
    "transposed": (6, 0, (2, 3), (1, 2)),
    "repeated": (6, 0, (2, 3), (0, 1)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_that_lie(tmp_path, name):
    pickle = pickle_of(*VIEWS[name])
    write_zip(tmp_path / "x.bin", {"data.pkl": pickle, "byteorder": b"little", "data/0": bytes(24)})
    with pytest.raises(CheckpointError):
        read_torch_bin(LocalShard(tmp_path / "x.bin"))


def test_an_honest_view_is_read(tmp_path):
    pickle = pickle_of(6, 0, (2, 3), (3, 1))
    write_zip(tmp_path / "x.bin", {"data.pkl": pickle, "byteorder": b"little", "data/0": bytes(24)})
    assert read_torch_bin(LocalShard(tmp_path / "x.bin"))["a"].n_bytes == 24


def test_other_zips(tmp_path):
    (tmp_path / "tar").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")  # torch before 1.6
    write_zip(tmp_path / "big", {"data.pkl": b"}.", "byteorder": b"big"})
    write_zip(tmp_path / "two", {"data.pkl": b"}.", "x": b""})
    data = (tmp_path / "two").read_bytes()
    (tmp_path / "junk").write_bytes(b"#!/bin/sh\n" + data)
    for name in ("tar", "big", "junk"):
        with pytest.raises(CheckpointError):
            read_torch_bin(LocalShard(tmp_path / name))


# --- safetensors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 7, 10**8, 10**8 + 1, 2**63, 2**64 - 1])
def test_header_lengths(tmp_path, length):
    (tmp_path / "x").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(CheckpointError):
        read_safetensors(LocalShard(tmp_path / "x"))


def many_keys():
    return {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(200_000)}


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "\ufeff{}", "[]", "{", "1e999", '{"a":1e309}'], ids=len
)
def test_headers_that_are_no_table(tmp_path, text):
    raw = text.encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(raw)) + raw)
    with pytest.raises(CheckpointError):
        read_safetensors(LocalShard(tmp_path / "x"))


def test_many_keys_are_no_harm(tmp_path):
    raw = json.dumps(many_keys()).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(raw)) + raw)
    assert len(read_safetensors(LocalShard(tmp_path / "x"))) == 200_000


# --- the folder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", "x\0y", "a\\b", ""])
def test_an_index_that_leads_elsewhere(tmp_path, name):
    folder = make_checkpoint(tmp_path / "c", "qwen")
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(data))
    with pytest.raises(FourbitError):
        open_checkpoint(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_code_beside_the_weights_is_never_opened_or_run(family, tmp_path):
    folder = make_checkpoint(tmp_path / "c", family)
    for name in ("conftest.py", "sitecustomize.py", f"configuration_{family[:4]}.py", "evil.pth"):
        (folder / name).write_text("raise SystemExit('code from a checkpoint was run')\n")
    code = """
import sys
from pathlib import Path
import convert.quantize, tqdm
folder, out, opened = sys.argv[1], sys.argv[2], []
def audit(event, arguments):
    if event in ("subprocess.Popen", "os.system", "os.exec", "socket.connect"):
        opened.append((event, arguments))
    if event in ("open", "import", "exec", "compile") and folder in str(arguments) and ".py" in str(arguments):
        opened.append((event, arguments))
sys.addaudithook(audit)
convert.quantize.quantize(Path(folder), Path(out), "Q4_K_M")
assert not opened, opened
"""
    command = [sys.executable, "-c", code, folder, tmp_path / "out.gguf"]
    subprocess.run(command, check=True, timeout=120, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)})


ROOT = Path(__file__).resolve().parents[1]


# --- GGUF ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Each family's small file as bytes."""
    folder = tmp_path_factory.mktemp("small")
    files = {}
    for family in FAMILIES:
        checkpoint = make_checkpoint(folder / family, family)
        files[family] = quantize(checkpoint, folder / f"{family}.gguf", "F16").path.read_bytes()
    return files


def checked(path):
    header = read_header(path)
    check_file(header, spec_of(header))


def string(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def with_key(data, key, kind, value):
    """A file with one more key; tensor data move by whole alignments."""
    n_kv = struct.unpack_from("<Q", data, 16)[0]
    more = string(key) + struct.pack("<I", kind) + value
    more += string("pad") + struct.pack("<I", 8)
    fill = -(len(more) + 8) % 32
    more += string(b"x" * fill)
    return data[:16] + struct.pack("<Q", n_kv + 2) + more + data[24:]


def replaced_number(data, key, form, value):
    place = data.index(string(key)) + len(string(key)) + 4
    return data[:place] + struct.pack(form, value) + data[place + struct.calcsize(form) :]


def renamed(data, old, new):
    assert len(old) == len(new)
    return data.replace(string(old), string(new))


GGUF_KINDS = {
    "bad magic": lambda d: b"GGUX" + d[4:],
    "version 0": lambda d: d[:4] + struct.pack("<I", 0) + d[8:],
    "version 1": lambda d: d[:4] + struct.pack("<I", 1) + d[8:],
    "a version of the future": lambda d: d[:4] + struct.pack("<I", 4) + d[8:],
    "big-endian version": lambda d: d[:4] + struct.pack(">I", 3) + d[8:],
    "n_tensors 2^63": lambda d: d[:8] + struct.pack("<Q", 1 << 63) + d[16:],
    "n_kv 2^63": lambda d: d[:16] + struct.pack("<Q", 1 << 63) + d[24:],
    "one tensor more": lambda d: d[:8] + struct.pack("<Q", struct.unpack_from("<Q", d, 8)[0] + 1) + d[16:],
    "one key less": lambda d: d[:16] + struct.pack("<Q", struct.unpack_from("<Q", d, 16)[0] - 1) + d[24:],
    "key length 2^64-1": lambda d: d[:24] + struct.pack("<Q", (1 << 64) - 1) + d[32:],
    "empty key": lambda d: with_key(d, "", 4, struct.pack("<I", 1)),
    "key twice": lambda d: with_key(d, "general.architecture", 8, string("qwen")),
    "value type 13": lambda d: with_key(d, "x", 13, b""),
    "array of arrays": lambda d: with_key(d, "x", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 4, 0)),
    "array count 2^62": lambda d: with_key(d, "x", 9, struct.pack("<IQ", 4, 1 << 62)),
    "string length 2^64-1": lambda d: with_key(d, "x", 8, struct.pack("<Q", (1 << 64) - 1)),
    "alignment 0": lambda d: with_key(d, "general.alignment", 4, struct.pack("<I", 0)),
    "alignment 3": lambda d: with_key(d, "general.alignment", 4, struct.pack("<I", 3)),
    "alignment 2^31": lambda d: with_key(d, "general.alignment", 4, struct.pack("<I", 1 << 31)),
    "alignment of another type": lambda d: with_key(d, "general.alignment", 7, b"\1"),
    "experts": lambda d: with_key(d, "qwen.expert_count", 4, struct.pack("<I", 9999)),
    "part of a split": lambda d: with_key(d, "split.count", 2, struct.pack("<H", 3)),
    "a charsmap": lambda d: with_key(d, "tokenizer.ggml.precompiled_charsmap", 9, struct.pack("<IQ", 0, 0)),
    "rope scaling": lambda d: with_key(d, "qwen.rope.scaling.type", 8, string("yarn")),
    "no layers": lambda d: replaced_number(d, "qwen.block_count", "<I", 0),
    "more layers": lambda d: replaced_number(d, "qwen.block_count", "<I", 5),
    "513 layers": lambda d: replaced_number(d, "qwen.block_count", "<I", 513),
    "no heads": lambda d: replaced_number(d, "qwen.attention.head_count", "<I", 0),
    "heads that do not divide": lambda d: replaced_number(d, "qwen.attention.head_count", "<I", 3),
    "width 2^31": lambda d: replaced_number(d, "qwen.embedding_length", "<I", 1 << 31),
    "epsilon NaN": lambda d: replaced_number(d, "qwen.attention.layer_norm_rms_epsilon", "<f", float("nan")),
    "rotary base infinite": lambda d: replaced_number(d, "qwen.rope.freq_base", "<f", float("inf")),
    "rotary width odd": lambda d: replaced_number(d, "qwen.rope.dimension_count", "<I", 63),
    "context 2^32-1": lambda d: replaced_number(d, "qwen.context_length", "<I", (1 << 32) - 1),
    "bos beyond the vocabulary": lambda d: replaced_number(d, "tokenizer.ggml.bos_token_id", "<I", 1 << 20),
    "a key missing": lambda d: renamed(d, "qwen.context_length", "qwen.context_lengtX"),
    "another architecture": lambda d: d.replace(
        string("qwen") + string("general.type"), string("mamb") + string("general.type")
    ),
    "another tokenizer": lambda d: renamed(d, "gpt2", "bert"),
    "another pre-tokenizer": lambda d: renamed(d, "qwen2", "gpt-2"),
    "a tensor of another name": lambda d: renamed(d, "blk.0.ffn_up.weight", "blk.0.ffn_uq.weight"),
    "a tensor twice": lambda d: renamed(d, "blk.0.ffn_up.weight", "blk.1.ffn_up.weight"),
    "two tokens alike": lambda d: renamed(d, "[PAD1100]", "[PAD1101]"),
    "a token that spells nothing": lambda d: d.replace(string("he"), string(b"h "), 1),
    "a token that is no UTF-8": lambda d: renamed(d, "[PAD1100]", b"[PAD\xff\xff00]"),
    "a merge of nothing": lambda d: renamed(d, "h e", "h \x7f"),
}


def tensor_field(data, name, skip):
    """Where the numbers behind a tensor's name begin."""
    return data.index(string(name)) + len(string(name)) + skip


def put(data, place, form, *values):
    return data[:place] + struct.pack(form, *values) + data[place + struct.calcsize(form) :]


NAME = "blk.0.ffn_up.weight"
GGUF_KINDS |= {
    "0 dimensions": lambda d: put(d, tensor_field(d, NAME, 0), "<I", 0),
    "5 dimensions": lambda d: put(d, tensor_field(d, NAME, 0), "<I", 5),
    "a dimension of 0": lambda d: put(d, tensor_field(d, NAME, 4), "<Q", 0),
    "a dimension of 2^63": lambda d: put(d, tensor_field(d, NAME, 4), "<Q", 1 << 63),
    "a product that overflows": lambda d: put(d, tensor_field(d, NAME, 4), "<QQ", 1 << 33, 1 << 33),
    "a size whose padding wraps": lambda d: put(d, tensor_field(d, NAME, 12), "<Q", (1 << 59) - 1),
    "another shape": lambda d: put(d, tensor_field(d, NAME, 12), "<Q", 32),
    "type 999": lambda d: put(d, tensor_field(d, NAME, 20), "<I", 999),
    "type -1": lambda d: put(d, tensor_field(d, NAME, 20), "<i", -1),
    "a type that was removed": lambda d: put(d, tensor_field(d, NAME, 20), "<I", 4),
    "integers": lambda d: put(d, tensor_field(d, NAME, 20), "<I", 26),
    "an offset beyond the file": lambda d: put(d, tensor_field(d, NAME, 24), "<Q", 1 << 40),
    "an offset that wraps": lambda d: put(d, tensor_field(d, NAME, 24), "<Q", (1 << 64) - 32),
    "an offset that is not aligned": lambda d: put(d, tensor_field(d, NAME, 24), "<Q", 7),
    "tensors that overlap": lambda d: put(d, tensor_field(d, NAME, 24), "<Q", 0),
    "half of the data": lambda d: d[: len(d) // 2],
    "one byte short": lambda d: d[:-1],
}


@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_every_kind_of_damage_is_refused_before_libllama(small, tmp_path, kind):
    changed = GGUF_KINDS[kind](small["qwen"])
    assert changed != small["qwen"]
    (tmp_path / "x.gguf").write_bytes(changed)
    with pytest.raises(GGUFError) as caught:
        checked(tmp_path / "x.gguf")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_sound_files_pass(small, tmp_path, family):
    (tmp_path / "x.gguf").write_bytes(small[family])
    checked(tmp_path / "x.gguf")


def first_element(data, key):
    """Where the first element of a number array lies."""
    return data.index(string(key)) + len(string(key)) + 4 + 12


PIECES = {
    "a byte token that is none": lambda d: renamed(d, "<0x1F>", "<0x-1>"),
    "a score that is no number": lambda d: put(d, first_element(d, "tokenizer.ggml.scores"), "<f", float("nan")),
    "a token type of 9": lambda d: put(d, first_element(d, "tokenizer.ggml.token_type"), "<i", 9),
}


@pytest.mark.parametrize("kind", PIECES)
def test_damaged_pieces(small, tmp_path, kind):
    changed = PIECES[kind](small["chatglm3"])
    assert changed != small["chatglm3"]
    (tmp_path / "x.gguf").write_bytes(changed)
    with pytest.raises(GGUFError):
        checked(tmp_path / "x.gguf")


def test_a_template_with_a_payload_is_never_rendered(small, tmp_path):
    payload = "{{ cycler.__init__.__globals__.os.system('touch " + CANARY + "') }}"
    place = small["qwen"].index(string("tokenizer.chat_template"))
    start = place + 8 + 23 + 4
    length = struct.unpack_from("<Q", small["qwen"], start)[0]
    text = payload.encode().ljust(length)[:length]
    (tmp_path / "x.gguf").write_bytes(small["qwen"][: start + 8] + text + small["qwen"][start + 8 + length :])
    from engine import Engine

    with Engine.open(tmp_path / "x.gguf", n_ctx=64) as engine:
        engine.ask("hello", max_tokens=2)
    assert not os.path.exists(CANARY)


@pytest.mark.slow
def test_truncated_at_every_4_kib(small, tmp_path):
    data, path = small["deepseek-llm"], tmp_path / "x.gguf"
    for end in [*range(0, min(1 << 20, len(data)), 4096), *np.random.default_rng(3).integers(0, len(data) - 32, 300)]:
        path.write_bytes(data[: int(end)])
        with pytest.raises(GGUFError):
            checked(path)


def test_a_slice_of_the_fuzz_campaign():
    command = [sys.executable, "-m", "tests.fuzz", "--seconds", "9", "--seed", "7"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout + found.stderr
    counts = {line["target"]: line for line in map(json.loads, found.stdout.splitlines())}
    assert counts["safetensors"]["cases"] > 5000
    assert counts["bin"]["cases"] > 2000
    assert counts["gguf"]["loaded"] > 50


# --- honest files, read a second way --------------------------------------------------------------


class IndependentReader(pickle.Unpickler):
    """A shard by Python's own pickle and zipfile, with stand-ins for torch: good for honest files only."""

    def __init__(self, archive, stem):
        self.archive, self.stem = archive, stem
        super().__init__(archive.open(f"{stem}/data.pkl"))

    def find_class(self, module, name):
        return {
            "OrderedDict": collections.OrderedDict,
            "_rebuild_tensor_v2": self.rebuild,
            "FloatStorage": "<f4",
            "HalfStorage": "<f2",
            "BFloat16Storage": "<u2",
        }[name]

    def persistent_load(self, saved):
        _, kind, key, _, _ = saved
        return np.frombuffer(self.archive.read(f"{self.stem}/data/{key}"), kind)

    @staticmethod
    def rebuild(storage, offset, shape, stride, *_):
        strides = [step * storage.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, strides)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_honest_shards_are_bit_equal_to_an_independent_reader(tmp_path, dtype):
    rng = np.random.default_rng(4)
    weights = {f"w{n}": rng.normal(size=(n + 1, 7)).astype(np.float32) for n in range(20)}
    path = tmp_path / "x.bin"
    write_torch_bin(path, weights, dtype)
    data, ours = path.read_bytes(), read_torch_bin(LocalShard(path))
    with zipfile.ZipFile(path) as archive:
        theirs = IndependentReader(archive, "archive").load()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert data[tensor.offset : tensor.offset + tensor.n_bytes] == theirs[name].tobytes()
        assert tensor.shape == theirs[name].shape
