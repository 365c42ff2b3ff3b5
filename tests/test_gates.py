"""Gates in memory, margins for rounding, and the residual stream carried to the next layer."""

import numpy as np
import offload_models as toys
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pi2.activity import active_neurons
from pi2.builtin.exact_predictor import ExactPredictor
from pi2.builtin.mmap_tier import MmapTier
from pi2.builtin.numpy_backend import NumpyBackend
from pi2.container.reader import open_model
from pi2.gates import gate_matrix, maybe_active, rounding, row_norms
from pi2.powers import SupportsOffload
from pi2.residual import FfnInputs
from pi2.tensor import Tensor
from pi2.testing.models import ffn_inputs


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_two_orders_of_a_sum_differ_by_less_than_the_margin(d, seed, scale):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(1, d)) * scale).astype(np.float32)
    rows = rng.normal(size=(20, d)).astype(np.float32)
    order = rng.permutation(d)
    straight = np.cumsum(rows * x, axis=1, dtype=np.float32)[:, -1]
    shuffled = np.cumsum((rows * x)[:, order], axis=1, dtype=np.float32)[:, -1]
    margin = rounding(x, row_norms(Tensor.from_f32(rows)))[0]
    assert (np.abs(straight - shuffled) <= margin).all()
    assert (margin <= 1e-3 * np.linalg.norm(x) * np.linalg.norm(rows, axis=1)).all()


@pytest.mark.parametrize("name", ["relu", "drelu", "no gate", "biased"])
@pytest.mark.parametrize("backend", toys.BACKENDS)
def test_the_exact_predictor_on_flash_misses_nothing_and_names_little_more(name, backend):
    arch, tier = toys.ARCHITECTURES[name], MmapTier()
    model, predictor = open_model(toys.model(name), tier), ExactPredictor()
    assert isinstance(predictor, SupportsOffload)
    assert predictor.offloaded_bytes(model) >= arch.n_layers * gate_matrix(model, 0).data.nbytes
    predictor.attach_offloaded(model, toys.part("backends", backend))
    x = ffn_inputs(arch, 30, np.random.default_rng(3))
    for ffn in range(arch.n_layers):
        named = np.zeros((30, arch.n_neurons), np.bool_)
        for row in range(30):
            named[row, predictor.predict(ffn, x[row : row + 1])] = True
        active = active_neurons(model, ffn, x)
        if backend == "numpy":  # another rounds to int8
            assert not (active & ~named).any()
        assert np.array_equal(np.flatnonzero(named.any(axis=0)), predictor.predict(ffn, x))
        assert named.mean() < 0.6
    predictor.close()


def test_without_exact_zeros_every_neuron_is_named():
    predictor, model = ExactPredictor(), open_model(toys.model("silu"), MmapTier())
    assert predictor.offloaded_bytes(model) == 0
    predictor.attach_offloaded(model, NumpyBackend())
    assert predictor.predict(0, np.zeros((1, 64), np.float32)) is None


def test_what_is_not_a_number_may_be_active():
    gates = Tensor.from_f32(-np.ones((3, 8), np.float32))
    x = np.ones((1, 8), np.float32)
    assert not maybe_active(NumpyBackend(), gates, x).any()
    x[0, 3] = np.nan
    assert maybe_active(NumpyBackend(), gates, x).all()


@pytest.mark.parametrize("name", ["relu", "biased", "post"])
def test_carrying_an_input_exchanges_the_weights_of_the_norms(name):
    model = open_model(toys.model(name), MmapTier())
    block = "attn" if name == "post" else "ffn"
    stream = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    inputs = []
    for layer in range(2):
        at = f"layers.{layer}.{block}.norm"
        bias = model.vector(f"{at}.bias") if model.architecture.norm_bias else 0
        inputs.append(stream * model.vector(f"{at}.weight") + bias)
    np.testing.assert_allclose(FfnInputs(model).carry(0, inputs[0]), inputs[1], rtol=1e-4, atol=1e-5)
