"""Relufication of toy models: it learns, grows sparse, goes on after a stop, refuses what it cannot do."""

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pi2
import pytest
import torch
from pi2.builtin.mmap_tier import MmapTier
from pi2.config import Settings as Environment
from pi2.container import open_model
from pi2.container.layout import QuantPlan
from pi2.engine import Engine
from pi2.errors import Pi2Error
from pi2.plugins import Plugins
from pi2.relufy import open_relufication
from pi2.relufy.corpus import ANSWER, VERBATIM
from pi2.relufy.distil import Distiller
from pi2.relufy.workplace import CHECKPOINT, workplace_path
from relufy_texts import LoudSource, quick, run, silu_source, write_texts, written
from sources import contents

PATHS = [str(Path(pi2.__file__).parent.parent), str(Path(__file__).parent)]


@pytest.fixture
def texts(tmp_path):
    return write_texts(tmp_path)


def weights(path):
    """What a model's files hold, but for the times in its manifest."""
    return {name: data for name, data in contents(path).items() if name.endswith(".safetensors")}


@pytest.fixture(autouse=True)
def one_thread():
    """Two that wait for each other take ten times as long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def losses(work, settings):
    """Of the twin as it is, on the same rows each time."""
    sampler = work._sampler(99)
    distiller = Distiller(work._original, work._twin, sampler, settings)
    rows = [sampler.next() for _ in range(6)]
    found = [distiller._loss(work._twin.network(), row, np.random.default_rng(0), 0.0)[1] for row in rows]
    return {name: np.mean([f[name] for f in found]) for name in ("kl", "mse", "density")}


def test_the_twin_is_sparser_and_nearer_to_the_original_than_without_training(tmp_path, texts):
    settings, found = quick(tokens=6000, density=0.25), {}
    with open_relufication(LoudSource(), texts, tmp_path / "m", settings) as work:
        work.compare()
        found["swapped"] = losses(work, settings)
        work.refit()
        found["refitted"] = losses(work, settings)
        assert work.distil()
        found["twin"] = losses(work, settings)
        path = work.write()
        report = work.report
    assert found["refitted"]["mse"] < 0.2 * found["swapped"]["mse"]
    assert found["refitted"]["kl"] < 0.2 * found["swapped"]["kl"]
    assert found["twin"]["kl"] < 0.8 * found["swapped"]["kl"]
    assert found["twin"]["density"] < 0.32 < 0.45 < found["swapped"]["density"]
    assert report.stages["original"]["zeros"] == 0
    assert report.stages["twin"]["zeros"] > 0.68 > 0.55 > report.stages["swapped"]["zeros"]
    assert path == tmp_path / "m"
    assert not workplace_path(path).exists()


def test_distillation_without_a_refit_and_a_push_nears_the_original(tmp_path, texts):
    settings = quick(density=0.6, density_push=0.02, tokens=6000, lr=1e-3, refit_tokens=0)
    with open_relufication(LoudSource(), texts[:1], tmp_path / "m", settings) as work:
        swapped = losses(work, settings)
        work.distil()
        twin = losses(work, settings)
    assert twin["kl"] < 0.5 * swapped["kl"]


@pytest.mark.parametrize("quant", ["q4_0", "f32"])
def test_the_report_is_true_of_the_model_that_was_written(tmp_path, texts, quant):
    settings = quick(quant=QuantPlan.named(quant), tokens=1500)
    source = silu_source(tied=False, ffn_bias=True)
    with open_relufication(source, texts, tmp_path / "m", settings) as work:
        work.compare()
        work.refit()
        work.distil()
        work.write()
        report, held_out = work.report, work._held_out
    with Engine.open(tmp_path / "m", plugins=Plugins.installed(Environment(plugins=frozenset()))) as engine:
        assert engine.model.architecture == dataclasses.replace(source.architecture, activation="relu")
        nll, tokens = 0.0, 0
        for row in (row for rows in held_out.values() for row in rows):
            logits = engine.logits(row.ids.tolist())[:-1].astype(np.float64)
            log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            nll -= log_p[np.arange(len(log_p)), row.ids[1:]].sum()
            tokens += len(log_p)
        count = engine.decoder.ffn_count
        notes = engine.model.manifest.notes
    assert np.exp(nll / tokens) == pytest.approx(report.stages["twin"]["perplexity"], rel=1e-3)
    assert 1 - count.active / count.total == pytest.approx(report.stages["twin"]["zeros"], abs=2e-3)
    assert any("relufied from silu: distilled on" in note for note in notes)
    assert any(
        f"twin {report.stages['twin']['zeros']:.1%}" in note.replace("distilled", "twin") for note in notes
    )


def test_a_training_that_was_stopped_ends_as_one_that_was_not(tmp_path, texts):
    run(tmp_path / "a", texts)
    assert run(tmp_path / "b", texts, stop_after=30) is None
    assert (workplace_path(tmp_path / "b") / CHECKPOINT).exists()
    assert not (tmp_path / "b").exists()
    assert run(tmp_path / "b", texts, stop_after=20) is None
    run(tmp_path / "b", texts)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


# Trains in a process of its own, and kills itself at the n-th call of fsync or rename: 2 is n.
CHILD = f"""
import os, signal, sys
from pathlib import Path
sys.path[:0] = {PATHS!r}
from relufy_texts import quick, silu_source
from pi2.relufy import open_relufication

