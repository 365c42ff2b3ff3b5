"""``--memory`` and the options beside it, on toy models."""

import json
import subprocess
import sys

import pytest
from command_line import pi2
from pi2.memory import rss_bytes
from pi2.testing.models import toy_architecture, write_toy_model

SMALL = ["--memory", "2G", "--context", "64"]


@pytest.fixture(autouse=True)
def _enough_memory():
    if rss_bytes() > 1 << 30:
        pytest.skip("the tests that ran before use more than the budget of these")


def test_a_budget_gives_the_same_text_and_says_what_it_was_used_for(toy):
    plain = pi2("run", "--model", toy, "--raw", "Once", "--max-tokens", 8)
    result = pi2("run", "--model", toy, "--raw", "Once", "--max-tokens", 8, *SMALL)
    assert (result.exit_code, result.stdout) == (0, plain.stdout)
    lines = {line.split("  ")[0]: line for line in result.stderr.splitlines()}
    assert "2.0 GB" in lines["budget"]
    assert "policy lfu" in lines["budget"]
    assert {"hit rate", "read", "I/O wait"} <= set(lines)
    assert (
        "warning: storage mmap reads through the page cache and nothing ahead: this is slow" in result.stderr
    )


def test_json_tells_the_figures_of_the_cache(toy):
    result = pi2("run", "--model", toy, "Hi", "--json", "--max-tokens", 6, *SMALL, "--policy", "clock")
    found = json.loads(result.stdout)
    assert (found["budget_bytes"], found["policy"]) == (2 * 10**9, "clock")
    assert sum(found["config"]["regions"].values()) == found["budget_bytes"]
    assert 0 <= found["hit_rate"] <= 1
    assert 0 <= found["io_wait_share"] <= 1
    details = found["offload"]
    assert found["bytes_read"] == sum(details["bytes_read"].values()) > 0
    assert 0 <= details["miss_rate"]["mean"] <= details["miss_rate"]["p99"] <= 1
    assert details["decode_s"]["io_wait"] <= details["decode_s"]["ffn"]
    assert found["config"]["offload"]["policy"] == "clock"
    assert any("page cache" in note for note in found["config"]["notes"])


def test_an_answer_of_one_token_has_no_decoding_to_tell_of(toy):
    found = json.loads(pi2("run", "--model", toy, "Hi", "--json", "--max-tokens", 1, *SMALL).stdout)
    assert (found["hit_rate"], found["io_wait_share"]) == (None, None)
    assert found["offload"]["bytes_read"]["prefill"] > 0


def test_a_budget_below_the_minimum_names_the_minimum_which_is_enough(toy):
    """In a process of its own: what these tests have in memory counts, too."""
    command = [
        sys.executable,
        "-m",
        "pi2",
        "run",
        "--model",
        toy,
        "Hi",
        "--max-tokens",
        "2",
        "--context",
        "64",
    ]
    refused = subprocess.run([*command, "--memory", "1M"], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "error: a budget of 1 MB is too small: this model needs at least" in refused.stderr
    minimum = int(refused.stderr.split("--memory ")[1].split("M")[0])
    done = subprocess.run(
        [*command, "--memory", f"{minimum * 1.02}M", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rss_peak_bytes"] <= minimum * 1.02 * 1e6 * 1.03


def test_a_context_that_nobody_chose_is_bounded_under_a_budget(tmp_path):
    model = str(write_toy_model(tmp_path / "m", toy_architecture(max_context=1 << 20)))
    found = json.loads(
        pi2("run", "--model", model, "Hi", "--json", "--max-tokens", 1, "--memory", "2G").stdout
    )
    assert found["config"]["context"] == 2048


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--memory", "much"], "--memory takes a size, not 'much'"),
        (["--policy", "lru"], "--policy needs --memory"),
        (["--hot", "0.5"], "--hot needs --memory, or an accelerator"),
        (["--cold", "numpy"], "--cold needs --hot"),
        (["--hybrid", "prefill=cpu"], "--hybrid needs --hot"),
        (["--hot", "0.5", "--hybrid", "prefill=cpu"], "--hybrid needs an accelerator"),
        (["--hot", "0.5", "--cold", "numpy", "--hybrid", "hot=1"], "--hybrid has no hot"),
        (["--offload", "prefetch=off"], "--offload needs --memory"),
        (["--trace", "t.json"], "--trace needs --memory"),
        ([*SMALL, "--offload", "slots=3"], "--offload has no slots"),
        ([*SMALL, "--offload", "speed=3"], "OffloadOptions has no option 'speed'"),
        ([*SMALL, "--policy", "lfu:half_life=0"], "a half-life of 0 tokens cannot be"),
        ([*SMALL, "--policy", "s3fifo:small=1"], "the small queue cannot have 1 of the cache"),
        ([*SMALL, "--hot", "-1"], "-1 of an FFN cannot be hot"),
    ],
)
def test_options_that_make_no_sense_are_refused(toy, options, says):
    result = pi2("run", "--model", toy, "Hi", *options)
    assert result.exit_code == 1
    assert f"error: {says}" in result.stderr
    assert "hint: " in result.stderr


@pytest.mark.parametrize("memory", [[], SMALL])
def test_an_accelerator_takes_the_hot_share(toy, tmp_path, memory):
    """NumPy in its place, and beside it: the same text, what ran where, and a trace."""
    trace = tmp_path / "trace.json"
    shared = ["--backend", "numpy", "--hot", "0.6", "--cold", "numpy", "--hybrid", "prefill=accelerator"]
    plain = pi2("run", "--model", toy, "--raw", "Once", "--max-tokens", 8)
    result = pi2(
        "run", "--model", toy, "--raw", "Once", "--max-tokens", 8, *shared, *memory, "--trace", trace
    )
    assert (result.exit_code, result.stdout) == (0, plain.stdout)
    assert "128 of 160 neurons on numpy" in result.stderr
    assert "attention on numpy, prefill on numpy" in result.stderr
    assert "warning: numpy computes nothing in the background" in result.stderr
    assert {"hot", "cold"} <= {event["name"] for event in json.loads(trace.read_text())}
    found = json.loads(pi2("run", "--model", toy, "Hi", "--json", "--max-tokens", 3, *shared, *memory).stdout)
    assert found["hybrid"]["prefill"] == "accelerator"
    assert found["config"]["hybrid"]["hot"] == 0.6


def test_chat_and_eval_take_a_budget_too(toy, tmp_path):
    text = tmp_path / "text"
    text.write_text("one two three four five six seven eight nine ten " * 4)
    plain = pi2("eval", toy, text, "--tokens", 64, "--sequence", 32, "--json")
    result = pi2("eval", toy, text, "--tokens", 64, "--sequence", 32, "--json", "--memory", "2G")
    assert json.loads(result.stdout)["perplexity"] == json.loads(plain.stdout)["perplexity"]
    shared = ["--backend", "numpy", "--cold", "numpy", "--hot", "0.6"]
    beside = json.loads(pi2("eval", toy, text, "--tokens", 64, "--sequence", 32, "--json", *shared).stdout)
    assert beside["perplexity"] == pytest.approx(json.loads(plain.stdout)["perplexity"], rel=1e-4)
    assert beside["hybrid"]["decode_s"]["hot"] > 0
    said = pi2("chat", "--model", toy, "--max-tokens", 3, *SMALL, stdin="Hi\nAgain\n/exit\n")
    assert said.exit_code == 0
    assert said.stdout == pi2("chat", "--model", toy, "--max-tokens", 3, stdin="Hi\nAgain\n/exit\n").stdout
