"""The command line as a user meets it: in a pipe, and in a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import signal
import sys
import time

import pytest

from engine.home import model_file
from engine.registry import models
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.command import fourbit

SHORT = ("--ctx", "256", "--threads", "1", "--temperature", "0", "--max-tokens", "8")


@pytest.mark.parametrize("family", FAMILIES)
def test_ask_streams_what_json_holds(converted, family):
    plain = fourbit("ask", converted(family), "hello", *SHORT)
    report = json.loads(fourbit("ask", converted(family), "hello", "--json", *SHORT).stdout)
    assert plain.returncode == 0
    assert plain.stdout.strip() == report["reply"].strip()
    assert report["n_reply"] <= 8


def test_quantize_from_the_models_folder_then_ask_by_key(tmp_path):
    make_checkpoint(tmp_path / "checkpoints" / "chatglm3-6b", "chatglm3")
    first = fourbit("quantize", home=tmp_path)
    assert first.returncode == 0, first.stderr
    assert (tmp_path / "models" / "chatglm3-6b-Q4_K_M.gguf").is_file()
    assert "already there" in fourbit("quantize", "chatglm3-6b", home=tmp_path).stdout
    assert fourbit("baseline", "chatglm3-6b", home=tmp_path).returncode == 0
    assert fourbit("ask", "chatglm3-6b", "hello", *SHORT, home=tmp_path).returncode == 0
    (row,) = [r for r in json.loads(fourbit("models", "--json", home=tmp_path).stdout)["models"] if r["files"]]
    assert [os.path.basename(file["path"]) for file in row["files"]] == [
        "chatglm3-6b-F16.gguf",
        "chatglm3-6b-Q4_K_M.gguf",
    ]


def test_models_shows_where_a_checkpoint_is_looked_for(tmp_path):
    assert str(tmp_path) in fourbit("models", home=tmp_path).stdout
    folder = fourbit("models", "--folder", "qwen-7b-chat", home=tmp_path).stdout.strip()
    assert folder == str(tmp_path / "checkpoints" / "qwen-7b-chat")


def test_inspect_shows_mixture_and_sizes(converted):
    path = converted("deepseek-llm", "made", "Q4_K_M")
    report = json.loads(fourbit("inspect", path, "--json").stdout)
    assert {share["qtype"] for share in report["shares"]} == {"F32", "Q4_K", "Q6_K"}
    assert report["file_bytes"] == path.stat().st_size
    assert report["metadata"]["fourbit.model"] == "deepseek-llm-7b-chat"
    assert "blk.0.attn_q.weight" in fourbit("inspect", path, "--tensors").stdout


def test_tokens_keeps_the_nesting(converted, tmp_path):
    messages = [{"role": "user", "content": "hello"}]
    file = tmp_path / "messages.json"
    file.write_text(json.dumps(messages))
    one = json.loads(fourbit("tokens", converted("qwen"), "--messages", file).stdout)["ids"]
    many = json.loads(fourbit("tokens", converted("qwen"), "--messages", "-", stdin=json.dumps([messages] * 2)).stdout)
    assert many["ids"] == [one, one]


def test_chat_in_a_pipe_takes_several_turns(converted):
    result = fourbit("chat", converted("qwen"), *SHORT, stdin="hello\n/new\n你好\n")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.strip("\n")) > 0


def test_chat_says_when_a_message_cannot_be_taken_and_goes_on(converted):
    result = fourbit("chat", converted("qwen"), *SHORT, stdin="hello " * 400 + "\nhello\n")
    assert result.returncode == 0
    assert "the context 256" in result.stderr
    assert result.stdout


def read_until(fd: int, words: str, seconds: float = 60) -> str:
    seen, deadline = "", time.monotonic() + seconds
    while words not in seen:
        assert time.monotonic() < deadline, seen
        if not select.select([fd], [], [], 1)[0]:
            continue
        try:
            seen += os.read(fd, 65536).decode("utf-8", errors="replace")
        except OSError:
            break
    return seen


def test_ctrl_c_stops_a_reply_and_not_the_program(converted, tmp_path):
    """In a real terminal; the reply is endless as far as the context goes."""
    path = converted("qwen")
    pid, fd = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # it is ignored in background jobs, and so inherited
        os.execv(sys.executable, [sys.executable, "-m", "engine", "chat", str(path), "--ctx", "512"])
    read_until(fd, "> ")
    os.write(fd, b"hello\n")
    time.sleep(0.3)
    os.write(fd, b"\x03")
    read_until(fd, "> ")
    time.sleep(0.5)
    os.write(fd, b"\x03")
    read_until(fd, "(Ctrl-D ends)")
    time.sleep(0.5)  # until the prompt is there again
    os.write(fd, b"\x04")
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    if ended[0] == 0:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    os.close(fd)
    assert ended[0] == pid
    assert os.waitstatus_to_exitcode(ended[1]) == 0


def test_a_file_in_the_models_folder_is_found_by_key(converted, fourbit_home):
    spec = models()["qwen-7b-chat"]
    path = model_file(spec, spec.qtype)
    path.parent.mkdir(parents=True)
    shutil.copy(converted("qwen"), path)
    assert fourbit("ask", "qwen-7b-chat", "hello", *SHORT).returncode == 0
