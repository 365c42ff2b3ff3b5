"""What training predictors is made of: closed form, thresholds, widths, and what a miss costs."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowrank_toys import BUILTINS, KINDS, write_kinds
from pi2.activity import active_neurons
from pi2.engine import Engine
from pi2.lowrank.closed_form import (
    Weigher,
    closed_form,
    costly_misses,
    density_at,
    labels,
    missed_share,
    threshold_for,
)
from pi2.lowrank.sharing import recall_levels, share_out
from pi2.lowrank.widths import candidates, choose_widths, predictor_bytes
from pi2.tensor import Tensor
from pi2.testing.models import ffn_inputs
from pi2.testing.predictor import spec_of
from pi2.testing.strategies import generators


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_kinds(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_closed_form_is_better_the_wider_it_is(models, kind):
    with Engine.open(models[kind], predictor="exact", plugins=BUILTINS) as engine:
        arch, rng = engine.model.architecture, np.random.default_rng(1)
        x, held = ffn_inputs(arch, 2000, rng), ffn_inputs(arch, 500, rng)
        form = closed_form(engine.model, 0, x, labels(engine.model, 0, x))
        active = labels(engine.model, 0, held)
    named = [density_at(form.layers(width).scores(held), active, 0.95) for width in (8, 24, 48, 64)]
    assert named == sorted(named, reverse=True)
    # all directions: the gate itself, but for what ReLU cuts off; of dReLU there are two gates
    assert named[-1] < (1.1 if not arch.up_relu else 3) * active.mean()


@settings(deadline=None, max_examples=50)
@given(generators, st.floats(0.5, 1), st.floats(0, 1))
def test_the_threshold_is_the_largest_that_reaches_the_recall(rng, recall, density):
    scores = rng.normal(0, 1, (20, 30)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.3] = 0.5  # ties
    active = rng.random(scores.shape) < density
    threshold = np.float32(threshold_for(scores, active, recall))
    if not active.any():
        assert not (scores > threshold).any()
        return
    assert np.mean(scores[active] > threshold) >= recall - 1e-12
    higher = scores[active][scores[active] > threshold].min()  # the next that would change anything
    assert np.mean(scores[active] > higher) < recall or recall == 0


@settings(deadline=None, max_examples=50)
@given(generators, st.integers(1, 20), st.floats(0.5, 8))
def test_widths_stay_within_the_budget_and_go_where_they_help(rng, layers, room):
    steps = candidates(512)
    cost = {w: predictor_bytes(w, 512, 1000, "q4_0") for w in steps}
    falling = np.sort(rng.uniform(0, 1000, (layers, len(steps))), axis=1)[:, ::-1]
    curves = [dict(zip(steps, row.tolist(), strict=True)) for row in falling]
    curves[0] = dict.fromkeys(steps, 900.0)  # width does not help here
    budget = int(room * layers * cost[32])
    widths = choose_widths(curves, cost, 4096, budget)
    assert widths[0] == 32
    assert set(widths) <= set(steps)
    assert sum(cost[w] for w in widths) <= max(budget, layers * cost[32])
    if room > 7 and layers > 3:
        assert max(widths) > 32


def test_what_the_loss_sees_is_what_is_stored():
    import torch
    from pi2.lowrank.fit import _rounded

    values = np.random.default_rng(0).normal(0, 1, (20, 96)).astype(np.float32)
    values[3, 32:64] = 0
    for dtype, off in (("f32", 0), ("f16", 0), ("q8_0", 1), ("q4_0", 1)):  # ties may go either way
        seen = _rounded(torch.tensor(values), dtype).numpy()
        stored = Tensor.from_f32(values, dtype).to_f32()
        assert np.mean(~np.isclose(seen, stored, rtol=1e-6)) <= 0.01 * off


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_missed_neuron_weighs_is_its_share_of_the_output(models, kind):
    with Engine.open(models[kind], predictor="exact", plugins=BUILTINS) as engine:
        model, arch = engine.model, engine.model.architecture
        x = ffn_inputs(arch, 5, np.random.default_rng(0))
        weights = Weigher(model, 1)(x)
        assert np.array_equal(weights > 0, active_neurons(model, 1, x))
        for token, row in zip(x, weights, strict=True):
            active = np.flatnonzero(row)
            assert row[active].mean() == pytest.approx(10, rel=1e-4)
            sizes = []
            for neuron in active:
                out = np.empty((1, arch.d_model), np.float32)
                ids = np.array([neuron], np.int32)
                engine.backend.ffn(
                    engine.backend.place_ffn(model.bundles(1), spec_of(model)), token[None], out, ids
                )
                sizes.append(np.linalg.norm(out))
            share = (row[active] / 10 - 0.1) / 0.9
            assert np.allclose(share, sizes / np.mean(sizes), rtol=1e-3, atol=1e-3)


@settings(deadline=None, max_examples=30)
@given(generators, st.floats(0, 1))
def test_the_missed_share_is_that_of_the_neurons_that_are_not_named(rng, density):
    scores = rng.permutation(60).reshape(3, 20).astype(np.float32)  # no ties
    weights = np.maximum(rng.normal(0, 1, scores.shape), 0).astype(np.float32)
    named = scores >= 60 - max(1, round(density * 60))
    share = np.square(weights[~named]).sum() / np.square(weights).sum()
    assert missed_share(scores, weights, density) == pytest.approx(share, abs=1e-6)
    assert missed_share(scores, weights * 0, density) == 0


@settings(deadline=None, max_examples=50)
@given(generators, st.floats(0.01, 0.5))
def test_a_neuron_that_makes_much_of_a_token_is_never_missed(rng, share):
    weights = np.exp(rng.normal(0, 2, (6, 20))).astype(np.float32)
    named = rng.random(weights.shape) < 0.5
    always = costly_misses(weights, named, share)
    part = np.square(weights) / np.square(weights).sum(axis=1, keepdims=True)
    still_missed = np.where(named | always, 0, part)
    assert still_missed.max() <= share * (1 + 1e-5)
    for neuron in np.flatnonzero(always):
        assert (part[~named[:, neuron], neuron] > share * (1 - 1e-5)).any()  # for a reason


@settings(deadline=None, max_examples=50)
@given(st.floats(0.5, 0.999), st.floats(0.5, 0.9999))
def test_levels_of_recall_rise_and_miss_less_by_the_same_share(lowest, highest):
    levels = np.array(recall_levels(lowest, highest))
    assert levels[0] == lowest
    assert (levels[1:] <= highest).all()
    assert np.allclose((1 - levels[2:]) * 2, 1 - levels[:-2])


@settings(deadline=None, max_examples=100)
@given(generators, st.integers(1, 4), st.integers(1, 5), st.floats(-0.1, 1.1))
def test_misses_are_shared_out_with_the_least_named(rng, layers, levels, share):
    """Where each step of a layer gains less than the one before it, as here, no other choice names fewer."""
    steps = -np.sort(-rng.uniform(0.1, 1, (layers, levels)), axis=1)
    harm = 0.1 + np.flip(np.cumsum(np.flip(steps, axis=1), axis=1), axis=1)
    named = np.cumsum(np.ones_like(harm), axis=1)
    most = share * harm[:, 0].sum()
    at = share_out(harm, named, most)
    rows = np.arange(layers)
    reached = harm[rows, at].sum()
    assert reached <= most or (at == levels - 1).all()
    for choice in itertools.product(range(levels), repeat=layers):
        if harm[rows, choice].sum() <= most:
            assert at.sum() <= sum(choice)
