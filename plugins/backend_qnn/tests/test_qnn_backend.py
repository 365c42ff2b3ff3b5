"""The conformance kit on the emulator of the NPU, and what the kit does not ask of static graphs."""

import json
import os

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pi2.activations import hidden
from pi2.api import FfnSpec
from pi2.bundle import BundleGeometry
from pi2.tensor import Tensor, encode
from pi2.testing import BackendTests, reference
from pi2.testing.plugin import examples
from pi2.testing.reference import Expected
from pi2.testing.strategies import generators
from pi2_backend_qnn import selftest
from pi2_backend_qnn.backend import QnnBackend
from pi2_backend_qnn.errors import QnnError
from pi2_backend_qnn.ffn import begin
from pi2_backend_qnn.placed import ROWS
from pi2_backend_qnn.probe import probe

CLUSTER = 32
emulated = pytest.mark.skipif(not probe(), reason=probe().reason)


class TestQnnBackend(BackendTests):
    plugin = QnnBackend
    options = {"emulator": "on", "cluster": str(CLUSTER)}  # noqa: RUF012  as the kit has it


@pytest.mark.skipif("PI2_EXPECT_QNN" not in os.environ, reason="PI2_EXPECT_QNN is not set")
def test_the_emulator_is_there():
    assert probe().score > 0, probe().reason


@pytest.fixture(scope="module")
def backend():
    opened = QnnBackend.open({"emulator": "on", "cluster": str(CLUSTER)})
    yield opened
    opened.close()


def ffn(rng, neurons, dtype="q4_0", activation="relu", d=64):
    geometry = BundleGeometry(d, dtype, dtype, dtype)
    bundles = np.zeros((neurons, geometry.stride), np.uint8)
    for part in ("gate", "up", "down"):
        values = (rng.standard_normal((neurons, d)) * d**-0.5).astype(np.float32)
        geometry.pack_into(bundles, part, values)
    return bundles, FfnSpec(geometry, activation)


def call(backend, handle, x, mask, clusters):
    out = np.full_like(x, np.nan)
    begin(backend._programs, handle, x, mask, clusters * CLUSTER).finish(out)
    return out


@emulated
@examples(40)
@given(
    rng=generators,
    dtype=st.sampled_from(("q4_0", "q8_0", "f16")),
    activation=st.sampled_from(("relu", "relu2", "silu")),
    tokens=st.integers(1, 33),
)
def test_every_graph_that_has_room_for_a_call_gives_the_same_bits(backend, rng, dtype, activation, tokens):
    """Fewer clusters, or more that are masked; as many rows as there are, or more that are padding."""
    bundles, spec = ffn(rng, 4 * CLUSTER, dtype, activation)
    handle = backend.place_ffn(bundles, spec)
    x = rng.standard_normal((tokens, 64)).astype(np.float32)
    mask = (np.arange(4 * CLUSTER) < CLUSTER).astype(np.float32)
    assert handle.prefixes() == [1, 2, 3, 4]
    want = call(backend, handle, x, mask, 1)
    padded = np.concatenate((x, np.zeros((34 - tokens, 64), np.float32)))
    for clusters in (1, 4):
        assert call(backend, handle, x, mask, clusters).tobytes() == want.tobytes()
        assert call(backend, handle, padded, mask, clusters)[:tokens].tobytes() == want.tobytes()
    backend.release(handle)


@emulated
@pytest.mark.parametrize("tokens", [1, 2, 7, 129, 300])
def test_tokens_go_through_graphs_of_few_sizes(backend, tokens):
    rng = np.random.default_rng(tokens)
    weight = Tensor(encode(rng.standard_normal((33, 64), dtype=np.float32), "q8_0"), "q8_0", 64)
    handle, x = backend.place(weight), rng.standard_normal((tokens, 64), dtype=np.float32)
    out = np.full((tokens, 33), np.nan, np.float32)
    backend.linear(handle, x, out)
    assert {rows for rows, _ in handle.graphs} <= set(ROWS)
    assert np.linalg.norm(out - x @ weight.to_f32().T) <= 1e-3 * np.linalg.norm(out)


@emulated
@pytest.mark.parametrize("dtype", ["q4_0", "q8_0", "f16", "f32"])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_matrices_of_few_rows_are_right(backend, dtype, rows):
    """QNN's MatMulNBits of a single row is not."""
    rng = np.random.default_rng(rows)
    weight = Tensor(encode(rng.standard_normal((rows, 64), dtype=np.float32), dtype), dtype, 64)
    for tokens in (1, 5):
        x, out = rng.standard_normal((tokens, 64), dtype=np.float32), np.empty((tokens, rows), np.float32)
        backend.linear(backend.place(weight), x, out)
        size = np.abs(x) @ np.abs(weight.to_f32()).T
        assert (np.abs(out - x @ weight.to_f32().T) <= 1e-3 * size).all()


@emulated
def test_a_graph_that_is_being_made_is_not_waited_for_if_another_fits(backend):
    rng = np.random.default_rng(0)
    handle = backend.place_ffn(*ffn(rng, 4 * CLUSTER))
    x, out = rng.standard_normal((1, 64)).astype(np.float32), np.empty((1, 64), np.float32)

    def hot(count):
        return backend.finish_ffn(backend.begin_ffn(handle, x, count), out)

    first = hot(4 * CLUSTER)
    assert [swap.wait_s > 0 for swap in first.swaps] == [True]  # there was nothing else
    for _ in range(200):  # the whole one stands in until the graph of one cluster is ready
        done = hot(CLUSTER)
        if done.swaps:
            break
    (swap,) = done.swaps
    assert swap.wait_s < 0.01 < swap.end - swap.start
    assert (1, 1) in handle.graphs


