"""Whole models whose FFNs have rounded weights on the NPU: beside the CPU, compiled ahead, never silently."""

import json

import numpy as np
import pytest
from command_line import pi2
from pi2.api import FfnSpec
from pi2.engine import Engine
from pi2.hybrid import HybridOptions
from pi2.sampling import Sampling
from pi2.testing.models import toy_architecture, write_toy_model
from pi2_backend_qnn import errors, host, requantise
from pi2_backend_qnn.backend import QnnBackend
from pi2_backend_qnn.placed import Ffn
from pi2_backend_qnn.probe import probe
from qnn_models import PROMPT, QNN

pytestmark = pytest.mark.skipif(not probe(), reason=probe().reason)
MODES = tuple(requantise.BITS)


def far(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def round_ffns(engine, weights, cluster=384):
    """Give an engine on NumPy the weights that graphs have."""
    model, placed = engine.model, engine.decoder.ffns._ffns
    spec = FfnSpec(model.geometry, model.architecture.activation)
    for ffn in range(len(placed)):
        meant = host.rounded_ffn(Ffn(bundles=model.bundles(ffn), spec=spec, cluster=cluster, weights=weights))
        placed[ffn] = engine.backend.place_ffn(meant.bundles, meant.spec)


def tokens_of(engine):
    generation = engine.generate(PROMPT, Sampling(max_tokens=6))
    for _ in generation:
        pass
    return generation.stats.tokens


@pytest.mark.parametrize("hot", [0.6, 1.0])
@pytest.mark.parametrize(("weights", "lost"), [("w8a16", 0.03), ("w4a16", 0.5)])
def test_a_model_whose_hot_neurons_are_rounded(model, weights, lost, hot):
    """Prompt and tokens on the NPU; beside the dense model, and, if all is there, the rounded one."""
    with Engine.open(model, backend="numpy", predictor="exact") as engine:
        dense, tokens = engine.logits(PROMPT), tokens_of(engine)
        round_ffns(engine, weights, cluster=32)
        meant, near = engine.logits(PROMPT), tokens_of(engine)
    shared = HybridOptions(hot=hot, most=1.0, cluster=32, prefill="accelerator")
    qnn = f"{QNN},weights={weights}"
    with Engine.open(model, backend=qnn, cold="numpy", predictor="exact", hybrid=shared) as engine:
        session = engine.session()
        logits = [session.logits(PROMPT[:8]), *(session.logits([token]) for token in PROMPT[8:-1])]
        engine.hybrid.set_share(1.0)
        logits = np.concatenate([*logits, session.logits(PROMPT[-1:])])
        assert far(logits, dense) < lost
        if weights == "w8a16":
            assert tokens_of(engine) == tokens
        if hot == 1.0:
            assert far(logits, meant) < QnnBackend.tolerance
            assert tokens_of(engine) == near
        assert not engine.setup()["lossless"]
        assert engine.setup()["config"]["losses"] == engine.notes[:1] == [f"qnn: {requantise.WORDS[weights]}"]


def test_the_default_model_with_int8_finds_the_likeliest_tokens_of_the_dense_one():
    """A prompt whose FFNs are all the emulator's: logits within 8 %, of which int8 itself is all but 1 %."""
    shared = HybridOptions(hot=0.25, prefill="accelerator")
    qnn = "qnn:emulator=on,cluster=384,weights=w8a16"
    with Engine.open("smollm2-relu", backend="numpy", predictor="exact", context=64) as engine:
        ids = engine.encode("The capital of France is Paris, and that of Italy is")[:12]
        dense = engine.logits(ids)
        round_ffns(engine, "w8a16")
        meant = engine.logits(ids)
    with Engine.open(
        "smollm2-relu", backend=qnn, cold="numpy", predictor="exact", context=64, hybrid=shared
    ) as engine:
        got = engine.logits(ids)
    assert (np.linalg.norm(got - meant, axis=1) < 0.01 * np.linalg.norm(meant, axis=1)).all()
    assert (np.linalg.norm(got - dense, axis=1) < 0.08 * np.linalg.norm(dense, axis=1)).all()
    assert np.array_equal(got.argmax(axis=1), dense.argmax(axis=1))


@pytest.mark.parametrize("weights", MODES)
def test_contexts_have_their_weights_and_no_others(tmp_path, weights):
    model = write_toy_model(tmp_path / "model", toy_architecture(n_layers=1), quant="q4_0")
    folder, hot = tmp_path / "contexts", ("--hot", 0.6, "--hybrid", "cluster=32")
    backend = f"qnn:cluster=32,weights={weights}"
    done = pi2("compile", model, "--backend", backend, "--soc", "SM8650", "--out", folder, *hot, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["use"] == f"qnn:contexts={folder},soc=SM8650,weights={weights}"

    def run(options):
        shared = HybridOptions(hot=0.6, cluster=32)
        with Engine.open(
            model, backend=QNN + options, cold="numpy", predictor="exact", hybrid=shared
        ) as engine:
            session = engine.session()
            return np.concatenate([session.logits([token]) for token in PROMPT[:4]])

    loaded, compiled = run(f",weights={weights},contexts={folder}"), run(f",weights={weights}")
    assert loaded.tobytes() == compiled.tobytes()
    for other in {"exact", *MODES} - {weights}:
        with pytest.raises(
            errors.WrongWeights, match=f"has weights={weights}, .* weights={other}"
        ) as refusal:
            run(f",weights={other},contexts={folder}")
        assert f"weights={weights}" in refusal.value.hint


def test_pi2_eval_measures_what_rounding_loses_and_pi2_run_says_it(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The bark of willows. " * 3)
    options = ("--backend", f"{QNN},weights=w4a16", "--cold", "numpy", "--hot", 1.0)
    said = pi2("eval", model, text, "--tokens", 12, "--sequence", 12, *options, "--json")
    assert said.exit_code == 0, said.stderr
    found = json.loads(said.stdout)
    exact = json.loads(pi2("eval", model, text, "--tokens", 12, "--sequence", 12, "--json").stdout)
    assert found["dense_perplexity"] == pytest.approx(exact["perplexity"], rel=1e-3)
    assert abs(found["perplexity_loss"]) > 1e-4
    assert not found["lossless"]
    assert "lossy: qnn: weights are rounded to int4" in said.stderr
    ran = pi2("run", "--model", model, "--raw", "The bark", "--max-tokens", 2, "--greedy", *options)
    assert "lossy: qnn: weights are rounded to int4" in ran.stderr
