"""Fetching from both hubs on loopback, through the real command and through the module."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from convert import fetch as fetching
from convert.fetch import Mirrors, fetch
from convert.hub import Listed
from convert.manifest import is_complete, read_manifest
from convert.wire import Patience, Place, read
from engine.errors import DoesNotFit, FetchError, OutputError
from engine.registry import models
from tests.checkpoints import make_checkpoint
from tests.hub_server import Fault, HubServer, git_sha1, sha256
from tests.shared import SHARED

HASTY = Patience(attempts=3, first_wait_s=0.01, timeout_s=0.5, slowest_bytes_per_s=1000)
SPEC = models()["chatglm3-6b"]
DATA = random.Random(1).randbytes(300_000)


def read_all(hub, start=0, stop=None, name="a", patience=HASTY):
    places = [
        Place("modelscope", f"{hub.url}/modelscope/api/v1/models/o/n/repo?Revision=master&FilePath={name}"),
        Place("huggingface", f"{hub.url}/huggingface/o/n/resolve/main/{name}"),
    ]
    return b"".join(read(name, len(DATA), places, start=start, stop=stop, patience=patience))


FAULTS = {
    "drops": [Fault("drop", 1000), Fault("drop", 0), Fault("drop", 70_000)],
    "ignores Range": [Fault("drop", 1000), Fault("ignore_range")],
    "500s": [Fault("status", 500), Fault("status", 503)],
    "wrong range": [Fault("wrong_range")],
    "empty": [Fault("empty"), Fault("empty")],
    "crawls": [Fault("slow", 500)],
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("start", [0, 123_457])
def test_every_byte_arrives_whatever_the_server_does(name, start):
    with HubServer({"o/n": {"a": DATA}}) as hub:
        hub.misbehave("a", *FAULTS[name])
        assert read_all(hub, start) == DATA[start:]
        assert {side for side, _, _ in hub.requests} == {"modelscope"}


@pytest.mark.parametrize(
    "fault",
    [Fault("status", 404), Fault("status", 403), Fault("longer", 5), Fault("status", 500), Fault("empty")],
    ids=str,
)
def test_repeated_failure_switches_to_the_other_hub(fault):
    with HubServer({"o/n": {"a": DATA}}) as hub:
        hub.misbehave("a", Fault("drop", 5000), fault, always=True)
        assert read_all(hub) == DATA
        assert "huggingface" in {side for side, _, _ in hub.requests}


SENTENCES = {
    "404": (Fault("status", 404), "there is no such file (HTTP 404)"),
    "403": (Fault("status", 403), "access is refused (HTTP 403)"),
    "500": (Fault("status", 500), "HTTP 500"),
    "longer": (Fault("longer", 5), "has 300005 bytes there, 300000 are expected"),
    "empty": (Fault("empty"), "0 bytes received"),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_one_sentence_when_no_hub_gives_it(name):
    fault, words = SENTENCES[name]
    with HubServer({"o/n": {"a": DATA}}) as hub:
        for side in ("modelscope", "huggingface"):
            hub.misbehave("a", fault, hub=side, always=True)
        with pytest.raises(FetchError) as caught:
            read_all(hub)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_offline_is_said():
    with pytest.raises(FetchError, match="connection is refused"):
        list(read("a", 5, [Place("modelscope", "http://127.0.0.1:9/a")], patience=HASTY))


def test_a_range_in_the_middle():
    with HubServer({"o/n": {"a": DATA}}) as hub:
        assert read_all(hub, 100, 200) == DATA[100:200]
        hub.misbehave("a", Fault("ignore_range"))
        assert read_all(hub, 100, 200) == DATA[100:200]


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The files of a ChatGLM3 repository: its weights twice over, and much that conversion does not need."""
    folder = make_checkpoint(tmp_path_factory.mktemp("official") / "c", "chatglm3")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files | {"README.md": b"# ChatGLM3", "pytorch_model.bin.index.json": files["pytorch_model.bin.index.json"]}


@pytest.fixture
def spec():
    """The registry's model without its published hashes: the tokenizer here is a made one."""
    return dataclasses.replace(SPEC, sha256={})


@pytest.fixture
def mirrored(official, spec, monkeypatch):
    """A hub server whose repository `fetch` lists without the libraries, in this process."""
    with HubServer({"o/n": official}) as hub:

        def list_files(source, _):
            urls = {
                "modelscope": f"{hub.url}/modelscope/api/v1/models/o/n/repo?Revision=master&FilePath=",
                "huggingface": f"{hub.url}/huggingface/o/n/resolve/main/",
            }
            place = functools.partial(Place, source)
            return {
                name: Listed(name, len(data), sha256(data), None, place(urls[source] + name))
                for name, data in hub.repositories["o/n"].items()
            }

        monkeypatch.setattr(fetching, "list_files", list_files)
        yield hub


def run(spec, folder, **options):
    return fetch(spec, folder, patience=HASTY, **options)[0]


def assert_fetched(folder, official):
    for name in read_manifest(folder):
        assert (folder / name).read_bytes() == official[name]
    assert not list(folder.glob(".*.fetch*.fetch"))