@emulated
@pytest.mark.parametrize("hot", [1, 64, 100])
def test_hot_neurons_here_and_cold_ones_elsewhere_are_the_dense_ffn(backend, hot):
    from pi2.builtin.numpy_backend import NumpyBackend

    rng, cold = np.random.default_rng(hot), NumpyBackend()
    bundles, spec = ffn(rng, 4 * CLUSTER)
    x = rng.standard_normal((1, 64)).astype(np.float32)
    here, there, dense = (np.empty_like(x) for _ in range(3))
    done = backend.finish_ffn(backend.begin_ffn(backend.place_ffn(bundles, spec), x, hot), here)
    reference = cold.place_ffn(bundles, spec)
    active = cold.ffn(reference, x, there, np.arange(hot, 4 * CLUSTER, dtype=np.int32))
    assert abs(cold.ffn(reference, x, dense) - active - done.active) <= 1  # a gate within rounding of zero
    assert np.linalg.norm(here + there - dense) <= QnnBackend.tolerance * np.linalg.norm(dense)


@emulated
@examples(100)
@given(
    rng=generators,
    gated=st.booleans(),
    biased=st.booleans(),
    activation=st.sampled_from(("relu", "relu2", "silu")),
    weak=st.integers(-12, 0),
    power=st.integers(-10, 5),
)
@example(np.random.default_rng(4373), True, False, "relu2", -3, 0)
@example(np.random.default_rng(0), True, True, "relu2", -11, -10)
def test_a_neuron_that_is_weak_beside_the_others_is_not_lost(
    backend, rng, gated, biased, activation, weak, power
):
    """Its product, squared perhaps, would be below what fp16 can hold if only the others set the scale."""
    geometry = BundleGeometry(64, "f32" if gated else None, "f32", "f32", biased=biased)
    bundles, spec = np.zeros((3 * CLUSTER, geometry.stride), np.uint8), FfnSpec(geometry, activation)
    for part in geometry.segments():
        values = rng.standard_normal((3 * CLUSTER, {"bias": 1 + gated}.get(part, 64)), dtype=np.float32)
        values[0] = np.ldexp(values[0], -rng.integers(0, 8, 64) if part == "down" else weak)
        if part == "bias":
            values[0] = np.abs(values[0])  # so that it is on, as a rule, if tokens are small
        geometry.pack_into(bundles, part, values)
    x = np.ldexp(rng.standard_normal((1, 64), dtype=np.float32), power).astype(np.float32)
    handle, outs = backend.place_ffn(bundles, spec), np.full((2, 1, 64), np.nan, np.float32)
    backend.finish_ffn(backend.begin_ffn(handle, x, 1), outs[0])
    backend.ffn(handle, x, outs[1], np.zeros(1, np.int32))
    backend.release(handle)
    every, neurons = geometry.unpack(bundles), geometry.unpack(bundles[:1])
    expected = reference.ffn(neurons, spec, x, QnnBackend.tolerance).output
    h = hidden_of(neurons, spec, x)
    lost = 2.0 ** (np.frexp(np.abs(every.down).max())[1] - 25) * h  # of weights, as scaling.py derives it
    for out in outs:
        assert Expected(expected.values, expected.bound + lost).accepts(out)


def hidden_of(neurons, spec, x):
    """The magnitude of one token's and one neuron's hidden value."""
    gate = None if neurons.gate is None else x @ neurons.gate.T + (neurons.gate_bias or 0)
    return abs(hidden(spec, gate, x @ neurons.up.T + (neurons.up_bias or 0)).item())


@emulated
def test_graphs_of_what_was_released_go_even_while_they_are_made(backend):
    rng = np.random.default_rng(0)
    x, out = rng.standard_normal((1, 64)).astype(np.float32), np.empty((1, 64), np.float32)

    def numbers():
        return set(backend._client.call({"do": "numbers"}).values["numbers"])

    before = numbers()
    for _ in range(3):
        handle = backend.place_ffn(*ffn(rng, CLUSTER))
        backend.prepare_ffn(handle, 1, CLUSTER)
        backend.release(handle)
    kept = backend.place_ffn(*ffn(rng, CLUSTER))
    backend.ffn(kept, x, out)
    assert numbers() - before == set(kept.graphs.values())


@emulated
def test_what_went_wrong_while_preparing_is_told_when_the_graph_is_needed(backend):
    bundles, spec = ffn(np.random.default_rng(0), CLUSTER, "f32")
    handle, x = backend.place_ffn(bundles, spec), np.ones((1, 64), np.float32)
    handle.exponents = {}  # nothing that a graph can be made of
    backend.prepare_ffn(handle, 1, CLUSTER)
    with pytest.raises(QnnError, match="refuses a graph"):
        backend.begin_ffn(handle, x, CLUSTER)


@emulated
def test_the_selftest_for_owners_of_a_device_passes_here_without_a_word_of_speed(capsys):
    with pytest.raises(SystemExit) as end:
        selftest.main(
            ["--json", "--backend", "qnn:emulator=on,cluster=32", "--d-model", "64", "--neurons", "96"]
        )
    found = json.loads(capsys.readouterr().out)
    assert (end.value.code, found["ok"], found["kind"]) == (0, True, "htp-emulator-x86")
    assert len(found["checks"]) == 6
    lost = {weights: max(found["checks"][weights]["lost"].values()) for weights in ("w8a16", "w4a16")}
    assert lost["w8a16"] < 0.03 < lost["w4a16"] < 0.3
    assert "seconds" not in found
    with pytest.raises(SystemExit, match="NPU"):
        selftest.main(["--json"])
    with pytest.raises(SystemExit):
        selftest.main(["--d-model", "33"])