calls = 0
def counted(real):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call
os.fsync, Path.replace = counted(os.fsync), counted(Path.replace)
settings = quick(tokens=400, checkpoint_s=0.0)
with open_relufication(silu_source(), list(map(Path, sys.argv[3:])), Path(sys.argv[1]), settings) as work:
    work.compare(), work.refit(), work.distil(), work.write()
"""


# Two reports, two calls for each of two layers, a report; then three calls for each of ten steps.
@pytest.mark.parametrize("moment", [5, 23], ids=["in the refit", "in the distillation"])
def test_a_training_that_was_killed_goes_on_to_the_same_end(tmp_path, texts, moment):
    settings, path = quick(tokens=400, checkpoint_s=0.0), tmp_path / "killed"
    command = [sys.executable, "-c", CHILD, str(path), str(moment), *map(str, texts)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not path.exists()
    assert (workplace_path(path) / CHECKPOINT).exists() == (moment > 7)
    run(path, texts, settings)
    run(tmp_path / "whole", texts, settings)
    assert weights(path) == weights(tmp_path / "whole")


def test_two_workers_train_too_and_their_failure_is_heard(tmp_path, texts, monkeypatch):
    settings = quick(workers=2, refit_tokens=0, density=0.3)
    report = run(tmp_path / "m", texts, settings)
    assert report.tokens >= 3000
    assert "refitted" not in report.stages
    assert report.stages["twin"]["zeros"] > report.stages["swapped"]["zeros"] + 0.05

    def fail(self, leaves, row, found):
        raise Pi2Error("no")

    monkeypatch.setattr(Distiller, "_apply", fail)
    with pytest.raises(Pi2Error, match="no"):
        run(tmp_path / "n", texts, settings)


def test_more_tokens_go_on_from_a_checkpoint_that_was_kept(tmp_path, texts):
    first = run(tmp_path / "m", texts, keep=True)
    again = run(tmp_path / "m", texts, quick(tokens=4000), overwrite=True)
    assert first.tokens < again.tokens < 4200
    assert open_model(tmp_path / "m", MmapTier()).architecture.activation == "relu"
    assert not workplace_path(tmp_path / "m").exists()


def test_a_twin_that_was_made_before_is_trained_further(tmp_path, texts):
    source = LoudSource()
    first = run(tmp_path / "a", texts, source=source)
    start = written(tmp_path / "a")
    report = run(tmp_path / "b", texts, quick(density=0.2), source, start=start)
    assert set(report.stages) == {"original", "started", "twin"}
    assert report.stages["original"] == first.stages["original"]
    assert report.stages["started"]["perplexity"] == pytest.approx(first.stages["twin"]["perplexity"])
    assert report.stages["started"]["zeros"] == pytest.approx(first.stages["twin"]["zeros"], abs=1e-3)
    assert report.stages["twin"]["zeros"] > report.stages["started"]["zeros"] + 0.02
    notes = written(tmp_path / "b").notes
    assert [note.split(":")[0] for note in notes] == 2 * [
        "relufied from silu",
        f"perplexity on {first.held_out_tokens} held-out tokens of plain.txt, chat.jsonl",
        "exact zeros there",
    ]


def test_what_was_not_trained_is_the_original_s(tmp_path, texts):
    run(tmp_path / "a", texts, quick(tokens=100, quant=QuantPlan.named("q4_0", embed="q4_0")))
    with open_relufication(
        silu_source(),
        texts,
        tmp_path / "b",
        quick(quant=QuantPlan.named("f32")),
        start=written(tmp_path / "a"),
    ) as work:
        weights = work._twin.network().weights
    assert np.array_equal(weights["embed.weight"].numpy(), silu_source().tensor("embed.weight").to_f32())
    gate = written(tmp_path / "a").tensor("layers.1.ffn.gate.weight").to_f32()
    assert np.array_equal(weights["layers.1.ffn.gate.weight"].numpy(), gate)


def test_the_loss_in_bfloat16_is_nearly_that_in_float32(tmp_path, texts):
    with open_relufication(LoudSource(), texts, tmp_path / "m", quick(bf16=True)) as work:
        distiller = Distiller(work._original, work._twin, work._sampler(9), quick())
        row = work._sampler(9).next()
        with torch.autocast("cpu", torch.bfloat16):
            near, _ = distiller._loss(work._twin.network(), row, np.random.default_rng(0), 1.0)
        true, _ = distiller._loss(work._twin.network(), row, np.random.default_rng(0), 1.0)
        assert near.dtype == torch.float32
        assert float(near) == pytest.approx(float(true), rel=0.05)
        assert float(near) != float(true)
        work.compare()
        before = losses(work, quick())
        work.refit()
        assert work.distil()
        assert losses(work, quick())["kl"] < 0.8 * before["kl"]


def test_the_texts_themselves_count_as_much_as_is_asked(tmp_path, texts):
    with open_relufication(LoudSource(), texts, tmp_path / "m", quick(sequence=256)) as work:
        sampler, network = work._sampler(9), work._twin.network()
        sampler.next()  # plain text
        row = sampler.next()  # conversations
        with torch.no_grad():
            found = {
                weight: float(
                    Distiller(work._original, work._twin, work._sampler(9), quick(text_weight=weight))._loss(
                        network, row, np.random.default_rng(0), 0.0
                    )[0]
                )
                for weight in (0.0, 0.5)
            }
            log_p = torch.log_softmax(network.logits(network.trace(row).streams[-1]), -1).numpy()
    at = [
        i for i in range(len(row.ids) - 1)
        if row.documents[i] == row.documents[i + 1] and row.answers[i] == 0
    ]  # fmt: skip
    nll = -np.mean([log_p[i, row.ids[i + 1]] for i in at])
    assert 0 < len(at) < len(row.ids) - 1
    assert found[0.5] - found[0.0] == pytest.approx(0.5 * nll, rel=1e-3)


def test_minutes_bound_a_training(tmp_path, texts):
    report = run(tmp_path / "m", texts, quick(tokens=None, minutes=0.01))
    assert 0.5 < report.train_s < 20


def test_gemma_and_ungated_models_have_twins_too(tmp_path, texts):
    gemma = {"activation": "gelu_tanh", "norm_place": "sandwich", "qk_norm": True, "window": 9}
    opt = {"activation": "gelu", "gated": False, "ffn_bias": True, "norm": "layer", "norm_bias": True}
    post = {"activation": "gelu", "norm_place": "post", "rope": None, "final_norm": False}
    for i, changes in enumerate((gemma, opt, post)):
        report = run(tmp_path / str(i), texts, quick(tokens=2000), silu_source(**changes))
        assert report.stages["twin"]["zeros"] > report.stages["swapped"]["zeros"] + 0.05


def test_answers_of_conversations_are_known(tmp_path, texts):
    with open_relufication(silu_source(), texts, tmp_path / "m", quick()) as work:
        (chat,) = (text for text in work._corpus if text.whole)
        for number, kind in ((0, ANSWER), (3, VERBATIM)):
            document = chat.documents[number]
            answered = np.flatnonzero(document.answers) + 1
            assert (
                work._tokenizer.decode(document.ids[answered], special=True) == f"{number} is {number}.</s>"
            )
            assert set(document.answers[answered - 1]) == {kind}
        (plain,) = (text for text in work._corpus if not text.whole)
        held_out = np.concatenate([d.ids for d in plain.held_out])
        text = texts[0].read_text()
        assert text.endswith(work._tokenizer.decode(held_out))
        assert work._tokenizer.decode(plain.documents[0].ids) == text[: -len(held_out)]
