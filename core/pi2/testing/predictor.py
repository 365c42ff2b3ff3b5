"""Conformance tests of predictors: on toy models, against the truly active neurons in float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import Generator
from numpy.typing import NDArray

from pi2.api import Backend, FfnSpec, Predictor
from pi2.builtin.mmap_tier import MmapTier
from pi2.builtin.numpy_backend import NumpyBackend
from pi2.container.reader import PiModel, open_model
from pi2.tensor import F32, Ids
from pi2.testing import reference
from pi2.testing.backend import call_ffn, same_bits
from pi2.testing.models import ffn_inputs, toy_architecture, write_toy_model
from pi2.testing.plugin import PluginTests, examples
from pi2.testing.strategies import generators

MODELS: dict[str, dict[str, Any]] = {
    "relu": {},
    "drelu": {"up_relu": True},
    "relu2, no gate, biases": {"activation": "relu2", "gated": False, "ffn_bias": True},
    "silu": {"activation": "silu"},
}
_tokens = st.sampled_from((1, 2, 5))


class PredictorTests(PluginTests):
    """Everything that ``pi2.api.Predictor`` promises.  Recall is measured elsewhere, never asserted.

    class TestMine(PredictorTests):
        plugin = MyPredictor

    A predictor that needs files in the model overrides the fixture ``model_path``.
    """

    plugin: ClassVar[type[Predictor]]

    @pytest.fixture(scope="class", params=sorted(MODELS))
    @classmethod
    def model_path(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A pi2 model that the predictor can be attached to."""
        where = tmp_path_factory.mktemp("predictor") / "model"
        return write_toy_model(where, toy_architecture(**MODELS[request.param]))

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, model_path: Path) -> Iterator[PiModel]:
        """The opened model."""
        tier = MmapTier.open()
        yield open_model(model_path, tier)
        tier.close()

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Backend:
        """What the engine would run beside the predictor."""
        return NumpyBackend.open()

    @pytest.fixture(scope="class")
    @classmethod
    def predictor(cls, runnable: type[Predictor], model: PiModel, backend: Backend) -> Iterator[Predictor]:
        """The predictor, attached."""
        opened = runnable.open(cls.options)
        opened.attach(model, backend)
        yield opened
        opened.close()

    def test_it_says_whether_it_is_lossless(self, implementation: type[Predictor]) -> None:
        assert implementation.lossless in (True, False)

    @examples(40)
    @given(rng=generators, n=_tokens)
    def test_it_names_neurons_in_order_and_the_same_ones_again(
        self, predictor: Predictor, model: PiModel, rng: Generator, n: int
    ) -> None:
        for ffn in range(model.architecture.n_layers):
            x = ffn_inputs(model.architecture, n, rng)
            before = x.tobytes()
            ids, again = predictor.predict(ffn, x), predictor.predict(ffn, x)
            assert x.tobytes() == before, "changed its input"
            check_ids(ids, model.architecture.n_neurons)
            assert np.array_equal(named(ids, model), named(again, model))

    @examples(40)
    @given(rng=generators, n=_tokens)
    def test_if_lossless_it_misses_no_active_neuron(
        self, predictor: Predictor, backend: Backend, model: PiModel, rng: Generator, n: int
    ) -> None:
        for ffn in range(model.architecture.n_layers):
            x = ffn_inputs(model.architecture, n, rng)
            missed = np.setdiff1d(
                truly_active(model, ffn, x, backend), named(predictor.predict(ffn, x), model)
            )
            assert not (predictor.lossless and len(missed)), f"missed {missed.tolist()}"

    @examples(40)
    @given(rng=generators)
    def test_if_lossless_its_neurons_give_the_bits_of_the_dense_ffn(
        self, predictor: Predictor, backend: Backend, model: PiModel, rng: Generator
    ) -> None:
        """Else they still give numbers."""
        for ffn in range(model.architecture.n_layers):
            handle = backend.place_ffn(model.bundles(ffn), spec_of(model))
            x = ffn_inputs(model.architecture, 1, rng)
            dense, _ = call_ffn(backend, handle, x)
            sparse, _ = call_ffn(backend, handle, x, predictor.predict(ffn, x))
            assert np.isfinite(sparse).all()
            assert same_bits(sparse, dense) or not predictor.lossless

    @pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
    def test_an_input_beyond_reason_does_no_harm(
        self, predictor: Predictor, model: PiModel, bad: float
    ) -> None:
        x = np.full((1, model.architecture.d_model), bad, np.float32)
        with np.errstate(all="ignore"):
            check_ids(predictor.predict(0, x), model.architecture.n_neurons)


def check_ids(ids: Ids | None, n_neurons: int) -> None:
    """None, or int32 ids that ascend strictly within the FFN."""
    if ids is None:
        return
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert np.all(np.diff(ids) > 0), "not ascending, or named twice"
    assert np.all((ids >= 0) & (ids < n_neurons)), "no such neuron"


def named(ids: Ids | None, model: PiModel) -> Ids:
    """The ids, spelt out if they are all."""
    return np.arange(model.architecture.n_neurons, dtype=np.int32) if ids is None else ids


def spec_of(model: PiModel) -> FfnSpec:
    """What the neurons of ``model`` compute."""
    return FfnSpec(model.geometry, model.architecture.activation, model.architecture.up_relu)


def truly_active(model: PiModel, ffn: int, x: F32, backend: Backend) -> NDArray[np.int64]:
    """Neurons whose activation is not zero for some row of x, beyond what ``backend`` could doubt."""
    neurons = model.geometry.unpack(model.bundles(ffn))
    expected = reference.ffn(neurons, spec_of(model), x, backend.tolerance)
    return np.flatnonzero(expected.active.any(axis=0))
