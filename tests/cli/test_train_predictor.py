"""``pi2 train-predictor`` on toy models: what it prints and writes, and how the others use it."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from command_line import assert_error, pi2
from pi2.container import read_manifest
from pi2.container.predictors import PREDICTORS
from pi2.lowrank import training
from pi2.testing.models import toy_architecture, write_toy_model

ARCH = toy_architecture()


@pytest.fixture
def model(toy, tmp_path):
    """A copy that a test may write into."""
    return shutil.copytree(toy, tmp_path / "copy.pi2")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Rain falls from clouds when drops grow heavy. " * 12)
    return path


@pytest.fixture
def trained(model, text):
    result = pi2("train-predictor", model, text, "--width", 32, "--max-loss", 100)
    assert result.exit_code == 0, result.stderr
    return result


def test_it_writes_into_the_model_and_says_what_it_costs(model, trained):
    rows = [line.split() for line in trained.stdout.splitlines()]
    assert rows[0] == ["layer", "width", "bytes", "density", "predicted", "recall"]
    assert [row[:2] for row in rows[1:]] == [["0", "32"], ["1", "32"]]
    assert all(float(row[5].rstrip("%")) >= 97 for row in rows[1:])
    assert "lossy: perplexity" in trained.stderr
    assert "% of the model" in trained.stderr
    assert PREDICTORS in read_manifest(model).files
    assert not list(model.glob("*.partial"))
    assert pi2("inspect", model).exit_code == 0


def test_the_trained_predictors_run_and_are_judged(model, trained, text):
    run = pi2("run", "--model", model, "--raw", "Hi", "--max-tokens", 2, "--json",
              "--predictor", "lowrank:max_loss=100")  # fmt: skip
    facts = json.loads(run.stdout)
    assert facts["predictor"] == "lowrank"
    assert not facts["lossless"]
    assert "width 32 to 32" in facts["config"]["parts"]["predictor"]
    judge = ("eval", model, text, "--tokens", 64, "--sequence", 32, "--predictor", "lowrank:max_loss=100")
    found = json.loads(pi2(*judge, "--json").stdout)
    assert [layer["width"] for layer in found["layers"]] == [32, 32]
    assert found["predictor_bytes"] == sum(layer["predictor_bytes"] for layer in found["layers"]) > 0
    table = [line.split() for line in pi2(*judge).stdout.splitlines()]
    assert table[0] == ["layer", "density", "predicted", "recall", "precision", "predictor", "width", "bytes"]
    assert table[3][0] == "all"


def test_json_is_one_object_and_out_leaves_the_model_alone(model, text, tmp_path):
    result = pi2("train-predictor", model, text, "--json", "--out", tmp_path / "p", "--max-loss", 100)
    found = json.loads(result.stdout)
    assert set(found) == {
        "path", "seconds", "bytes", "share_of_model", "perplexity_loss", "layers", "training"
    }  # fmt: skip
    assert set(found["layers"][1]) == {"layer", "width", "bytes", "density", "predicted_density", "recall"}
    assert PREDICTORS not in read_manifest(model).files
    assert not (model / PREDICTORS).exists()
    use = f"lowrank:max_loss=100,file={tmp_path / 'p'}"
    assert (
        pi2("run", "--model", model, "--raw", "Hi", "-q", "--max-tokens", 1, "--predictor", use).exit_code
        == 0
    )


def test_stopped_it_says_how_to_go_on_and_does(model, text, monkeypatch):
    def stop(self, progress):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training.Training, "measure", stop)
        result = pi2("train-predictor", model, text, "--max-loss", 100)
        assert result.exit_code == 130
        assert "stopped: the same command goes on" in result.stderr
    assert pi2("run", "--model", model, "--raw", "Hi", "-q", "--max-tokens", 1).exit_code == 0
    with monkeypatch.context() as patched:
        patched.setattr(training.Training, "_train_layer", None)  # nothing is left to be trained
        assert pi2("train-predictor", model, text, "--max-loss", 100).exit_code == 0


def test_predictors_of_others_are_taken_over(model, text, tmp_path):
    rng = np.random.default_rng(0)
    for layer in range(2):
        shapes = {"fc1.weight": (32, ARCH.d_model), "fc2.weight": (ARCH.n_neurons, 32)}
        state = {name: torch.tensor(rng.normal(0, 1, s), dtype=torch.float32) for name, s in shapes.items()}
        torch.save(state, tmp_path / f"model_{layer}.pt")
    bare = pi2("train-predictor", model, "--from", tmp_path, "--json")
    assert json.loads(bare.stdout)["perplexity_loss"] is None
    assert PREDICTORS in read_manifest(model).files
    result = pi2("train-predictor", model, text, "--from", tmp_path, "--json", "--max-loss", 100)
    found = json.loads(result.stdout)
    assert found["training"]["imported"] == str(tmp_path)
    assert all(layer["recall"] >= 0.97 for layer in found["layers"])


def test_without_torch_it_says_what_to_install(model, text, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert_error(pi2("train-predictor", model, text), "needs PyTorch", "pip install 'pi2[train]'")


def test_what_cannot_be_is_refused(model, text, tmp_path):
    assert_error(pi2("train-predictor", model), "no text", "pi2 train-predictor MODEL TEXT")
    for option, wrong, message in (
        ("--width", "many", "a number or auto"),
        ("--width", 40, "a width of 40"),
        ("--recall", 2, "a recall of 2"),
        ("--quant", "q2_k", "no weight format"),
        ("--out", tmp_path / "no" / "p", "cannot be written"),
        ("--from", tmp_path / "no", "no such file"),
    ):
        assert_error(pi2("train-predictor", model, text, option, wrong), message)
    silu = write_toy_model(tmp_path / "silu", toy_architecture(activation="silu"))
    assert_error(pi2("train-predictor", silu, text), "silu has no exact zeros")


def test_more_loss_than_allowed_is_said_and_then_refused(model, text):
    result = pi2("train-predictor", model, text, "--max-loss", -1)
    assert "warning: that is more than --max-loss -1" in result.stderr
