"""``pi2 run`` on toy models: what it prints where."""

from __future__ import annotations

import dataclasses
import inspect
import json

import pytest
from command_line import LIVELY, pi2
from pi2.cli import chat as chat_command
from pi2.cli import run as run_command
from pi2.engine import Engine
from pi2.sampling import Sampling

GOLDEN = [68, 68, 22, 122, 122, 122, 122, 122, 190, 190, 190, 190, 190, 212, 204, 244]
DESIGNED_KEYS = {
    *("text", "tokens", "prompt_tokens", "ttft_s", "prefill_tps", "decode_tps", "token_latency_s"),
    *("rss_peak_bytes", "budget_bytes", "density", "hit_rate", "bytes_read", "io_wait_share", "backend"),
    *("storage", "predictor", "policy", "lossless", "predicted_tps", "config", "versions", "stop_reason"),
    "offload",
    "hybrid",
    "emulated",
}


def test_run_writes_the_engines_text_to_stdout_and_figures_to_stderr(toy):
    with Engine.open(toy) as engine:
        generation = engine.generate(engine.encode("Hello"), Sampling(temperature=8.0, seed=3, max_tokens=12))
        text = "".join(piece.text for piece in generation)
    result = pi2("run", "--model", toy, "--raw", "Hello", "--max-tokens", 12, *LIVELY)
    assert result.exit_code == 0
    assert result.stdout == text + "\n"
    lines = [line.split()[0] for line in result.stderr.splitlines()]
    assert lines == ["TTFT", "prefill", "decode", "peak", "density", "parts", "lossless", "seed"]
    assert "12 tokens, stopped by --max-tokens" in result.stderr
    assert "storage mmap, predictor exact" in result.stderr


def test_the_transcript_of_the_toy_model_stays_the_same(toy):
    result = pi2("run", "--model", toy, "--raw", "Once", "--max-tokens", 16, "--json", *LIVELY)
    assert json.loads(result.stdout)["tokens"] == GOLDEN


def test_quiet_leaves_only_the_text(toy):
    result = pi2("run", "--model", toy, "--raw", "Hello", "-q", "--max-tokens", 3, *LIVELY)
    assert (result.exit_code, result.stderr) == (0, "")


def test_json_is_one_object_with_exactly_the_designed_keys(toy):
    result = pi2("run", "--model", toy, "Hi", "--json", "--max-tokens", 4, "--seed", 9, "--top-k", 5)
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert set(found) == DESIGNED_KEYS
    assert len(found["tokens"]) == 4
    assert set(found["token_latency_s"]) == {"mean", "p50", "p90", "p99"}
    assert (found["backend"], found["lossless"], found["budget_bytes"]) == ("numpy", True, None)
    assert found["config"]["sampling"]["seed"] == 9
    assert found["config"]["sampling"]["top_k"] == 5
    assert found["config"]["model"] == toy


def test_a_seed_that_nobody_gave_is_told_and_repeats_the_answer(toy):
    args = ("run", "--model", toy, "--raw", "Hello", "--json", "--max-tokens", 20, "--temperature", 8)
    first = json.loads(pi2(*args).stdout)
    again = json.loads(pi2(*args, "--seed", first["config"]["sampling"]["seed"]).stdout)
    assert again["tokens"] == first["tokens"]
    assert json.loads(pi2(*args).stdout)["tokens"] != first["tokens"]


@pytest.mark.parametrize("newline", ["", "\n"])
def test_argument_file_and_stdin_give_the_same_prompt(toy, tmp_path, newline):
    file = tmp_path / "prompt.txt"
    file.write_bytes(f"Grüße{newline}".encode())
    tail = ["--model", toy, "--raw", "--max-tokens", 5, *LIVELY]
    expected = pi2("run", "Grüße", *tail).stdout
    assert pi2("run", "--file", file, *tail).stdout == expected
    assert pi2("run", "-", *tail, stdin=f"Grüße{newline}").stdout == expected
    assert pi2("run", *tail, stdin=f"Grüße{newline}").stdout == expected


def test_the_chat_template_and_the_system_message_are_used_unless_raw(toy):
    def prompt_tokens(*args):
        return json.loads(pi2("run", "--model", toy, "--json", "--max-tokens", 1, *args).stdout)[
            "prompt_tokens"
        ]

    assert prompt_tokens("--raw", "Hi") == 1 + 2  # <s>, a byte a token
    assert prompt_tokens("Hi") == 1 + 2 + 1 + 1  # <|user|> Hi </s> <|assistant|>
    assert prompt_tokens("Hi", "--system", "Be") == 5 + 1 + 2 + 1


def test_sampling_options_reach_the_sampler(toy):
    only = ["run", "--model", toy, "--raw", "Hi", "--max-tokens", 3, "--json"]
    bias = [arg for i in range(261) if i != 65 for arg in ("--logit-bias", f"{i}=-inf")]
    a = 65 - 33  # the byte-level alphabet is sorted by character, and begins with "!"
    bias = [arg.replace(f"{a}=", "65=") if arg == f"{a}=-inf" else arg for arg in bias]
    assert json.loads(pi2(*only, *bias).stdout)["text"] == "AAA"
    stopped = json.loads(pi2(*only, *bias, "--stop", "never", "--stop", "AA").stdout)
    assert (stopped["text"], stopped["stop_reason"]) == ("", "stop")
    assert json.loads(pi2(*only, "--greedy").stdout)["tokens"] == json.loads(pi2(*only).stdout)["tokens"]


@pytest.mark.parametrize("command", [run_command.command, chat_command.command])
def test_the_defaults_of_the_options_are_those_of_the_sampler(command):
    given = {name: p.default for name, p in inspect.signature(command).parameters.items()}
    for field in dataclasses.fields(Sampling):
        own = given.get(field.name)
        if own is not None and (command, field.name) != (chat_command.command, "max_tokens"):
            assert own == field.default
