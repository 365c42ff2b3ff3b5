"""Rounded weights: what rounding does, products of integers against NumPy's, and that it is never silent."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pi2.api import FfnSpec
from pi2.bundle import BundleGeometry
from pi2.errors import OptionError
from pi2.tensor import Tensor, encode
from pi2.testing import reference
from pi2.testing.plugin import examples
from pi2.testing.strategies import generators
from pi2_backend_qnn import errors, host, requantise, targets
from pi2_backend_qnn.backend import QnnBackend
from pi2_backend_qnn.ffn import begin
from pi2_backend_qnn.placed import ROWS, Ffn, Matrix
from pi2_backend_qnn.probe import probe

CLUSTER, D = 64, 64
MODES = tuple(requantise.BITS)
emulated = pytest.mark.skipif(not probe(), reason=probe().reason)


@pytest.fixture(scope="module", params=MODES)
def backend(request):
    opened = QnnBackend.open({"emulator": "on", "cluster": str(CLUSTER), "weights": request.param})
    yield opened
    opened.close()


def far(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def bundles_of(rng, neurons, dtype="q8_0", activation="relu", gated=True, biased=False):
    geometry = BundleGeometry(D, dtype if gated else None, dtype, dtype, biased=biased)
    bundles = np.zeros((neurons, geometry.stride), np.uint8)
    for part in geometry.segments():
        values = rng.standard_normal((neurons, {"bias": 1 + gated}.get(part, D)), dtype=np.float32)
        geometry.pack_into(bundles, part, values * np.float32(D**-0.5))
    return bundles, FfnSpec(geometry, activation)


def matrices(rng, rows, cols, power):
    """With channels of all sizes, and some that are zero."""
    values = rng.standard_normal((rows, cols), dtype=np.float32) * (rng.random((rows, 1)) < 0.9)
    return np.ldexp(values, power + rng.integers(-12, 12, (rows, 1))).astype(np.float32)


@given(rng=generators, rows=st.integers(1, 40), cols=st.integers(1, 80), power=st.integers(-100, 100))
def test_no_weight_changes_by_more_than_half_a_step_of_its_channel(rng, rows, cols, power):
    weights = matrices(rng, rows, cols, power)
    for bits in (8, 4):
        whole, *apart = requantise.parts_of(weights, bits)
        steps = np.broadcast_to(whole.scales[:, None], weights.shape).copy()
        for part in apart:
            assert part.bits == 8
            assert (whole.quants[:, part.channels] == 0).all()
            steps[:, part.channels] = part.scales[:, None]
        assert len(apart) == (bits == 4 and cols >= 16)
        assert sum(len(part.channels) for part in apart) <= cols / 16
        assert (np.abs(requantise.rounded(weights, bits) - weights) <= steps * (0.5 + 2**-16)).all()
        assert np.abs(whole.quants).max(initial=0) < 2 ** (bits - 1)


@given(rng=generators, large=st.integers(4, 100))
def test_outliers_reduce_the_error_to_less_than_half_if_a_channel_in_32_is_large(rng, large):
    """Which is why they are there."""
    weights = rng.standard_normal((64, 128), dtype=np.float32)
    places = rng.choice(128, 4, replace=False)
    weights[:, places] *= large
    assert set(places) <= set(requantise.outliers(weights))
    rest = np.setdiff1d(np.arange(128), places)
    with_them, without = requantise.rounded(weights, 4), requantise.by_channel(weights, 4).to_f32()
    assert far(with_them[:, rest], weights[:, rest]) < 0.5 * far(without[:, rest], weights[:, rest])
    assert far(with_them, weights) < far(without, weights)


@examples(200)
@given(
    rng=generators,
    mode=st.sampled_from(MODES),
    activation=st.sampled_from(("relu", "relu2", "silu")),
    gated=st.booleans(),
    biased=st.booleans(),
    power=st.integers(-30, 30),
)
def test_nothing_exceeds_fp16_or_the_ranges_of_integers(rng, mode, activation, gated, biased, power):
    """Whatever the tokens are, even those that agree best with a neuron: its weights."""
    bundles, spec = bundles_of(rng, 70, "f32", activation, gated, biased)
    ffn = Ffn(bundles=bundles, spec=spec, cluster=32, weights=mode)
    meant = host.rounded_ffn(ffn)
    n = meant.spec.geometry.unpack(meant.bundles)
    x = np.ldexp(np.concatenate((n.up, n.up if n.gate is None else n.gate)), power).astype(np.float32)
    e, fed = ffn.scaling.inputs(x, spec)
    assert np.array_equal(np.ldexp(fed["x"], e[:, None]), x)
    norms = np.linalg.norm(fed["x"].astype(np.float64), axis=1)
    assert norms.max() < 1
    assert biased or norms.min() > 0.49
    ones = fed.get("ones", np.zeros((len(x), 1), np.float32)).astype(np.float64)

    def dots(part, rows, bias):
        scale = 2.0 ** -ffn.exponents[part]
        return np.abs(fed["x"].astype(np.float64) @ rows.T + ones * (0 if bias is None else bias)) * scale

    up = dots("up", n.up, n.up_bias)
    gate = dots("gate", n.gate, n.gate_bias) if gated else up
    act = gate**2 if activation == "relu2" else gate
    h = act * up if gated else act
    norms = sum(np.linalg.norm(n.down[c : c + 32].astype(np.float64), axis=0) for c in range(0, 70, 32))
    y = 32**0.5 * norms * 2.0 ** -np.array(ffn.exponents["down"])
    assert max(each.max() for each in (ones, up, gate, act, h, y)) <= 2**15


def steps(x, reach):
    """What is rounded to 16 bits, as QuantizeLinear does it."""
    step = np.float32(reach / 32767)
    return np.clip(np.rint(x / step), -32768, 32767).astype(np.float64) * step


@emulated
@examples(40)
@given(
    rng=generators,
    rows=st.integers(2, 70),
    blocks=st.integers(1, 8),
    tokens=st.sampled_from((1, 3, 32)),
    power=st.integers(-20, 20),
)
def test_a_product_is_that_of_the_integers(backend, rng, rows, blocks, tokens, power):
    """To a step of 16 bits, less what QNN drops of every sum of integers, its lowest 8 bits.

    A token is a whole row of weights, too.
    """
    cols = 32 * blocks
    weight = Tensor(encode(rng.standard_normal((rows, cols), dtype=np.float32), "f32"), "f32", cols)
    mode = backend.about["weights"]
    handle = Matrix(weight=weight, weights=mode)
    x = rng.standard_normal((tokens, cols), dtype=np.float32)
    x[0] = weight.to_f32()[0]
    x, out = np.ldexp(x, power).astype(np.float32), np.full((tokens, rows), np.nan, np.float32)
    backend.linear(handle, x, out)
    e = handle.exponents(x)[:, None]
    fed, want, step, dropped, fp16 = steps(np.ldexp(x, -e), 1.0), 0.0, 0.0, 0.0, 0.0
    for part in requantise.parts_of(weight.to_f32(), requantise.BITS[mode]):
        w = part.to_f32().astype(np.float64)
        y = (fed if part.channels is None else fed[:, part.channels]) @ w.T
        reach = np.linalg.norm(w, axis=1).max() * (1 + 0.5 * w.shape[1] ** 0.5 / 32767) * (1 + 2**-12)
        assert np.abs(y).max() < reach
        want = want + y
        step += reach / 32767
        dropped = dropped + 255 * part.scales.astype(np.float64) / 32767
        fp16 = fp16 + 2**-11 * np.abs(y)  # through which products pass
    error, fp16 = np.ldexp(out, -e) - want, fp16 + 2**-11 * np.abs(want)
    assert (error <= step + fp16).all()
    assert (error >= -step - dropped - fp16).all()
    backend.release(handle)


@emulated
@examples(60)
@given(
    rng=generators,
    dtype=st.sampled_from(("q4_0", "q8_0", "f16", "f32")),
    activation=st.sampled_from(("relu", "relu2", "silu", "gelu_tanh")),
    gated=st.booleans(),
    biased=st.booleans(),
    neurons=st.integers(1, 130),
    tokens=st.sampled_from((1, 8, 20)),
    power=st.integers(-20, 20),
)
def test_an_ffn_is_that_of_the_rounded_weights(
    backend, rng, dtype, activation, gated, biased, neurons, tokens, power
):
    bundles, spec = bundles_of(rng, neurons, dtype, activation, gated, biased)
    handle, out = backend.place_ffn(bundles, spec), np.full((tokens, D), np.nan, np.float32)
    x = np.ldexp(rng.standard_normal((tokens, D), dtype=np.float32), power).astype(np.float32)
    active = backend.ffn(handle, x, out)
    meant = host.rounded_ffn(handle)
    neurons = meant.spec.geometry.unpack(meant.bundles)
    expected = reference.ffn(neurons, meant.spec, x, QnnBackend.tolerance)
    assert expected.output.accepts(out)
    assert expected.accepts_count(active)
    backend.release(handle)


@emulated
@examples(40)
@given(
    rng=generators,
    tokens=st.integers(1, 33),
    activation=st.sampled_from(("relu", "relu2", "silu", "gelu_tanh")),
    gated=st.booleans(),
)
def test_every_graph_that_has_room_for_a_call_gives_the_same_bits(backend, rng, tokens, activation, gated):
    handle = backend.place_ffn(*bundles_of(rng, 4 * CLUSTER, "q4_0", activation, gated))
    x = rng.standard_normal((tokens, D), dtype=np.float32)
    mask = (np.arange(4 * CLUSTER) < CLUSTER).astype(np.float32)

    def call(x, clusters):
        out = np.full_like(x, np.nan)
        begin(backend._programs, handle, x, mask, clusters * CLUSTER).finish(out)
        return out[:tokens].tobytes()

    padded = np.concatenate((x, rng.standard_normal((34 - tokens, D), dtype=np.float32)))
    assert len({call(each, clusters) for each in (x, padded) for clusters in (1, 4)}) == 1
    assert {rows for rows, _ in handle.graphs} <= set(ROWS)
    backend.release(handle)


@emulated
@pytest.mark.parametrize(("cluster", "alike"), [(512, 512), (4096, 4096), (4096, 1)])
def test_hidden_values_that_are_alike_and_agree_with_all_of_down_stay_in_range(cluster, alike):
    """The largest result that there can be, at the end of a range; or one neuron that is all of it."""
    geometry = BundleGeometry(32, "f32", "f32", "f32")
    bundles, spec = np.zeros((cluster, geometry.stride), np.uint8), FfnSpec(geometry, "relu")
    for part in ("gate", "up", "down"):
        geometry.pack_into(bundles[:alike], part, np.full((alike, 32), 0.5, np.float32))
    backend = QnnBackend.open({"emulator": "on", "cluster": str(cluster), "weights": "w8a16"})
    x, out = np.ones((2, 32), np.float32), np.full((2, 32), np.nan, np.float32)
    assert backend.ffn(backend.place_ffn(bundles, spec), x, out) == 2 * alike
    backend.close()
    assert out == pytest.approx(alike * 16**2 * 0.5, rel=4e-3)


def test_what_cannot_be_rounded_is_refused(monkeypatch):
    monkeypatch.setattr(targets, "installed", lambda: {})
    with pytest.raises(OptionError, match="weights cannot be 'w2a16'") as refusal:
        QnnBackend.open({"emulator": "on", "weights": "w2a16"})
    assert "exact, w8a16, w4a16" in refusal.value.hint
    bundles, spec = bundles_of(np.random.default_rng(0), 2, "f32")
    spec.geometry.pack_into(bundles, "down", np.full((2, D), 3e38, np.float32))
    with pytest.raises(errors.GraphRefused, match="too large"):
        Ffn(bundles=bundles, spec=spec, cluster=32, weights="w8a16")
