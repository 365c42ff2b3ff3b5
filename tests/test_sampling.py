"""Sampling against a slow reference, the formulae of transformers, and hostile parameters."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pi2.errors import OptionError, Pi2Error
from pi2.sampling import Sampler, Sampling

SIZE = 24
LOGITS = hnp.arrays(np.float32, SIZE, elements=st.floats(-20, 20, width=32))
COARSE = hnp.arrays(np.float32, SIZE, elements=st.integers(-3, 3).map(float))  # many equal logits
HISTORY = st.lists(st.integers(0, SIZE - 1), max_size=40)
quick = settings(deadline=None, max_examples=150)


def keep(logits, params):
    """Step by step as the docstring says, over Python floats; None where a border is too close to call."""
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if params.top_k:
        ranked = ranked[: params.top_k]
    top = logits[ranked[0]]
    weights = [math.exp((logits[i] - top) / params.temperature) for i in ranked]
    total, before, kept = math.fsum(weights), 0.0, []
    for i, weight in zip(ranked, weights, strict=True):
        if kept and params.top_p < 1 and before >= params.top_p * total:
            break
        if kept and abs(before - params.top_p * total) < 1e-9 * total and params.top_p < 1:
            return None
        before += weight
        kept.append((i, weight))
    if any(abs(w - params.min_p) < 1e-9 for _, w in kept):
        return None
    return {i: w for i, w in kept if w >= params.min_p}


@quick
@given(
    logits=st.one_of(LOGITS, COARSE),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, SIZE + 2),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
)
def test_the_kept_tokens_and_their_probabilities_are_those_of_the_slow_reference(
    logits, temperature, top_k, top_p, min_p
):
    params = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=0)
    expected = keep([float(v) for v in logits], params)
    assume(expected is not None)
    ids, probabilities = Sampler(params, SIZE).distribution(logits, [])
    assert ids.tolist() == list(expected)  # the same order too: most probable first, equals by id
    total = math.fsum(expected.values())
    np.testing.assert_allclose(probabilities, [w / total for w in expected.values()], rtol=1e-9)


@quick
@given(
    logits=LOGITS,
    history=HISTORY.filter(bool),
    penalty=st.floats(0.1, 3),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    window=st.integers(1, 50),
)
def test_penalties_follow_their_published_formulae(logits, history, penalty, presence, frequency, window):
    params = Sampling(
        temperature=1,
        repetition_penalty=penalty,
        presence_penalty=presence,
        frequency_penalty=frequency,
        penalty_window=window,
        seed=0,
    )
    expected = [float(v) for v in logits]
    recent = history[-window:]
    for token in set(recent):
        value = expected[token]
        value = value * penalty if value < 0 else value / penalty
        expected[token] = value - presence - frequency * recent.count(token)
    ids, probabilities = Sampler(params, SIZE).distribution(logits, history)
    weights = np.exp(np.array(expected) - max(expected))
    np.testing.assert_allclose(probabilities, (weights / weights.sum())[ids], rtol=1e-9, atol=1e-300)


def test_keep_sets_and_penalties_agree_with_transformers():
    import torch
    from transformers.generation import logits_process as processors

    rng = np.random.default_rng(0)
    for _ in range(50):
        logits = rng.normal(0, 3, 300).astype(np.float32)
        history = rng.integers(0, 300, 20).tolist()
        k, p, m = int(rng.integers(1, 300)), float(rng.uniform(0.1, 1)), float(rng.uniform(0, 0.3))
        temperature, penalty = float(rng.uniform(0.2, 2)), float(rng.uniform(0.5, 2))
        scores, seen = torch.tensor(logits)[None], torch.tensor([history])
        for step in (
            processors.RepetitionPenaltyLogitsProcessor(penalty),
            processors.TemperatureLogitsWarper(temperature),
            processors.TopKLogitsWarper(k),
            processors.TopPLogitsWarper(p),
            processors.MinPLogitsWarper(m),
        ):
            scores = step(seen, scores)
        theirs = torch.softmax(scores[0].double(), 0).numpy()
        params = Sampling(
            temperature=temperature, top_k=k, top_p=p, min_p=m, repetition_penalty=penalty, seed=0
        )
        ids, ours = Sampler(params, 300).distribution(logits, history)
        assert set(ids) == set(np.flatnonzero(theirs))
        np.testing.assert_allclose(ours, theirs[ids], rtol=1e-4)


@quick
@given(logits=st.one_of(LOGITS, COARSE), seed=st.integers(0, 2**64))
def test_a_seed_reproduces_every_choice(logits, seed):
    params = Sampling(temperature=0.8, seed=seed)
    one, two = Sampler(params, SIZE), Sampler(params, SIZE)
    assert [one(logits, []) for _ in range(10)] == [two(logits, []) for _ in range(10)]


def test_a_seed_drawn_by_the_sampler_reproduces_it_too():
    logits = np.zeros(1000, np.float32)
    first = Sampler(Sampling(temperature=1), 1000)
    again = Sampler(Sampling(temperature=1, seed=first.seed), 1000)
    other = Sampler(Sampling(temperature=1), 1000)
    drawn = [[s(logits, []) for _ in range(20)] for s in (first, again, other)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_frequencies_follow_the_distribution():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(Sampling(temperature=1, seed=7), 4)
    counts = np.bincount([sampler(logits, []) for _ in range(20000)], minlength=4)
    np.testing.assert_allclose(counts / 20000, [0.5, 0.3, 0.15, 0.05], atol=0.015)


@quick
@given(logits=COARSE, k=st.integers(1, SIZE))
def test_greedy_takes_the_lowest_id_of_equals_and_leaves_the_logits_alone(logits, k):
    before = logits.copy()
    best = int(np.flatnonzero(logits == logits.max())[0])
    assert Sampler(Sampling(), SIZE)(logits, []) == best
    assert Sampler(Sampling(temperature=1, top_k=1, seed=0), SIZE)(logits, []) == best
    ids, _ = Sampler(Sampling(temperature=1, top_k=k, seed=0), SIZE).distribution(logits, [])
    assert ids.tolist() == sorted(range(SIZE), key=lambda i: (-logits[i], i))[:k]
    np.testing.assert_array_equal(logits, before)


def test_a_temperature_close_to_zero_is_greedy_not_an_overflow():
    logits = np.array([-1e30, 3, 1e30, 2], np.float32)
    assert Sampler(Sampling(temperature=1e-300, seed=0), 4)(logits, []) == 2


def test_bias_moves_and_forbids_tokens_before_everything_else():
    logits = np.array([0, 1, 2], np.float32)
    assert Sampler(Sampling(logit_bias={2: -math.inf}), 3)(logits, []) == 1
    assert Sampler(Sampling(logit_bias={0: 5}), 3)(logits, []) == 0
    only = Sampler(Sampling(logit_bias={2: -math.inf, 1: -math.inf}, temperature=1, seed=0), 3)
    assert {only(logits, []) for _ in range(20)} == {0}


def test_the_bias_cannot_be_changed_from_outside():
    bias = {1: 2.0}
    params = Sampling(logit_bias=bias)
    bias[1] = math.nan
    assert params.logit_bias == {1: 2.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_are_an_error(bad, temperature):
    logits = np.full(8, bad, np.float32)
    with pytest.raises(Pi2Error, match="not finite"):
        Sampler(Sampling(temperature=temperature, seed=0), 8)(logits, [])
    if bad != -math.inf:  # one is enough, but a forbidden token is none
        logits = np.array([0, 1, bad], np.float32)
        with pytest.raises(Pi2Error, match="not finite"):
            Sampler(Sampling(temperature=temperature, seed=0), 3)(logits, [])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": -1}, "temperature is between 0 and"),
        ({"temperature": math.nan}, "temperature is between"),
        ({"temperature": "hot"}, "temperature is a number"),
        ({"temperature": True}, "temperature is a number"),
        ({"top_k": -1}, "top-k is between"),
        ({"top_k": 1.5}, "top-k is a whole number"),
        ({"top_p": 1.1}, "top-p is between 0 and 1, not 1.1"),
        ({"top_p": 0}, "top-p cannot be 0"),
        ({"min_p": -0.1}, "min-p is between"),
        ({"repetition_penalty": 0}, "repetition-penalty cannot be 0"),
        ({"presence_penalty": math.inf}, "presence-penalty is between"),
        ({"frequency_penalty": None}, "frequency-penalty is a number"),
        ({"penalty_window": 0}, "penalty-window is between"),
        ({"seed": -1}, "seed is between"),
        ({"seed": 1.0}, "seed is a whole number"),
        ({"max_tokens": 0}, "max-tokens is between 1 and"),
        ({"logit_bias": [1]}, "logit-bias maps"),
        ({"logit_bias": {-1: 0.0}}, "names token -1"),
        ({"logit_bias": {"a": 0.0}}, "names token 'a'"),
        ({"logit_bias": {1: math.nan}}, "token 1 cannot be nan"),
        ({"logit_bias": {1: math.inf}}, "token 1 cannot be inf"),
        ({"logit_bias": {1: "x"}}, "token 1 cannot be 'x'"),
        ({"stop": "end"}, "stop is a sequence"),
        ({"stop": ("",)}, "not empty"),
        ({"stop": (3,)}, "not empty"),
    ],
)
def test_unusable_parameters_are_refused(given, message):
    with pytest.raises(OptionError, match=message):
        Sampling(**given)


def test_a_bias_beyond_the_vocabulary_is_refused():
    with pytest.raises(OptionError, match="token 8, but the vocabulary ends at 7"):
        Sampler(Sampling(logit_bias={8: 1.0}), 8)
