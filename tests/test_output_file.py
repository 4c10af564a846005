"""Publishing: interrupted in any way, the final name is whole or absent, and the next run finishes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from convert import digest, output_file
from convert.gguf_file import Entry, layout
from convert.journal import Finished, Journal, Mark, read_records
from convert.output_file import create, journal_path, part_path, settle
from convert.quantize import quantize
from convert.sidecar import read_sidecar, sidecar_path
from convert.verify import verify_file
from engine.errors import CheckpointError, DoesNotFit, GGUFError, OutputError
from tests.checkpoints import make_checkpoint
from tests.command import fourbit

ENTRIES = [Entry("general.architecture", "str", "qwen"), Entry("fourbit.source.sha256", "[str]", ["0" * 64])]
SLOTS = layout([("a", (32, 4), "F32"), ("b", (32,), "F32")])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("output") / "c", "qwen", n_shards=3)


@pytest.fixture(scope="module")
def expected(checkpoint, tmp_path_factory):
    return quantize(checkpoint, tmp_path_factory.mktemp("expected") / "e.gguf", "Q4_K_M").path.read_bytes()


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_a_slice_of_the_crash_campaign():
    command = [sys.executable, "-m", "tests.crash", "--random", "15", "--every", "9", "--seed", "3"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout + found.stderr
    counts = json.loads(found.stdout)
    assert counts["died"] > 10
    assert counts["refused"] > 10
    assert counts["resumed"] > 20


def test_nothing_but_the_file_and_its_sidecar_is_left(checkpoint, expected, tmp_path):
    quantize(checkpoint, tmp_path / "out.gguf", "Q4_K_M")
    assert names(tmp_path) == {"out.gguf", "out.gguf.json"}
    sidecar = read_sidecar(tmp_path / "out.gguf")
    assert sidecar.n_bytes == len(expected)
    assert sidecar.model == "qwen-7b-chat"
    assert [source.name for source in sidecar.sources] == sorted(p.name for p in checkpoint.glob("*.safetensors"))


def start(checkpoint, out, *wrapper):
    """The real command, slowed so that a signal finds it at work."""
    code = (
        "import time, sys; from convert import pipeline; convert = pipeline._convert\n"
        "def slow(*a):\n    time.sleep(0.02); return convert(*a)\n"
        "pipeline._convert = slow\n"
        f"sys.argv = ['fourbit', 'quantize', '--checkpoint', {str(checkpoint)!r}, '--out', {str(out)!r}]\n"
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from engine.cli import main; main()"
    )
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


def wait_for_tensors(out, count):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(read_records(journal_path(out))[0]) <= count:
        time.sleep(0.005)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_signals(checkpoint, expected, tmp_path, number, code):
    out = tmp_path / "out.gguf"
    process = start(checkpoint, out)
    wait_for_tensors(out, 3)
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == code, error
    assert names(tmp_path) == {".out.gguf.part", ".out.gguf.journal"}
    written = quantize(checkpoint, out, "Q4_K_M")
    assert written.n_resumed >= 3
    assert out.read_bytes() == expected
    assert names(tmp_path) == {"out.gguf", "out.gguf.json"}


def test_two_runs_at_once(checkpoint, expected, tmp_path):
    out = tmp_path / "out.gguf"
    first = start(checkpoint, out)
    wait_for_tensors(out, 1)
    second = fourbit("quantize", "--checkpoint", checkpoint, "--out", out)
    assert second.returncode == 1
    assert "another run is writing" in second.stderr
    first.communicate(timeout=60)
    assert first.returncode == 0
    assert out.read_bytes() == expected
    assert names(tmp_path) == {"out.gguf", "out.gguf.json"}


def test_many_runs_at_once_never_mix(checkpoint, expected, tmp_path):
    out, outcomes = tmp_path / "out.gguf", []

    def run():
        outcomes.append(fourbit("quantize", "--checkpoint", checkpoint, "--out", out).returncode)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 in outcomes
    assert set(outcomes) <= {0, 1}
    assert out.read_bytes() == expected
    assert names(tmp_path) == {"out.gguf", "out.gguf.json"}


def interrupted(checkpoint, out, count=4):
    process = start(checkpoint, out)
    wait_for_tensors(out, count)
    process.kill()
    process.communicate()
    assert read_records(journal_path(out))[0]


@pytest.mark.parametrize("cut", [1, 9, 40, 400])
def test_a_torn_journal_loses_its_tail_only(checkpoint, expected, tmp_path, cut):
    out = tmp_path / "out.gguf"
    interrupted(checkpoint, out)
    data = journal_path(out).read_bytes()
    journal_path(out).write_bytes(data[:-cut])
    quantize(checkpoint, out, "Q4_K_M")
    assert out.read_bytes() == expected


def test_a_damaged_journal_or_part_is_not_believed(checkpoint, expected, tmp_path):
    out = tmp_path / "out.gguf"
    interrupted(checkpoint, out)
    part = part_path(out)
    header = len(expected) - sum(t.n_bytes for t in verify_header(expected, tmp_path))
    with part.open("r+b") as file:
        file.seek(header + 5000)
        file.write(b"\xff" * 4096)
    finished = {record["tensor"] for record in read_records(journal_path(out))[0] if "tensor" in record}
    assert finished
    outcome = fourbit("quantize", "--checkpoint", checkpoint, "--out", out)
    if outcome.returncode:  # the damage hit a tensor that was finished: said, and begun anew
        assert "reads back other" in outcome.stderr
        quantize(checkpoint, out, "Q4_K_M")
    assert out.read_bytes() == expected


def verify_header(data, folder):
    from engine.gguf_header import read_header

    path = folder / "copy"
    path.write_bytes(data)
    tensors = read_header(path).tensors
    path.unlink()
    return tensors


def test_another_checkpoint_begins_anew(checkpoint, tmp_path):
    out = tmp_path / "out.gguf"
    interrupted(checkpoint, out)
    other = make_checkpoint(tmp_path / "other", "qwen", seed=9, n_shards=3)
    assert quantize(other, out, "Q4_K_M").n_resumed == 0
    assert out.read_bytes() == quantize(other, tmp_path / "again.gguf", "Q4_K_M").path.read_bytes()


def test_without_a_hash_that_can_be_saved_the_shard_is_read_again(checkpoint, expected, tmp_path, monkeypatch):
    out = tmp_path / "out.gguf"
    monkeypatch.setattr(digest, "_library", lambda: None)
    interrupted(checkpoint, out)
    assert quantize(checkpoint, out, "Q4_K_M").n_resumed >= 4
    assert out.read_bytes() == expected


def test_a_sidecar_that_was_never_written_is_made_up_for(checkpoint, expected, tmp_path, monkeypatch):
    out = tmp_path / "out.gguf"

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(output_file, "write_sidecar", dies)
    with pytest.raises(KeyboardInterrupt):
        quantize(checkpoint, out, "Q4_K_M")
    monkeypatch.undo()
    assert out.read_bytes() == expected
    assert not sidecar_path(out).exists()
    settle(out)
    assert verify_file(out).has_sidecar
    assert names(tmp_path) == {"out.gguf", "out.gguf.json"}


def spoiled(path):
    with create(path, ENTRIES, SLOTS, "x") as output:
        output.write(SLOTS[0], 0, np.zeros(128, np.float32))
        output.finish([Finished("a", ((512, "0" * 64),), Mark("s", 1, "0" * 64, None))])
        raise CheckpointError("it is damaged")


def test_a_checkpoint_at_fault_leaves_nothing(tmp_path):
    with pytest.raises(CheckpointError):
        spoiled(tmp_path / "a.gguf")
    assert names(tmp_path) == set()


def test_too_little_disk_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(output_file, "disk_free_bytes", lambda path: 1000)
    with pytest.raises(DoesNotFit, match="GB of disk"), create(tmp_path / "a.gguf", ENTRIES, SLOTS):
        pass
    assert names(tmp_path) == set()


def test_writes_outside_of_a_tensor_are_refused(tmp_path):
    with pytest.raises(ValueError, match="do not fit"), create(tmp_path / "a.gguf", ENTRIES, SLOTS) as output:
        output.write(SLOTS[1], 100, np.zeros(32, np.float32))


def test_a_part_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    part_path(tmp_path / "a.gguf").symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError), create(tmp_path / "a.gguf", ENTRIES, SLOTS):
        pass
    assert (tmp_path / "precious").read_text() == "precious"


def test_journal_lines_survive_and_a_flipped_bit_voids_what_follows(tmp_path):
    path, mark = tmp_path / "j", Mark("s", 5, "0" * 64, None)
    journal = Journal(path, "plan")
    journal.restart()
    journal.add([Finished(name, ((1, "a"),), mark) for name in "xyz"])
    journal.close()
    assert set(Journal(path, "plan").finished) == set("xyz")
    assert Journal(path, "another").finished == {}
    data = bytearray(path.read_bytes())
    data[data.index(b'"y"') + 1] ^= 1
    path.write_bytes(bytes(data))
    assert set(Journal(path, "plan").finished) == {"x"}


def test_a_hash_goes_on_from_its_saved_state():
    whole = digest.Sha256()
    whole.update(b"a" * 1000)
    half = digest.Sha256()
    half.update(b"a" * 333)
    state = half.save()
    if state is None:
        pytest.skip("no libcrypto whose state can be saved: a shard is read from its start then")
    again = digest.restore(state, half.hexdigest())
    again.update(np.frombuffer(b"a" * 667, np.uint8))
    assert again.hexdigest() == whole.hexdigest()
    assert digest.restore(state, whole.hexdigest()) is None
    assert digest.restore(state[:-4] + "////", half.hexdigest()) is None
    assert digest.restore("no base64", half.hexdigest()) is None


# --- fourbit verify ------------------------------------------------------------------------------


@pytest.fixture
def written(checkpoint, tmp_path):
    return quantize(checkpoint, tmp_path / "out.gguf", "Q4_K_M").path


def test_verify_says_that_all_is_well(written, checkpoint):
    result = fourbit("verify", written, "--checkpoint", checkpoint)
    assert result.returncode == 0, result.stderr
    assert "as its sidecar says" in result.stdout
    found = json.loads(fourbit("verify", written, "--checkpoint", checkpoint, "--json").stdout)
    errors = [entry["relative_rms"] for entry in found["errors"]]
    assert errors == sorted(errors, reverse=True)
    assert len(errors) == found["n_tensors"]
    by_type = {entry["qtype"]: entry["relative_rms"] for entry in found["errors"]}
    assert by_type["F32"] == 0
    assert 0.005 < by_type["Q6_K"] < by_type["Q4_K"] < 0.12


def test_every_flipped_bit_is_noticed(written):
    data, rng = written.read_bytes(), np.random.default_rng(2)
    for place in rng.integers(0, len(data), 60):
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        written.write_bytes(bytes(flipped))
        with pytest.raises(GGUFError):
            verify_file(written)
    written.write_bytes(data)
    verify_file(written)


def test_verify_names_the_tensor(written):
    from engine.gguf_header import read_header

    tensor = read_header(written).tensors[5]
    with written.open("r+b") as file:
        file.seek(tensor.offset + 30)
        file.write(b"\x55")
    result = fourbit("verify", written)
    assert result.returncode == 1
    assert tensor.name in result.stderr


def test_verify_without_a_sidecar_checks_the_blocks(written):
    from engine.gguf_header import read_header

    sidecar_path(written).unlink()
    assert not verify_file(written).has_sidecar
    tensor = next(t for t in read_header(written).tensors if t.qtype == "Q4_K")
    with written.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(b"\x00\x7e")  # a scale that is not a number
    with pytest.raises(GGUFError, match="not a number"):
        verify_file(written)


def test_verify_against_another_checkpoint(written, tmp_path):
    other = make_checkpoint(tmp_path / "other", "deepseek-llm")
    with pytest.raises(CheckpointError, match="belong together"):
        verify_file(written, other)
    wrong = make_checkpoint(tmp_path / "wrong", "qwen", seed=5)
    assert verify_file(written, wrong).errors[0].relative_rms > 1


def test_verify_of_nothing(tmp_path):
    result = fourbit("verify", tmp_path / "none.gguf")
    assert result.returncode == 1
    assert "no file to verify" in result.stderr
    assert os.path.basename(result.args[-1]) in result.stderr


def test_what_finishes_after_its_source_proved_wrong_is_not_taken_down(tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path, "plan")
    journal.restart()
    mark = Mark("shard", 0, "", None)
    wrong = [threading.Thread(target=journal.add, args=([Finished(f"t{n}", (), mark)],)) for n in range(20)]
    for n, thread in enumerate(wrong):
        thread.start()
        if n == 10:
            journal.forget()
    for thread in wrong:
        thread.join()
    journal.close()
    assert Journal(path, "plan").finished == {}
