"""``pi2 collect`` and ``pi2 eval`` on toy models: what they print and write."""

from __future__ import annotations

import json
import shutil

import pytest
from command_line import assert_error, pi2
from pi2.activation_counts import ActivationCounts
from pi2.builtin.numpy_backend import NumpyBackend
from pi2.cli import collect as collect_command
from pi2.container import read_manifest
from pi2.errors import Pi2Error
from pi2.statistics_file import Statistics
from pi2.testing.models import toy_architecture, write_toy_model

FILE = "statistics.safetensors"


@pytest.fixture
def model(toy, tmp_path):
    """A copy that a test may write into."""
    return shutil.copytree(toy, tmp_path / "copy.pi2")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Rain falls from clouds when drops grow heavy. " * 25)
    return path


def test_collect_writes_into_the_model_and_the_model_still_runs(model, text):
    result = pi2("collect", model, text, "--batch", "1,2,4")
    assert result.exit_code == 0
    assert "1024 tokens counted, 1024 in all" in result.stderr
    assert "100%  1024 tokens of 1024 tokens" in result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[0] == ["layer", "batch", "1", "batch", "2", "batch", "4"]
    assert [row[0] for row in rows[1:]] == ["0", "1", "mean"]
    assert FILE in read_manifest(model).files
    assert pi2("run", "--model", model, "--raw", "Hi", "-q", "--max-tokens", 1).exit_code == 0
    assert pi2("inspect", model).exit_code == 0


def test_collect_adds_what_is_new_and_force_begins_again(model, text):
    assert json.loads(pi2("collect", model, text, "--tokens", 256, "--json").stdout)["tokens"] == 256
    assert "768 tokens counted, 1024 in all" in pi2("collect", model, text).stderr
    assert "0 tokens counted, 1024 in all" in pi2("collect", model, text).stderr
    assert "128 tokens counted, 128 in all" in pi2("collect", model, text, "--force", "--tokens", 128).stderr
    assert_error(pi2("collect", model, text, "--batch", "1,2"), "other batch sizes", "--output")


def test_collect_json_is_one_object(model, text, tmp_path):
    result = pi2("collect", model, text, "--json", "--output", tmp_path / "s")
    found = json.loads(result.stdout)
    assert set(found) == {"path", "tokens", "sequence", "texts", "batches", "steps", "density"}
    assert found["density"][0][-1] is None  # eight sequences are no batch of 16
    assert 0 < found["density"][0][0] < found["density"][0][1] < 1
    assert not (model / FILE).exists()
    assert Statistics.load(tmp_path / "s").counts.tokens == 1024


def test_ctrl_c_keeps_what_was_counted(model, text, monkeypatch):
    from pi2.collect import Collector

    group = Collector._group

    def stop_at_the_second(self, *args):
        if self.counts.tokens:
            raise KeyboardInterrupt
        group(self, *args)

    monkeypatch.setattr(Collector, "_group", stop_at_the_second)
    result = pi2("collect", model, text, "--batch", "1,4")
    assert result.exit_code == 130
    assert "stopped: 512 tokens are counted; the same command goes on" in result.stderr
    monkeypatch.undo()
    monkeypatch.setenv("PI2_PLUGINS", "")
    assert "512 tokens counted, 1024 in all" in pi2("collect", model, text, "--batch", "1,4").stderr


def test_collect_saves_now_and_then(model, text, monkeypatch):
    monkeypatch.setattr(collect_command, "_SAVE_EVERY", -1.0)
    saved = []
    save = collect_command.Target.save
    monkeypatch.setattr(
        collect_command.Target,
        "save",
        lambda self, **parts: (saved.append(parts["counts"].tokens), save(self, **parts)),
    )
    assert pi2("collect", model, text, "--batch", "2").exit_code == 0
    assert saved == [256, 512, 768, 1024]


def test_collect_says_what_is_wrong(model, text, tmp_path):
    assert_error(pi2("collect", model, text, "--batch", "1,x"), "--batch takes numbers", "1,2,4")
    assert_error(pi2("collect", model, text, "--batch", "2,1"), "do not ascend", "--batch")
    assert_error(pi2("collect", model, tmp_path / "none"), "No such file", "check the path")
    assert_error(pi2("collect", model, text, "--output", tmp_path), "cannot be written", "--output")
    assert_error(pi2("collect", model, text, "--output", tmp_path / "no" / "s"), "cannot be written")
    (model / FILE).write_bytes(b"junk")
    assert_error(pi2("collect", model, text), "cannot be a safetensors file")
    assert pi2("collect", model).exit_code == 2


def test_a_failed_write_is_an_error_with_its_path(tmp_path):
    target = collect_command.Target(tmp_path / "gone" / "s", Statistics(), listed=False)
    with pytest.raises(Pi2Error, match="No such file or directory"):
        target.save(counts=ActivationCounts.empty("m", 1, 1, sequence=1))


def test_eval_prints_a_table_and_a_verdict(toy, text):
    result = pi2("eval", toy, text, "--tokens", 64, "--sequence", 32)
    assert result.exit_code == 0
    assert "lossy" not in result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["layer", "density", "predicted", "recall", "precision", "predictor"]
    assert [line.split()[0] for line in lines[1:4]] == ["0", "1", "mean"]
    assert "lossless    yes" in result.stdout
    assert "64 foreseen, 2 sequences of 32" in result.stdout
    assert "agreement   100.00%" in result.stdout


