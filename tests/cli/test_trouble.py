"""What goes wrong at the command line: errors, wrong options, Ctrl-C, closed pipes, poor terminals."""

from __future__ import annotations

import os
import pty
import signal

import pytest
from command_line import LIVELY, assert_error, pi2, process
from pi2.cli.output import print_run
from pi2.stats import RunStats


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["--model", "nowhere"], "no model 'nowhere'", "installed models: none"),
        ([], "no model is installed", "pi2 convert"),
        (["--model", "TOY", "--backend", "nunpy"], "no 'nunpy' among the backends", "did you mean 'numpy'?"),
        (["--model", "TOY", "--backend", "numpy:x=1"], "has no option 'x'", "its options"),
        (["--model", "TOY", "--storage", "mmap:x"], "'x' is no option", "name:key=value"),
        (["--model", "TOY", "--temperature", "-1"], "temperature is between", ""),
        (["--model", "TOY", "--top-p", "2"], "top-p is between 0 and 1, not 2.0", ""),
        (["--model", "TOY", "--logit-bias", "five=1"], "takes ID=V, not 'five=1'", "42=-1.5"),
        (["--model", "TOY", "--logit-bias", "999=1"], "the vocabulary ends at 260", ""),
        (["--model", "TOY", "--stop", ""], "not empty", ""),
        (["--model", "TOY", "--greedy", "--temperature", "1"], "contradicts", "leave one of them out"),
        (["--model", "TOY", "--context", "3"], "the context 3", "--context"),
        (["--model", "TOY", "--raw", "--file", "/nonexistent/file"], "No such file", "check the path"),
    ],
)
def test_what_is_wrong_is_said_with_a_hint_and_exit_code_1(toy, args, message, hint):
    args = [toy if a == "TOY" else a for a in args]
    assert_error(pi2("run", *args, *([] if "--file" in args else ["Hello"])), message, hint)


def test_a_foreign_model_is_answered_with_the_command_that_converts_it(tmp_path):
    file = tmp_path / "some model.gguf"
    file.write_bytes(b"GGUF")
    assert_error(pi2("run", "--model", file, "Hi"), "not a pi2 model", "pi2 convert")


def test_a_prompt_that_is_not_utf8_is_refused(toy, tmp_path):
    (tmp_path / "latin1").write_bytes("Grüße".encode("latin-1"))
    assert_error(pi2("run", "--model", toy, "--file", tmp_path / "latin1"), "not UTF-8 at byte 2", "iconv")
    assert_error(pi2("run", "--model", toy, stdin=b"\xff"), "stdin is not UTF-8", "iconv")


@pytest.mark.parametrize(
    "args",
    [
        ["run", "--temperature", "hot", "Hi"],
        ["run", "--unheard", "Hi"],
        ["run", "Hi", "--file", "also"],
        ["run", "Hi", "--raw", "--system", "Be brief"],
        ["unheard"],
        ["convert", "only-one"],
    ],
)
def test_a_wrong_command_line_exits_with_2(args):
    result = pi2(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: pi2" in result.stderr


def test_no_prompt_on_a_terminal_is_a_usage_error(toy):
    ours, theirs = pty.openpty()
    child = process("run", "--model", toy, stdin=theirs)
    _, errors = child.communicate(timeout=60)
    os.close(ours)
    os.close(theirs)
    assert child.returncode == 2
    assert b"on stdin" in errors


def test_text_streams_and_ctrl_c_keeps_what_was_printed(endless):
    child = process("run", "--model", endless, "--raw", "Hi", "--max-tokens", 1 << 20, *LIVELY)
    first = child.stdout.read(1)
    assert first
    assert child.poll() is None  # a million tokens take minutes: the text came before the end
    child.send_signal(signal.SIGINT)
    rest, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert rest.endswith(b"\n")
    assert b"decode" in errors
    assert b"Traceback" not in errors


def test_a_reader_that_goes_away_is_no_error(endless):
    child = process("run", "--model", endless, "--raw", "Hi", "--max-tokens", 1 << 20, *LIVELY)
    child.stdout.read(1)
    child.stdout.close()
    assert child.wait(timeout=60) == 141
    assert child.stderr.read() == b""
    child.stderr.close()


def test_a_terminal_that_cannot_show_a_character_does_not_end_the_run(toy):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    bias = ("--logit-bias", "250=100", "--temperature", "0")
    child = process("run", "--model", toy, "--raw", "Hi", "-q", "--max-tokens", 4, *bias, env=environment)
    text, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (0, b"")
    assert text == b"????\n"


def test_a_lossy_run_says_so(capsys):
    setup = {
        "backend": "b",
        "storage": "s",
        "predictor": "p",
        "lossless": False,
        "emulated": False,
        "config": {"losses": ["neurons may be missed"]},
    }
    print_run(RunStats(), setup)
    assert "lossy: neurons may be missed" in capsys.readouterr().err
