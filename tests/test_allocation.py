"""Cuts: quantiles of what was counted, and the least harmful ones of all layers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pi2.allocation import (
    BINS,
    bounded,
    energy_below,
    energy_cuts,
    greedy_cuts,
    histogram,
    uniform_cuts,
)

BIN = 2 ** (1 / 64)


def scores_of(seed, layers=3, n=400):
    """Layers of very different scales, with some zeros."""
    rng = np.random.default_rng(seed)
    scores = np.exp(rng.normal(0, 2, (layers, n)) + rng.normal(0, 3, (layers, 1)))
    return np.where(rng.random((layers, n)) < 0.1, 0, scores).astype(np.float32)


def counted(scores):
    return np.stack([histogram(row) for row in scores])


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1 << 32), st.floats(0.01, 0.99))
def test_a_uniform_cut_is_the_quantile_to_within_a_bin(seed, share):
    scores = scores_of(seed)
    for row, cut in zip(scores, uniform_cuts(counted(scores), share), strict=True):
        assert (row < cut * (1 - 1e-5)).mean() <= share + 1e-9
        assert (row <= cut * BIN * (1 + 1e-5)).mean() >= share


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1 << 32), st.floats(0.05, 0.95))
def test_no_other_cuts_of_that_density_do_less_harm_than_the_greedy_ones(seed, share):
    scores = scores_of(seed)
    sensitivity = np.exp(np.random.default_rng(seed).normal(0, 2, len(scores)))
    harm = sensitivity[:, None] * np.square(scores.astype(np.float64))
    cuts = greedy_cuts(counted(scores), sensitivity, share)
    left_out = scores < cuts[:, None] * (1 - 1e-5)
    n = int(left_out.sum())
    assert n <= share * scores.size + 1e-9
    least = np.sort(harm.ravel())[:n].sum()
    assert harm[left_out].sum() <= least * BIN**4 + 1e-12
    one_more = scores <= cuts[:, None] * BIN**2 * (1 + 1e-5)
    assert one_more.mean() >= share


def test_layers_of_equal_scores_and_sensitivity_are_cut_alike():
    scores = np.tile(np.linspace(0.1, 9, 300, dtype=np.float32), (4, 1))
    greedy = greedy_cuts(counted(scores), np.ones(4), 0.4)
    assert np.array_equal(greedy, uniform_cuts(counted(scores), 0.4))


def test_odd_scores_have_a_bin_and_zeros_alone_cut_nothing():
    odd = histogram(np.array([0, 1e-38, 1e38, np.inf, np.nan], np.float32))
    assert (odd.sum(), odd[0], odd[-1]) == (5, 2, 3)
    zeros = histogram(np.zeros(10, np.float32))[None]
    assert uniform_cuts(zeros, 0.5) == greedy_cuts(zeros, np.ones(1), 0.5) == [0]
    cuts = energy_cuts(zeros, 0.5)
    assert (cuts, energy_below(zeros, cuts)) == ([0], [0])
    assert len(odd) == BINS


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1 << 32), st.floats(0.01, 0.9))
def test_an_energy_cut_leaves_out_the_energy_that_it_says(seed, share):
    scores = scores_of(seed)
    histograms = counted(scores)
    squares = np.square(scores.astype(np.float64))
    cuts = energy_cuts(histograms, share)
    for row, cut, energy in zip(squares, cuts, energy_below(histograms, cuts), strict=True):
        assert energy == pytest.approx(row[np.sqrt(row) < cut * (1 - 1e-5)].sum(), rel=0.03, abs=1e-9)
        assert energy <= share * row.sum() * 1.03


def test_what_was_not_measured_counts_as_the_median():
    assert bounded(np.array([1, np.nan, 4, 0, 16.0])).tolist() == [1, 4, 4, 4, 16]
    assert bounded(np.array([np.nan, 0])).tolist() == [1, 1]
    assert bounded(np.array([1, 1, 1e9])).tolist() == [1, 1, 4096]