def test_eval_compares_a_backend_that_rounds_weights_with_the_exact_ones(toy, text):
    """NumPy, which has float32 of everything, stands for one that has not, beside the best there is."""
    options = ("--tokens", 64, "--sequence", 32, "--backend", "numpy", "--json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NumpyBackend, "lossy", "weights are halved")
        result = pi2("eval", toy, text, *options)
    found, exact = json.loads(result.stdout), json.loads(pi2("eval", toy, text, *options).stdout)
    assert (found["lossless"], exact["lossless"]) == (False, True)
    assert found["config"]["losses"] == ["numpy: weights are halved"]
    assert result.stderr.splitlines()[-1] == "lossy: numpy: weights are halved"
    assert found["dense_perplexity"] == pytest.approx(exact["dense_perplexity"], rel=0.01)


def test_eval_says_that_a_lossy_predictor_is_lossy(toy, text):
    options = ("--tokens", 64, "--sequence", 32, "--predictor", "lookahead:margin=0.2")
    result = pi2("eval", toy, text, *options, "--json")
    assert result.stderr.splitlines()[-1] == "lossy: neurons may be missed"
    found = json.loads(result.stdout)
    assert (found["lossless"], found["predictor"], found["scored_tokens"]) == (False, "lookahead", 64)
    assert 0 < found["layers"][1]["recall"] < 1
    assert found["layers"][0]["predicted_density"] == 1
    assert found["perplexity_loss"] == pytest.approx(found["perplexity"] / found["dense_perplexity"] - 1)
    assert "lossless    no: neurons may be missed" in pi2("eval", toy, text, *options).stdout


def test_eval_alone_computes_no_dense_model(toy, text):
    result = pi2("eval", toy, text, "--tokens", 32, "--sequence", 32, "--against", "nothing", "--json")
    found = json.loads(result.stdout)
    assert (found["dense_perplexity"], found["perplexity_loss"], found["agreement"]) == (None, None, None)
    table = pi2("eval", toy, text, "--tokens", 32, "--sequence", 32, "--against", "nothing").stdout
    assert "agreement" not in table


def test_eval_says_what_is_wrong(toy, text, tmp_path):
    assert_error(pi2("eval", toy, text, "--sequence", 1000), "do not suit", "2 to 255 are possible")
    assert_error(pi2("eval", toy, text, "--predictor", "lookahed"), "no 'lookahed'", "'lookahead'")
    assert_error(pi2("eval", toy, tmp_path / "none"), "No such file", "check the path")
    assert pi2("eval", toy, text, "--against", "sparse").exit_code == 2


@pytest.fixture(scope="module")
def silu(tmp_path_factory):
    arch = toy_architecture(activation="silu", max_context=48)
    return write_toy_model(tmp_path_factory.mktemp("silu") / "silu.pi2", arch)


def test_collect_calibrates_thresholds_of_a_model_without_zeros(silu, text):
    result = pi2("collect", silu, text, "--tokens", 141)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["density", "perplexity,", "rule", "product", "perplexity,", "rule", "gate"]
    assert [line.split()[0] for line in lines[1:4]] == ["90%", "80%", "70%"]
    assert lines[-1].startswith("rule gate loses 1 % at a density of ")
    assert "judged on 94 tokens" in result.stderr
    found = json.loads(pi2("collect", silu, text, "--tokens", 141, "--json").stdout)
    assert (set(found), found["tokens"]) == ({"path", "tokens", "texts", "thresholds"}, 94)
    assert found["thresholds"]["product"][0]["density"] == 0.9
    counted = json.loads(pi2("collect", silu, text, "--density", 0.6, "--tokens", 470, "--json").stdout)
    assert sum(layer[0] for layer in counted["density"]) / 2 == pytest.approx(0.6, abs=0.05)
    assert_error(pi2("collect", silu, text, "--density", 0.9), "are of another model, or of other")
    assert_error(pi2("collect", silu, text, "--density", 0.01), "is not within")
    ran = pi2("run", "--model", silu, "--raw", "Hi", "--max-tokens", 2, "--predictor", "threshold", "--json")
    assert (json.loads(ran.stdout)["predictor"], json.loads(ran.stdout)["lossless"]) == ("threshold", False)


def test_counts_and_thresholds_of_a_model_keep_each_other(model, text):
    for options in (("--tokens", 256), ("--thresholds", "--tokens", 768), ("--tokens", 512)):
        assert pi2("collect", model, text, *options).exit_code == 0
    with_both = pi2("collect", model, text, "--tokens", 512, "--force", "--json")
    assert json.loads(with_both.stdout)["tokens"] == 512
    assert pi2("report", model).exit_code == 0
    asked = pi2("eval", model, text, "--predictor", "threshold", "--tokens", 32, "--sequence", 32)
    assert asked.exit_code == 0
    assert "threshold by product" in asked.stdout


def test_ctrl_c_keeps_what_was_judged(silu, text, tmp_path, monkeypatch):
    from pi2.calibrate import Calibration

    perplexity = Calibration._perplexity

    def stop(self, what, visit):
        if what.endswith("80%"):
            raise KeyboardInterrupt
        return perplexity(self, what, visit)

    monkeypatch.setattr(Calibration, "_perplexity", stop)
    options = ("--tokens", 141, "--output", tmp_path / "s")
    result = pi2("collect", silu, text, *options)
    assert result.exit_code == 130
    assert "stopped: what was judged is kept; the same command goes on" in result.stderr
    assert Statistics.load(tmp_path / "s").thresholds.curves["product"].judged == 1
    assert_error(pi2("report", tmp_path / "s"), "has no activation counts", "--density 0.6")
