"""The sparse LM head: exact where it is exact, honest where it is not, hostile files refused."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pi2.config import Settings
from pi2.container import replace_file
from pi2.container.head import HEAD, HeadEstimate
from pi2.engine import Engine
from pi2.errors import FormatError, OptionError
from pi2.plugins import Plugins
from pi2.sampling import Sampling
from pi2.sparse_head import SparseHead, best_ids, final_states, judge_head, use_sparse_head
from pi2.tensor import Tensor
from pi2.testing.models import toy_architecture, write_toy_model
from pi2.train_head import factors, train_head

BUILTINS = {"plugins": Plugins.installed(Settings(plugins=frozenset()))}
VOCAB = toy_architecture().vocab_size


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Rain falls from clouds when drops grow heavy, and 17 birds wait for it to end. " * 40)
    return path


@pytest.fixture(params=["tied", "untied, capped"])
def engine(request, tmp_path, text):
    changes = {} if request.param == "tied" else {"tied": False, "logit_softcap": 5.0, "logit_scale": 0.5}
    path = write_toy_model(tmp_path / "m", toy_architecture(**changes))
    with Engine.open(path, **BUILTINS) as engine:
        estimate = train_head(engine, [text])
        replace_file(path, HEAD, estimate.save)
    with Engine.open(path, **BUILTINS) as engine:
        yield engine


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.integers(1, 45))
def test_best_ids_are_those_of_a_stable_sort(values, k):
    scores = np.array(values, np.float32)
    wanted = np.sort(np.argsort(-scores, kind="stable")[:k])
    assert best_ids(scores, k).tolist() == wanted.tolist()


def test_candidates_have_the_exact_logits_and_the_others_an_estimate(engine, text):
    ids = list(text.read_bytes()[:40])
    exact = engine.logits(ids)
    head = use_sparse_head(engine, 16)
    same = np.isclose(engine.logits(ids), exact, atol=1e-5)
    assert (same.sum(axis=1) >= 16).all()
    assert (same.sum(axis=1) < VOCAB // 2).all()
    states = final_states(engine, [text], 64)[0][1][:5]
    small = states @ head.estimate.basis.T
    estimate = small @ head.estimate.rows.to_f32().T + (states @ head.estimate.mean)[:, None]
    logits = head(states)
    for row, rough, true in zip(logits, estimate, engine.decoder.exact_head(states), strict=True):
        best = np.argsort(-rough)[:16]
        assert np.allclose(row[best], true[best], atol=1e-5)
        others = np.setdiff1d(np.arange(VOCAB), best)
        assert np.allclose(row[others], rough[others], atol=1e-4)


def test_with_every_token_a_candidate_nothing_changes(engine, text):
    ids = list(text.read_bytes()[:20])
    prompt = engine.encode("Rain")
    exact, answer = engine.logits(ids), [p.token for p in engine.generate(prompt, Sampling(max_tokens=9))]
    assert engine.setup()["lossless"]
    use_sparse_head(engine, VOCAB)
    assert np.allclose(engine.logits(ids), exact, atol=1e-5)
    assert [p.token for p in engine.generate(prompt, Sampling(max_tokens=9))] == answer
    setup = engine.setup()
    assert not setup["lossless"]
    assert setup["config"]["head"] == f"sparse: estimate of rank 32, {VOCAB} exact logits"


def test_the_measured_agreement_is_that_of_the_head_in_use(engine, text):
    estimate = HeadEstimate.load(engine.model.path / HEAD, engine.model.architecture, _sha(engine))
    shares = list(estimate.agreement.values())
    assert shares == sorted(shares)
    assert list(estimate.agreement) == [64, 128, 256]
    score = judge_head(engine, [text], 64, 512)
    assert score.agreement == pytest.approx(estimate.agreement[64], abs=0.08)
    assert judge_head(engine, [text], VOCAB, 512).to_json()["kl"] == pytest.approx(0, abs=1e-6)
    kls = [judge_head(engine, [text], k, 256).kl for k in (1, 16, 128)]
    assert kls == sorted(kls, reverse=True)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_no_other_factors_of_the_rank_err_less_on_the_states(seed, rank):
    rng = np.random.default_rng(seed)
    head, states = rng.normal(size=(30, 8)), rng.normal(size=(50, 8)) * np.geomspace(1, 20, 8)

    def error(left, basis):
        return np.square(states @ (head - head @ left @ basis).T).sum()

    left, basis = factors(head.T @ head, states.T @ states / 50, rank)
    best = error(left, basis)
    _, vectors = np.linalg.eigh(head.T @ head)
    plain = vectors[:, ::-1][:, :rank]
    assert best <= error(plain, plain.T) * (1 + 1e-4) + 1e-3
    nudged = left + rng.normal(size=left.shape) * 1e-2
    assert best <= error(nudged, basis) + 1e-3


def _sha(engine):
    return engine.model.manifest.files["dense.safetensors"].sha256


def test_damaged_and_foreign_estimates_are_refused(engine, tmp_path):
    arch, sha = engine.model.architecture, _sha(engine)
    path = engine.model.path / HEAD
    good, whole = HeadEstimate.load(path, arch, sha), path.read_bytes()
    assert good.nbytes == good.rows.data.nbytes + 4 * 33 * 64
    bad = tmp_path / "bad"

    def refuse(content, message, wanted=sha):
        bad.write_bytes(content)
        with pytest.raises(FormatError, match=message) as caught:
            HeadEstimate.load(bad, arch, wanted)
        assert "pi2 train-head" in caught.value.hint

    refuse(whole, "made for other weights", "0" * 64)
    refuse(whole[:-1], "the tensors end")
    refuse(whole.replace(b"pi2 head 1", b"pi2 head 9"), "the format is not")
    refuse(whole.replace(b'"mean"', b'"meen"'), "lacks 'mean'")
    refuse(whole.replace(b'"measured"', b'"measures"'), "lacks 'measured'")
    refuse(whole.replace(b'\\"agreement\\"', b'\\"agreemend\\"'), "lacks 'agreement'")

    def saved(**changes):
        dataclasses.replace(good, **changes).save(bad)
        return bad.read_bytes()

    refuse(saved(basis=good.basis * np.float32(np.inf)), "not finite")
    refuse(saved(basis=good.basis[:31]), "a rank of 31")
    refuse(saved(mean=good.mean[:9]), r"mean is F32 \(9,\)")
    refuse(saved(rows=Tensor(good.rows.data[:5], "q8_0", 32)), "rows is U8")
    dataclasses.replace(good, agreement={1: "x"}).save(bad)
    refuse(bad.read_bytes(), "measurement is malformed")
    with pytest.raises(FormatError, match="no estimate"):
        HeadEstimate.load(tmp_path / "none", arch, sha)


def test_a_head_that_makes_no_sense_is_refused(engine, text, tmp_path):
    estimate = HeadEstimate.load(engine.model.path / HEAD, engine.model.architecture, _sha(engine))
    for k in (0, VOCAB + 1):
        with pytest.raises(OptionError, match="--sparse-head takes a number of tokens"):
            SparseHead(engine, estimate, k)
    for rank in (33, 96):
        with pytest.raises(OptionError, match=f"a rank of {rank} cannot be stored"):
            train_head(engine, [text], rank=rank)
    with pytest.raises(OptionError, match="too short"):
        train_head(engine, [text], tokens=10)
    engine.context = 1
    with pytest.raises(OptionError, match="no room for a token"):
        final_states(engine, [text], 10)


def test_states_that_are_not_finite_reach_the_sampler_as_such(engine):
    head = use_sparse_head(engine, 8)
    logits = head(np.full((1, 64), np.nan, np.float32))
    assert np.isnan(logits).all()


def test_a_budget_and_a_sparse_head_exclude_each_other(engine):
    engine.offloaded = object()
    with pytest.raises(OptionError, match="does not go with --memory"):
        use_sparse_head(engine, 8)
    engine.offloaded = None


def test_a_failure_while_states_are_taken_leaves_the_head_in_place(engine, text, monkeypatch):
    use_sparse_head(engine, 8)
    kept = engine.decoder.head
    monkeypatch.setattr(engine.decoder, "forward", lambda *a, **k: json.loads("{"))
    with pytest.raises(ValueError, match="Expecting"):
        final_states(engine, [text], 64)
    assert engine.decoder.head is kept
