"""``pi2 bench`` on toy models: every mode runs, and those with one predictor write the same text."""

import json

import pytest
from command_line import assert_error, pi2
from pi2.bench import MODES, STEPS, Bench, Work, summary

SMALL = ["--memory", "2G", "--prefill", 6, "--settle", 2, "--tokens", 4]
LOSSLESS = [name for name in MODES if name != "accelerator"]


@pytest.fixture(scope="module")
def found(toy):
    """Every mode but the accelerator's, twice."""
    modes = [word for name in LOSSLESS for word in ("--mode", name)]
    result = pi2("bench", "--model", toy, *modes, *SMALL, "--repeats", 2, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout), result.stderr


def test_every_lossless_mode_samples_the_same_tokens(found):
    report, said = found
    assert list(report["summary"]) == LOSSLESS
    tokens = {tuple(piece["tokens"]) for repeat in report["repeats"] for piece in repeat.values()}
    assert len(tokens) == 1
    assert [len(t) for t in tokens] == [7]  # of the prefill, 2 that settle, 4 that count
    assert "other tokens" not in said


def test_json_has_every_repeat_and_the_table_the_medians(found):
    report, said = found
    assert len(report["repeats"]) == 2
    lines = {line.split()[0]: line for line in said.splitlines() if line}
    for name in LOSSLESS:
        rates = sorted(repeat[name]["decode_tps"] for repeat in report["repeats"])
        shown = report["summary"][name]["decode_tps"]
        assert (shown["min"], shown["max"]) == (rates[0], rates[1])
        assert f"{sum(rates) / 2:.2f}" in lines[name]
        assert all(len(repeat[name]["token_s"]) == 6 for repeat in report["repeats"])
    step = [r["bundle"]["decode_tps"] / r["baseline"]["decode_tps"] for r in report["repeats"]]
    assert report["summary"]["bundle"]["step"]["median"] == pytest.approx(sum(step) / 2)
    assert report["work"]["tokens"] == 4
    assert report["machine"]["cores"] >= 1


def test_modes_differ_as_they_say(found):
    pieces = found[0]["repeats"][0]
    options = {name: pieces[name]["config"].get("offload") for name in LOSSLESS}
    assert options["mmap"] is None
    assert options["memory"] is None
    assert options["flash"]["policy"] == "window:tokens=5"
    assert not options["baseline"]["bundled"]
    assert options["bundle"]["bundled"]
    assert not options["cache"]["overlap"]
    assert options["pipeline"]["overlap"]
    reads = {name: pieces[name]["offload"]["reads"] for name in ("baseline", "bundle", "cache")}
    assert reads["baseline"] >= reads["bundle"] >= reads["cache"]


def test_a_limit_below_the_minimum_is_a_line_of_the_table(toy):
    result = pi2("bench", "--model", toy, "--mode", "flash", "--memory", "2M", "--repeats", 1, "--json")
    assert result.exit_code == 0
    refused = json.loads(result.stdout)["summary"]["flash"]["refused"]
    assert "too small" in refused
    assert f"flash: {refused}" in result.stderr


def test_modes_are_listed_and_unknown_ones_refused(toy):
    listed = pi2("bench", "--list")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(MODES)
    assert_error(pi2("bench", "--model", toy, "--mode", "magic"), "there is no mode 'magic'", "flash")


def test_a_summary_takes_ratios_within_a_repeat_and_leaves_out_what_was_refused():
    def piece(speed):
        latency = {"mean": 1.0, "p99": 1.0}
        none = dict.fromkeys(("hit_rate", "io_wait_share"))
        rest = {"prefill_s": 1.0, "rss_peak_bytes": 1, "storage_bytes_per_token": 1, "tokens": [1]}
        return {"decode_tps": speed, "token_latency_s": latency, **none, **rest}

    steps = [MODES[name] for name in STEPS[:2]]
    repeats = [
        {"baseline": piece(1.0), "bundle": piece(3.0)},
        {"baseline": piece(2.0), "bundle": piece(10.0)},
    ]
    report = summary(steps, [*repeats, {"baseline": piece(1.0), "bundle": {"refused": "no"}}])
    assert report["bundle"]["step"] == {"median": 4.0, "min": 3.0, "max": 5.0}
    assert report["baseline"]["decode_tps"]["median"] == 1.0
    assert report["bundle"]["over"]["baseline"] == report["bundle"]["step"]


def test_a_process_that_dies_is_said_to_have(toy, monkeypatch):
    monkeypatch.setattr("pi2.bench._COMMAND", ("false",))
    from pathlib import Path

    bench = Bench(Path(toy), [MODES["memory"]], Work("text"), {}, 1 << 30)
    bench.repeat()
    assert bench.repeats[0]["memory"]["refused"] == "ended (status 1)"
