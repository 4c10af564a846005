"""Bad input through the real command: one line, exit code 1, and never a file at the final name."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from convert.replica import write_replica
from engine.registry import model
from tests.checkpoints import make_checkpoint, write_zip
from tests.command import fourbit

INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00002.safetensors"


def edit_json(path: Path, change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def drop_shard(folder):
    (folder / SECOND).unlink()


def truncate_shard(folder):
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 1000)


def add_shard(folder):
    shutil.copy(folder / SECOND, folder / "model-00003-of-00003.safetensors")


def drop_from_index(folder):
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop("lm_head.weight"))


def rename_tensor(folder):
    for path in folder.glob("model*"):
        path.write_bytes(path.read_bytes().replace(b"lm_head.weight", b"lm_tail.weight"))


def widen(folder):
    edit_json(folder / "config.json", lambda config: config.update(intermediate_size=2048))


def unknown_architecture(folder):
    edit_json(folder / "config.json", lambda config: config.update(architectures=["MambaForCausalLM"]))


def odd_config(folder):
    edit_json(folder / "config.json", lambda config: config.update(num_hidden_layers="four"))


def drop_tokenizer(folder):
    (folder / "qwen.tiktoken").unlink()


def drop_config(folder):
    (folder / "config.json").unlink()


def index_leads_out(folder):
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": "../outside.safetensors"}))


BAD_QWEN = {
    "missing shard": (drop_shard, "is missing"),
    "truncated shard": (truncate_shard, "truncated"),
    "shard not in the index": (add_shard, "not in"),
    "tensor not in the index": (drop_from_index, "does not list"),
    "tensor of another name": (rename_tensor, "lm_"),
    "tensor of another shape": (widen, "shape"),
    "unknown architecture": (unknown_architecture, "MambaForCausalLM"),
    "config with a word for a number": (odd_config, "'four'"),
    "no tokenizer": (drop_tokenizer, "qwen.tiktoken"),
    "no config": (drop_config, "config.json"),
    "index that leads out of the folder": (index_leads_out, "refused"),
}


def assert_refused(result, folder: Path, words: str) -> None:
    assert result.returncode == 1, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("fourbit: ")
    assert words in result.stderr
    assert list(folder.glob("*.gguf")) + list(folder.glob(".*.part")) + list(folder.glob(".*.journal")) == []


@pytest.mark.parametrize("name", BAD_QWEN)
def test_bad_checkpoint(tmp_path, name):
    spoil, words = BAD_QWEN[name]
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "qwen")
    spoil(checkpoint)
    assert_refused(fourbit("quantize", "--checkpoint", checkpoint, "--out", tmp_path / "out.gguf"), tmp_path, words)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("family", ["qwen", "chatglm3", "deepseek-llm"])
def test_weight_that_is_no_number(tmp_path, family, value):
    def spoil(weights):
        name = next(name for name in weights if "2" in name and weights[name].ndim == 2)
        weights[name][3, 5] = value

    checkpoint = make_checkpoint(tmp_path / "checkpoint", family, edit=spoil)
    result = fourbit("quantize", "--checkpoint", checkpoint, "--out", tmp_path / "out.gguf")
    assert_refused(result, tmp_path, "not a finite number")


class Canary:
    """Pickles as a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_bin_with_code_in_its_pickle(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "deepseek-llm", n_shards=1)
    shard = next(checkpoint.glob("*.bin"))
    write_zip(shard, {"data.pkl": pickle.dumps({"x": Canary(tmp_path / "canary")}, protocol=2)})
    result = fourbit("quantize", "--checkpoint", checkpoint, "--out", tmp_path / "out.gguf")
    assert_refused(result, tmp_path, "refused")
    assert not (tmp_path / "canary").exists()


def test_bin_with_something_other_than_tensors(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "deepseek-llm", n_shards=1)
    write_zip(next(checkpoint.glob("*.bin")), {"data.pkl": pickle.dumps({"a": 1}, protocol=2)})
    result = fourbit("quantize", "--checkpoint", checkpoint, "--out", tmp_path / "out.gguf")
    assert_refused(result, tmp_path, "not a tensor")


