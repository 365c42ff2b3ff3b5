"""``pi2 relufy`` on toy models: what it prints and writes, and how it stops."""

from __future__ import annotations

import json
import os
import signal
import sys

import pytest
from command_line import assert_error, pi2
from pi2.cli.machine import Machine
from pi2.container import read_manifest
from pi2.relufy.distil import Distiller
from pi2.testing.models import toy_architecture, write_toy_model
from relufy_texts import write_texts

QUICK = ("--tokens", 1000, "--sequence", 32, "--refit-tokens", 256, "--held-out", 192, "--threads", 1)


@pytest.fixture(scope="module")
def silu(tmp_path_factory):
    return write_toy_model(tmp_path_factory.mktemp("m") / "silu.pi2", toy_architecture(activation="silu"))


@pytest.fixture
def texts(tmp_path):
    return write_texts(tmp_path)


def test_relufy_makes_a_model_that_runs_and_says_what_it_is(silu, texts, tmp_path):
    twin = tmp_path / "twin.pi2"
    result = pi2("relufy", silu, *texts, twin, *QUICK, "--quant", "q4_0", "--density", 0.3)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["perplexity", "plain.txt", "chat.jsonl", "exact", "zeros"]
    labels = ["original", "ReLU, nothing trained", "W_down refitted", "distilled"]
    assert [line[: len(label)] for line, label in zip(lines[1:5], labels, strict=True)] == labels
    assert "next: pi2 run --model" in result.stderr
    manifest = read_manifest(twin)
    assert manifest.quantisation["gate"] == "q4_0"
    assert manifest.source["relufied"] == "silu to relu"
    assert pi2("run", "--model", twin, "--raw", "Hi", "-q", "--max-tokens", 1).exit_code == 0
    assert "relufied from silu" in pi2("inspect", twin).stdout
    assert_error(pi2("relufy", silu, *texts, twin, *QUICK), "exists already", "--force")
    assert_error(pi2("relufy", twin, *texts, tmp_path / "x", *QUICK), "is relu already", "pi2 convert")


def test_relufy_trains_a_twin_further(silu, texts, tmp_path):
    assert pi2("relufy", silu, *texts, tmp_path / "a", *QUICK).exit_code == 0
    result = pi2(
        "relufy",
        silu,
        *texts,
        tmp_path / "b",
        *QUICK,
        "--from",
        tmp_path / "a",
        "--bf16",
        "--text-weight",
        0.1,
    )
    assert result.exit_code == 0, result.stderr
    assert [line.split("  ")[0] for line in result.stdout.splitlines()[1:4]] == [
        "original", "twin to begin with", "distilled"
    ]  # fmt: skip
    assert_error(pi2("relufy", silu, *texts, tmp_path / "c", "--from", silu), "no ReLU twin", "--from")


def test_relufy_json_is_one_object(silu, texts, tmp_path):
    result = pi2("relufy", silu, *texts, tmp_path / "twin.pi2", *QUICK, "--shares", "0.7,0.3", "--json")
    found = json.loads(result.stdout)
    assert set(found["stages"]) == {"original", "swapped", "refitted", "twin"}
    assert set(found["stages"]["twin"]) == {"perplexity", "by_text", "zeros", "zeros_by_layer"}
    assert found["tokens"] >= 1000
    assert [text["name"] for text in found["texts"]] == ["plain.txt", "chat.jsonl"]


def test_relufy_reads_what_convert_reads(hugging_face, texts, tmp_path):
    config = json.loads((hugging_face / "config.json").read_text())
    copy = tmp_path / "silu"
    copy.mkdir()
    for file in hugging_face.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "config.json").write_text(json.dumps(config | {"hidden_act": "silu"}))
    assert pi2("relufy", copy, texts[0], tmp_path / "twin", *QUICK).exit_code == 0
    assert read_manifest(tmp_path / "twin").source["format"] == "huggingface"


def test_ctrl_c_waits_for_the_step_and_keeps_it(silu, texts, tmp_path, monkeypatch):
    step = Distiller._step

    def interrupted(self, *args):
        if self.done.steps == 9:
            os.kill(os.getpid(), signal.SIGINT)
        step(self, *args)

    monkeypatch.setattr(Distiller, "_step", interrupted)
    result = pi2("relufy", silu, *texts, tmp_path / "twin", *QUICK)
    assert result.exit_code == 130
    assert "stopping behind this step" in result.stderr
    assert "stopped after 384 tokens; the same command goes on" in result.stderr
    monkeypatch.undo()
    monkeypatch.setenv("PI2_PLUGINS", "")
    assert pi2("relufy", silu, *texts, tmp_path / "twin", *QUICK).exit_code == 0


def test_a_second_ctrl_c_does_not_wait(silu, texts, tmp_path, monkeypatch):
    def interrupted(self, *args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Distiller, "_step", interrupted)
    result = pi2("relufy", silu, *texts, tmp_path / "twin", *QUICK)
    assert result.exit_code == 130
    assert "stopped after 0 tokens" in result.stderr


def test_relufy_says_what_is_wrong(silu, texts, tmp_path, monkeypatch):
    twin = tmp_path / "twin"
    assert_error(pi2("relufy", silu, *texts, twin, "--shares", "a"), "--shares takes numbers", "0.4,0.6")
    assert_error(pi2("relufy", silu, tmp_path / "none", twin, *QUICK), "No such file", "check the path")
    assert_error(pi2("relufy", tmp_path / "none", *texts, twin), "there is no model")
    assert_error(pi2("relufy", silu, texts[0], texts[0], twin, *QUICK), "are the same text")
    assert pi2("relufy", silu, twin).exit_code == 2
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        assert_error(pi2("relufy", silu, *texts, twin), "needs PyTorch, which is not installed", "pi2[train]")
    here = Machine.here()
    monkeypatch.setattr(
        Machine, "here", lambda: type(here)(**_fields(here) | {"memory_available_bytes": 1000})
    )
    assert_error(pi2("relufy", silu, *texts, twin), "1.0 kB are free", "--workers")


def _fields(machine):
    return {name: getattr(machine, name) for name in machine.__slots__}