def test_only_what_conversion_needs(mirrored, spec, official, tmp_path):
    run(spec, tmp_path)
    got = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    weights = {name for name in official if name.endswith(".safetensors")}
    assert got == {"config.json", "tokenizer.model", "model.safetensors.index.json", "fetched.json"} | weights
    assert len(weights) == 2
    assert_fetched(tmp_path, official)


def test_a_second_fetch_asks_for_nothing(mirrored, spec, tmp_path):
    run(spec, tmp_path)
    mirrored.requests.clear()
    run(spec, tmp_path)
    assert mirrored.requests == []
    assert is_complete(tmp_path)


def test_goes_on_where_the_last_run_ended(mirrored, spec, official, tmp_path):
    name = "model-00001-of-00002.safetensors"
    half = len(official[name]) // 2
    mirrored.misbehave(name, Fault("drop", half), Fault("status", 403))
    mirrored.misbehave(name, Fault("status", 403), hub="huggingface")
    with pytest.raises(FetchError, match="what has come is kept"):
        run(spec, tmp_path)
    assert not (tmp_path / name).exists()
    assert not is_complete(tmp_path)
    mirrored.requests.clear()
    run(spec, tmp_path)
    assert_fetched(tmp_path, official)
    asked = [wanted for _, asked_name, wanted in mirrored.requests if asked_name == name]
    assert asked[0].startswith("bytes=")
    assert not asked[0].startswith("bytes=0-")


def test_a_wrong_byte_is_fetched_again(mirrored, spec, official, tmp_path):
    mirrored.misbehave("model-00002-of-00002.safetensors", Fault("flip", 999))
    run(spec, tmp_path)
    assert_fetched(tmp_path, official)


def test_a_byte_that_stays_wrong_is_refused(mirrored, spec, tmp_path):
    name = "model-00002-of-00002.safetensors"
    for side in ("modelscope", "huggingface"):
        mirrored.misbehave(name, Fault("flip", 999), hub=side, always=True)
    with pytest.raises(FetchError, match="what came has sha256"):
        run(spec, tmp_path)
    assert not (tmp_path / name).exists()
    assert not (tmp_path / f".{name}.fetch").exists()


def test_a_damaged_partial_file_is_noticed(mirrored, spec, official, tmp_path):
    name = "model-00001-of-00002.safetensors"
    (tmp_path / f".{name}.fetch").write_bytes(b"\0" * 1000)
    run(spec, tmp_path)
    assert_fetched(tmp_path, official)
    other = tmp_path / "other"
    other.mkdir()
    (other / f".{name}.fetch").write_bytes(official[name] + b"more")
    run(spec, other)
    assert_fetched(other, official)


def test_a_file_that_changed_on_the_hub_since_the_first_fetch(mirrored, spec, official, tmp_path):
    name = "model-00001-of-00002.safetensors"
    mirrored.misbehave(name, Fault("drop", 500), Fault("status", 403))
    mirrored.misbehave(name, Fault("status", 403), hub="huggingface")
    with pytest.raises(FetchError):
        run(spec, tmp_path)
    mirrored.repositories = {"o/n": {**official, name: official[name][:-1] + b"!"}}
    with pytest.raises(FetchError, match="no hub has it"):
        run(spec, tmp_path)


def test_a_hub_that_contradicts_models_toml(mirrored, spec, tmp_path):
    wrong = dataclasses.replace(spec, sha256={"tokenizer.model": "0" * 64})
    with pytest.raises(FetchError, match=r"models\.toml says"):
        run(wrong, tmp_path)


def test_too_little_disk_is_said_before_the_first_byte(mirrored, spec, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "disk_free_bytes", lambda path: 1000)
    with pytest.raises(DoesNotFit, match="--stream"):
        run(spec, tmp_path)
    assert mirrored.requests == []


def test_a_disk_that_fills_up_is_said_and_what_came_is_kept(mirrored, spec, official, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetching.os, "fsync", full)
    monkeypatch.setattr(fetching, "write_manifest", lambda *_: None)
    with pytest.raises(OutputError, match="make room"):
        run(spec, tmp_path)
    assert list(tmp_path.glob(".*.fetch"))
    monkeypatch.undo()


def test_progress_ends_at_the_total(mirrored, spec, tmp_path):
    seen = []
    run(spec, tmp_path, on_progress=seen.append)
    assert seen[-1].done_bytes == seen[-1].total_bytes == sum(r.n_bytes for r in read_manifest(tmp_path).values())
    assert [p.done_bytes for p in seen] == sorted(p.done_bytes for p in seen)


def test_mirrors_offer_only_the_same_bytes(mirrored, spec, tmp_path):
    record = run(spec, tmp_path)["config.json"]
    assert [place.source for place in Mirrors(spec, fetching.SOURCES).places(record)] == ["modelscope", "huggingface"]


# --- the real command, the hubs' own libraries ---------------------------------------------------


def repositories(official):
    return {SPEC.sources["modelscope"].repo: official, SPEC.sources["huggingface"].repo: official}


