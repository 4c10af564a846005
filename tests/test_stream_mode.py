"""Converting straight from a hub: the same bytes, no room for the checkpoint, resumable, verified."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest

from convert import fetch as fetching
from convert.hub import Listed
from convert.plan import plan_conversion
from convert.quantize import quantize
from convert.remote_shard import remote_shards
from convert.sidecar import read_sidecar
from convert.wire import Patience, Place
from engine.errors import CheckpointError, FetchError
from engine.registry import models
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.hub_server import Fault, HubServer, sha256
from tests.shared import SHARED
from tests.test_fetch import command

HASTY = Patience(attempts=3, first_wait_s=0.01, timeout_s=2, slowest_bytes_per_s=1000)
SPECS = {spec.family: dataclasses.replace(spec, sha256={}) for spec in models().values()}


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """A model, its repository's files, and the bytes of its local conversion."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    checkpoint = make_checkpoint(folder / "c", family, n_shards=3)
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    expected = quantize(checkpoint, folder / "local.gguf", "Q4_K_M").path.read_bytes()
    return SPECS[family], files, expected


@pytest.fixture
def hub(case, monkeypatch):
    """The repository on a server, listed without the libraries."""
    _, files, _ = case
    with HubServer({"o/n": files}) as server:

        def list_files(source, _):
            base = {
                "modelscope": f"{server.url}/modelscope/api/v1/models/o/n/repo?Revision=master&FilePath=",
                "huggingface": f"{server.url}/huggingface/o/n/resolve/main/",
            }[source]
            return {
                name: Listed(name, len(data), sha256(data), None, Place(source, base + name))
                for name, data in server.repositories["o/n"].items()
            }

        monkeypatch.setattr(fetching, "list_files", list_files)
        yield server


def weights(files):
    safe = sorted(name for name in files if name.endswith(".safetensors"))
    return safe or sorted(name for name in files if name.endswith(".bin"))


def convert(spec, folder, out):
    remote = remote_shards(spec, folder, fetching.SOURCES, patience=HASTY)
    return quantize(folder, out, "Q4_K_M", remote=remote)


def test_same_bytes_as_from_disk_and_no_weights_on_it(case, hub, tmp_path):
    spec, files, expected = case
    written = convert(spec, tmp_path / "c", tmp_path / "out.gguf")
    assert written.path.read_bytes() == expected
    assert not {path.name for path in (tmp_path / "c").iterdir()} & set(weights(files))
    sources = {source.name: source.sha256 for source in read_sidecar(written.path).sources}
    assert sources == {name: sha256(files[name]) for name in weights(files)}


def test_same_bytes_whatever_the_server_does(case, hub, tmp_path):
    spec, files, expected = case
    for name in weights(files):
        hub.misbehave(name, Fault("drop", 900), Fault("status", 502), Fault("empty"), Fault("ignore_range"))
    assert convert(spec, tmp_path / "c", tmp_path / "out.gguf").path.read_bytes() == expected


def test_goes_on_in_the_middle_of_a_shard(case, hub, tmp_path):
    spec, files, expected = case
    name = weights(files)[1]
    remote = remote_shards(spec, tmp_path / "c", fetching.SOURCES, patience=HASTY)
    plan_conversion(tmp_path / "c", "Q4_K_M", remote)
    n_asked = sum(asked == name for _, asked, _ in hub.requests)  # for headers, before the first weight
    hub.misbehave(name, *[Fault("none")] * n_asked, Fault("drop", len(files[name]) * 2 // 3), Fault("status", 403))
    hub.misbehave(name, Fault("status", 403), hub="huggingface", always=True)
    with pytest.raises(FetchError):
        convert(spec, tmp_path / "c", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
    assert (tmp_path / ".out.gguf.part").exists()
    hub.always.clear()
    hub.faults.clear()
    hub.requests.clear()
    hub.sent_bytes = 0
    written = convert(spec, tmp_path / "c", tmp_path / "out.gguf")
    assert written.path.read_bytes() == expected
    assert written.n_resumed > 0
    total = sum(len(files[other]) for other in weights(files))
    assert hub.sent_bytes < total  # the finished tensors were not asked for again
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_wrong_byte_is_never_published(case, hub, tmp_path):
    spec, files, expected = case
    name = weights(files)[0]
    for side in ("modelscope", "huggingface"):
        hub.misbehave(name, Fault("flip", len(files[name]) // 2), hub=side, always=True)
    with pytest.raises(CheckpointError, match="it must be"):
        convert(spec, tmp_path / "c", tmp_path / "out.gguf")
    assert list(tmp_path.glob("*.gguf")) + list(tmp_path.glob(".out*")) == []
    hub.always.clear()
    assert convert(spec, tmp_path / "c", tmp_path / "out.gguf").path.read_bytes() == expected


def test_a_shard_without_a_hash_is_not_taken(case, hub, tmp_path, monkeypatch):
    spec, _, _ = case
    listed = fetching.list_files
    monkeypatch.setattr(
        fetching,
        "list_files",
        lambda source, s: {k: dataclasses.replace(v, sha256=None) for k, v in listed(source, s).items()},
    )
    with pytest.raises(FetchError, match="cannot be verified"):
        convert(spec, tmp_path / "c", tmp_path / "out.gguf")


def genuine_files(tmp_path):
    if not (SHARED / "tokenizers").is_dir():
        pytest.skip("the genuine tokenizers (shared/ beside the project, or FOURBIT_SHARED) are absent")
    checkpoint = make_checkpoint(tmp_path / "official", "chatglm3", tokenizer="genuine", n_shards=3)
    return checkpoint, {path.name: path.read_bytes() for path in checkpoint.iterdir()}


def test_the_command_killed_goes_on_and_ends_with_the_same_bytes(tmp_path):
    checkpoint, files = genuine_files(tmp_path)
    repositories = {models()["chatglm3-6b"].sources[hub].repo: files for hub in ("modelscope", "huggingface")}
    expected = quantize(checkpoint, tmp_path / "local.gguf", "Q4_K_M").path.read_bytes()
    with HubServer(repositories) as server:
        environment = os.environ | server.environment | {"FOURBIT_HOME": str(tmp_path)}
        last = weights(files)[-1]
        server.misbehave(last, Fault("none"), Fault("none"), Fault("slow", len(files[last]) // 4), always=True)
        arguments = [sys.executable, "-m", "engine", "quantize", "chatglm3-6b", "--stream"]
        process = subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL)
        journal = tmp_path / "models" / ".chatglm3-6b-Q4_K_M.gguf.journal"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (journal.exists() and journal.read_bytes().count(b"\n") > 10):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        server.always.clear()
        server.faults.clear()
        assert not list((tmp_path / "models").glob("*.gguf"))
        result = command(server, tmp_path, "quantize", "chatglm3-6b", "--stream")
    assert result.returncode == 0, result.stderr
    assert "from an earlier run" in result.stdout
    assert (tmp_path / "models" / "chatglm3-6b-Q4_K_M.gguf").read_bytes() == expected