def test_full_disk(tmp_path):
    """A disk too small for the output: a file size limit of the kernel's stands in for it."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "qwen")
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        f"sys.argv = ['fourbit', 'quantize', '--checkpoint', {str(checkpoint)!r}, "
        f"'--out', {str(tmp_path / 'o.gguf')!r}]; "
        "from engine.cli import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert_refused(result, tmp_path, "cannot be written")


def test_unwritable_place(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "qwen")
    (tmp_path / "file").write_text("")
    result = fourbit("quantize", "--checkpoint", checkpoint, "--out", tmp_path / "file" / "out.gguf")
    assert_refused(result, tmp_path, "cannot be written")


def test_existing_file_is_kept(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "qwen")
    out = tmp_path / "out.bin"
    out.write_text("precious")
    assert_refused(fourbit("quantize", "--checkpoint", checkpoint, "--out", out), tmp_path, "--force")
    assert out.read_text() == "precious"


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "chatglm3")
    assert list(checkpoint.glob("*.py"))
    assert fourbit("quantize", "--checkpoint", checkpoint, "--out", tmp_path / "out.gguf").returncode == 0


def not_gguf(tmp_path, converted):
    (tmp_path / "x").write_bytes(b"no model at all" * 10)
    return tmp_path / "x"


def truncated_gguf(tmp_path, converted):
    data = converted("qwen").read_bytes()
    (tmp_path / "x").write_bytes(data[:-5000])
    return tmp_path / "x"


def gguf_of_another_family(tmp_path, converted):
    data = converted("qwen").read_bytes().replace(b"qwen", b"quen").replace(b"fourbit.model", b"fourbit.mudel")
    (tmp_path / "x").write_bytes(data)
    return tmp_path / "x"


def gguf_without_a_control(tmp_path, converted):
    (tmp_path / "x").write_bytes(converted("chatglm3").read_bytes().replace(b"<sop>", b"XsopX"))
    return tmp_path / "x"


BAD_GGUF = {
    "not a GGUF": (not_gguf, "not a GGUF"),
    "truncated": (truncated_gguf, "truncated"),
    "of another family": (gguf_of_another_family, "another family"),
    "without a control token": (gguf_without_a_control, "<sop>"),
}


@pytest.mark.parametrize("name", BAD_GGUF)
def test_bad_gguf(tmp_path, converted, name):
    make, words = BAD_GGUF[name]
    assert_refused(fourbit("ask", make(tmp_path, converted), "hi"), tmp_path, words)


def test_missing_model_says_how_to_make_it(tmp_path):
    assert_refused(fourbit("ask", "qwen-7b-chat", "hi", home=tmp_path), tmp_path, "fourbit quantize qwen-7b-chat")


def test_out_of_memory_is_foreseen(tmp_path, monkeypatch):
    """The real shape of Qwen at its full context, on a machine that has 2 GB free."""
    path = write_replica(model("qwen-7b-chat"), "Q4_0", tmp_path / "replica.bin", n_layer=1).path
    code = (
        "import engine.engine as session; from engine.host import Memory; "
        "session.memory = lambda: Memory(8 << 30, 500_000_000, None); import sys; "
        f"sys.argv = ['fourbit', 'ask', {str(path)!r}, 'hi', '--ctx', '8192']; from engine.cli import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert_refused(result, tmp_path, "needs")
    assert "0.50 GB are free" in result.stderr


def test_debug_shows_the_traceback(tmp_path):
    result = fourbit("ask", "--debug", "qwen-7b-chat", "hi", home=tmp_path)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "NotFound" in result.stderr


def test_usage_errors_exit_with_2():
    assert fourbit("quantize", "--type", "Q3_X").returncode == 2
    assert fourbit("nonsense").returncode == 2
