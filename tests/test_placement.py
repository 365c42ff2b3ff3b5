"""Neurons in another order: the same model, read in fewer pieces."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pi2.activation_counts import ActivationCounts
from pi2.builtin.mmap_tier import MmapTier
from pi2.container import open_model
from pi2.container.layout import NEURONS
from pi2.container.predictors import PREDICTORS, FfnPredictor, Predictors, model_predictors
from pi2.container.writer import replace_file
from pi2.engine import Engine
from pi2.placement import place_model, reading_order, reads
from pi2.statistics_file import STATISTICS, Statistics
from pi2.tensor import Tensor, encode
from pi2.testing.models import toy_architecture, write_toy_model
from pi2.testing.plugin import examples
from typer.testing import CliRunner

TEXT = "a" * 64  # stands for a checksum


@examples(60)
@given(neurons=st.integers(1, 60), tokens=st.integers(0, 20), seed=st.integers(0, 99))
def test_an_order_names_every_neuron_once(neurons, tokens, seed):
    rng = np.random.default_rng(seed)
    active = rng.random((tokens, neurons)) < 0.3
    order = reading_order(rng.random(neurons), active)
    assert np.array_equal(np.sort(order), np.arange(neurons))


def test_neurons_that_fire_together_come_to_lie_together():
    rng = np.random.default_rng(0)
    teams = rng.permutation(64) % 8
    fires = rng.random((200, 8)) < 0.2
    active = fires[:, teams]
    order = reading_order(np.full(64, 0.2), active)
    nobody = np.zeros(64, np.bool_)
    assert np.count_nonzero(np.diff(teams[order])) == 7
    assert reads(active[:, order], nobody) < reads(active, nobody) / 3


@pytest.mark.parametrize(
    ("active", "resident", "expected"),
    [([[1, 1, 0, 1]], [0, 0, 0, 0], 2), ([[1, 1, 1, 1]], [0, 1, 0, 0], 2), ([[0, 0, 0, 0]], [0] * 4, 0),
     ([[1, 1, 1, 1], [1, 0, 0, 0]], [0] * 4, 1)],
)  # fmt: skip
def test_reads_are_runs_of_neighbours_that_are_missing(active, resident, expected):
    assert reads(np.array(active, np.bool_), np.array(resident, np.bool_)) == expected


def make(path, **changes):
    """A toy model with statistics and predictors that were made up, and its logits."""
    arch = toy_architecture(**changes)
    write_toy_model(path, arch)
    tier = MmapTier.open()
    model = open_model(path, tier)
    sha = model.manifest.files[NEURONS].sha256
    rng = np.random.default_rng(1)
    counts = ActivationCounts.empty(sha, arch.n_layers, arch.n_neurons, sequence=4, batches=(1,))
    sets = rng.random((arch.n_layers, 2, 4, arch.n_neurons)) < rng.random(arch.n_neurons)
    for layer, active in enumerate(sets):
        counts.add(layer, active)
    counts.finish_group(TEXT, 2)
    packed = np.packbits(sets.reshape(arch.n_layers, 8, -1), axis=2)
    counts.sketch = type(counts.sketch).of_tokens(TEXT, 0, packed, arch.n_neurons)
    replace_file(path, STATISTICS, Statistics(counts).save)
    layers = {
        layer: FfnPredictor(
            Tensor(
                encode(rng.standard_normal((32, arch.d_model), dtype=np.float32), "f32"), "f32", arch.d_model
            ),
            np.zeros(32, np.float32),
            Tensor(encode(rng.standard_normal((arch.n_neurons, 32), dtype=np.float32), "f32"), "f32", 32),
            np.arange(arch.n_neurons, dtype=np.float32),
            0.0,
        )
        for layer in range(arch.n_layers)
    }
    replace_file(path, PREDICTORS, Predictors(sha, layers).save)
    tier.close()


def logits(path):
    with Engine.open(path, backend="numpy", predictor="exact", storage="mmap") as engine:
        return engine.logits([1, 2, 3, 4])


@pytest.mark.parametrize("changes", [{}, {"gated": False, "ffn_bias": True}], ids=["gated", "biased"])
def test_a_placed_model_computes_the_same(tmp_path, changes):
    make(tmp_path / "model", **changes)
    done = CliRunner().invoke(app(), ["place", str(tmp_path / "model"), str(tmp_path / "placed"), "--json"])
    assert done.exit_code == 0, done.output
    np.testing.assert_allclose(logits(tmp_path / "model"), logits(tmp_path / "placed"), rtol=1e-4, atol=1e-5)


def app():
    from pi2.cli.app import app

    return app


def test_bundles_statistics_and_predictors_move_together(tmp_path):
    make(tmp_path / "model")
    tier = MmapTier.open()
    before = open_model(tmp_path / "model", tier)
    found = Statistics.of_file(before.path / STATISTICS, before.manifest.files[NEURONS].sha256)
    placement = place_model(before, tmp_path / "placed")
    after = open_model(tmp_path / "placed", tier, verify=True)
    sha = after.manifest.files[NEURONS].sha256
    moved = Statistics.of_file(after.path / STATISTICS, sha).counts
    old, new = (model_predictors(model.path, model.architecture) for model in (before, after))
    assert after.geometry == before.geometry
    for layer, order in enumerate(placement.orders):
        assert np.array_equal(after.bundles(layer), before.bundles(layer)[order])
        assert np.array_equal(moved.counts[layer], found.counts.counts[layer][:, order])
        assert np.array_equal(moved.sketch.active(layer), found.counts.sketch.active(layer)[:, order])
        assert np.array_equal(new.layers[layer].fc2.data, old.layers[layer].fc2.data[order])
        assert np.array_equal(new.layers[layer].fc2_bias, old.layers[layer].fc2_bias[order])
    tier.close()


def test_a_model_without_statistics_is_refused_with_the_command_that_makes_them(tmp_path):
    write_toy_model(tmp_path / "model", toy_architecture())
    done = CliRunner().invoke(app(), ["place", str(tmp_path / "model"), str(tmp_path / "placed")])
    assert done.exit_code == 1
    assert "pi2 collect" in done.output
    assert not (tmp_path / "placed").exists()
