"""``pi2 train-head`` and ``--sparse-head`` on a toy model."""

from __future__ import annotations

import json
import shutil

import pytest
from command_line import assert_error, pi2
from pi2.container import read_manifest


@pytest.fixture
def model(toy, tmp_path):
    return shutil.copytree(toy, tmp_path / "copy.pi2")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Rain falls from clouds when drops grow heavy. " * 60)
    return path


def test_a_trained_head_runs_and_says_that_it_is_lossy(model, text):
    assert_error(pi2("run", "--model", model, "--raw", "Hi", "--sparse-head", 9), "no estimate", "train-head")
    result = pi2("train-head", model, text, "--rank", 32)
    assert result.exit_code == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[0] == ["candidates", "64", "128", "256"]
    assert rows[1][0] == "agreement"
    assert "head.safetensors" in read_manifest(model).files
    exact = json.loads(pi2("run", "--model", model, "--raw", "Hi", "--max-tokens", 5, "--json").stdout)
    options = ("--raw", "Hi", "--max-tokens", 5, "--sparse-head", 200)
    sparse = json.loads(pi2("run", "--model", model, *options, "--json").stdout)
    assert (exact["lossless"], sparse["lossless"]) == (True, False)
    assert sparse["tokens"] == exact["tokens"]
    assert "rank 32" in sparse["config"]["head"]
    assert "lossy: tokens may be missed" in pi2("run", "--model", model, *options).stderr
    assert pi2("chat", "--model", model, "--sparse-head", 9, "--max-tokens", 2, stdin="Hi\n").exit_code == 0
    both = pi2("run", "--model", model, *options, "--memory", "1G")
    assert_error(both, "does not go with --memory", "leave one out")


def test_eval_judges_the_head(model, text):
    figures = json.loads(pi2("train-head", model, text, "--json").stdout)
    assert set(figures) == {"rank", "bytes", "tokens", "agreement", "seconds"}
    options = ("--tokens", 64, "--sequence", 32, "--sparse-head", 64)
    found = json.loads(pi2("eval", model, text, *options, "--json").stdout)
    head = found["sparse_head"]
    assert set(head) == {"head", "tokens", "agreement", "kl", "exact_head_s", "sparse_head_s"}
    assert 0 <= head["agreement"] <= 1
    assert found["lossless"]  # the other figures are with the exact head
    table = pi2("eval", model, text, *options).stdout
    assert "sparse: estimate of rank 32, 64 exact logits" in table
    assert "of the likeliest tokens, of " in table
    assert json.loads(pi2("eval", model, text, *options[:4], "--json").stdout)["sparse_head"] is None
    assert_error(pi2("eval", model, text, "--sparse-head", 5000), "takes a number of tokens", "512")
