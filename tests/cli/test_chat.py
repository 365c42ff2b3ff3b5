"""``pi2 chat``: turns, commands, Ctrl-C, the KV cache."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess

from command_line import LIVELY, assert_error, pi2, process


def test_chat_answers_every_line_and_obeys_its_commands(toy):
    lines = "Hi\n\n/stats\n/help\n/unheard\n/reset\nyou\n/exit\nnever read\n"
    result = pi2("chat", "--model", toy, "--max-tokens", 5, *LIVELY, stdin=lines)
    assert result.exit_code == 0
    assert result.stdout.count("\n") >= 2
    assert result.stderr.count("(stopped by --max-tokens)\n") == 2
    assert "there is no /unheard" in result.stderr
    assert "forgotten" in result.stderr
    assert "/exit    leave" in result.stderr
    assert result.stderr.count("TTFT") == 1
    assert pi2("chat", "--model", toy, stdin="/stats\n").stderr == "nothing has been said yet\n"


def test_chat_keeps_the_conversation_and_its_kv_cache(toy):
    lines = "Hello there\nmore\n/stats\n"
    result = pi2("chat", "--model", toy, "--max-tokens", 4, "--system", "Be", stdin=lines)
    assert result.exit_code == 0
    figures = re.search(r"prompt of (\d+) tokens, (\d+) computed", result.stderr)
    prompt, computed = map(int, figures.groups())
    assert prompt > 20
    assert computed < prompt / 2


def test_chat_leaves_with_an_error_if_the_model_is_wrong():
    assert_error(pi2("chat", "--model", "nowhere", stdin="Hi\n"), "no model 'nowhere'")


def test_chat_refuses_input_that_is_not_utf8(toy):
    assert_error(pi2("chat", "--model", toy, stdin=b"\xff\n"), "stdin is not UTF-8", "iconv")


def test_a_turn_too_long_costs_that_turn_only(toy):
    result = pi2(
        "chat", "--model", toy, "--context", 30, "--max-tokens", 2, stdin="x" * 40 + "\nHi\n/stats\n"
    )
    assert result.exit_code == 0
    assert "error: the prompt has 43 tokens, the context 30" in result.stderr
    assert "prompt of 5 tokens" in result.stderr


def test_ctrl_c_stops_an_answer_and_not_the_chat(endless):
    child = process("chat", "--model", endless, "--max-tokens", 1 << 20, *LIVELY, stdin=subprocess.PIPE)
    child.stdin.write(b"Hi\n")
    child.stdin.flush()
    assert child.stdout.read(1)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(b"/stats\n", timeout=60)
    assert child.returncode == 0
    assert errors.startswith(b"(stopped)\nTTFT")


def test_chat_on_a_terminal_prompts_and_ends_with_ctrl_d(toy):
    ours, theirs = pty.openpty()
    child = process("chat", "--model", toy, "--max-tokens", 2, stdin=theirs, stdout=theirs)
    os.close(theirs)
    shown = b""
    while b"> " not in shown:
        shown += os.read(ours, 100)
    os.write(ours, b"\x04")  # Ctrl-D
    _, errors = child.communicate(timeout=60)
    os.close(ours)
    assert child.returncode == 0
    assert b"/help lists the commands" in errors