@pytest.fixture
def genuine(official):
    """The repository with the bytes that models.toml knows by their hash."""
    path = SHARED / "tokenizers" / "chatglm3-6b" / "tokenizer.model"
    if not path.is_file():
        pytest.skip("the genuine tokenizers (shared/ beside the project, or FOURBIT_SHARED) are absent")
    return official | {"tokenizer.model": path.read_bytes()}


def command(hub, home, *arguments, **options):
    environment = os.environ | hub.environment | {"FOURBIT_HOME": str(home)}
    arguments = [sys.executable, "-m", "engine", *map(str, arguments)]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120, **options)


@pytest.mark.parametrize("source", ["modelscope", "huggingface"])
def test_the_command_fetches_from_either_hub(genuine, source, tmp_path):
    with HubServer(repositories(genuine)) as hub:
        result = command(hub, tmp_path, "fetch", "chatglm3-6b", "--source", source, "--json")
        assert result.returncode == 0, result.stderr
        assert {side for side, _, _ in hub.requests} == {source}
    files = json.loads(result.stdout)["files"]
    assert all(file["is_whole"] and file["sha256"] == sha256(genuine[file["name"]]) for file in files)
    assert_fetched(tmp_path / "checkpoints" / "chatglm3-6b", genuine)


def test_the_command_goes_to_the_second_hub_when_the_first_is_down(genuine, tmp_path):
    with HubServer({SPEC.sources["huggingface"].repo: genuine}) as hub:
        result = command(hub, tmp_path, "fetch", "chatglm3-6b")
        assert result.returncode == 0, result.stderr
        assert {side for side, _, _ in hub.requests} == {"huggingface"}


def test_the_command_says_that_nothing_can_be_reached(tmp_path):
    with HubServer({}) as hub:
        environment = hub.environment
    closed = type("Closed", (), {"environment": environment})
    result = command(closed, tmp_path, "fetch", "chatglm3-6b")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1, result.stderr
    assert "cannot be reached" in result.stderr
    assert "modelscope" in result.stderr
    assert "huggingface" in result.stderr


def test_the_command_says_that_there_is_no_such_repository(tmp_path):
    with HubServer({}) as hub:
        result = command(hub, tmp_path, "fetch", "chatglm3-6b")
    assert result.returncode == 1
    assert "404" in result.stderr


@pytest.mark.parametrize("round_", range(3))
def test_killed_at_any_point_the_next_run_completes_it(genuine, tmp_path, round_):
    name = "model-00001-of-00002.safetensors"
    with HubServer(repositories(genuine)) as hub:
        hub.misbehave(name, Fault("slow", 400_000))
        environment = os.environ | hub.environment | {"FOURBIT_HOME": str(tmp_path)}
        process = subprocess.Popen(
            [sys.executable, "-m", "engine", "fetch", "chatglm3-6b"], env=environment, stderr=subprocess.DEVNULL
        )
        while not any(asked == name for _, asked, _ in hub.requests):
            time.sleep(0.01)
        time.sleep(0.1 + 0.2 * round_)
        process.send_signal(signal.SIGKILL)
        process.wait()
        folder = tmp_path / "checkpoints" / "chatglm3-6b"
        assert not (folder / name).exists()
        result = command(hub, tmp_path, "fetch", "chatglm3-6b")
        assert result.returncode == 0, result.stderr
    assert_fetched(folder, genuine)


def test_two_fetches_at_once_do_not_mix(genuine, tmp_path):
    name = "model-00001-of-00002.safetensors"
    with HubServer(repositories(genuine)) as hub:
        hub.misbehave(name, Fault("slow", 400_000))
        environment = os.environ | hub.environment | {"FOURBIT_HOME": str(tmp_path)}
        first = subprocess.Popen([sys.executable, "-m", "engine", "fetch", "chatglm3-6b"], env=environment)
        while not any(asked == name for _, asked, _ in hub.requests):
            time.sleep(0.01)
        second = command(hub, tmp_path, "fetch", "chatglm3-6b")
        assert second.returncode == 1
        assert "another run is fetching" in second.stderr
        assert first.wait(60) == 0
    assert_fetched(tmp_path / "checkpoints" / "chatglm3-6b", genuine)


LIBRARIES = {
    "modelscope": "from modelscope import snapshot_download; "
    "print(snapshot_download('ZhipuAI/chatglm3-6b', cache_dir={!r}))",
    "huggingface": "from huggingface_hub import snapshot_download; print(snapshot_download('THUDM/chatglm3-6b', "
    f"revision={SPEC.sources['huggingface'].revision!r}, cache_dir={{!r}}))",
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_hubs_own_libraries_work_against_the_server(official, library, tmp_path):
    with HubServer(repositories(official)) as hub:
        code = LIBRARIES[library].format(str(tmp_path))
        environment = os.environ | hub.environment | {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
        found = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
    assert found.returncode == 0, found.stderr[-2000:]
    folder = found.stdout.strip().splitlines()[-1]
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        assert (type(tmp_path)(folder) / name).read_bytes() == official[name]


def test_a_small_file_is_verified_by_gits_own_id():
    assert git_sha1(b"what is up, doc?") == "bd9dbf5aae1a3862dd1526723246b20206e5fc37"
