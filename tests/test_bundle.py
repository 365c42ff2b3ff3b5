"""The arithmetic of bundles: every combination of formats comes back, and nothing straddles or overlaps."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pi2.bundle import SEGMENT_ALIGN, BundleGeometry, Neurons
from pi2.errors import FormatError
from pi2.tensor import BLOCK, DTYPES, decode, encode


@st.composite
def geometries(draw):
    d = draw(st.sampled_from([1, 3, 31, 32, 64, 96, 100, 576, 1024]))
    formats = st.sampled_from(DTYPES if d % BLOCK == 0 else ("f32", "f16"))
    gate, up, down = draw(st.none() | formats), draw(formats), draw(formats)
    return BundleGeometry(d, gate, up, down, draw(st.booleans()), draw(st.sampled_from([512, 4096, 16384])))


def weights(geometry, k, seed):
    rng = np.random.default_rng(seed)

    def some(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    return {
        name: some(k, (1 if geometry.gate is None else 2) if name == "bias" else geometry.d_model)
        for name in geometry.segments()
    }


@given(geometry=geometries(), k=st.integers(0, 4), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=100)
def test_what_is_packed_comes_back_as_its_format_stores_it(geometry, k, seed):
    values = weights(geometry, k, seed)
    bundles = np.full((k, geometry.stride), 0xA5, np.uint8)
    for name, part in values.items():
        geometry.pack_into(bundles, name, part)
    neurons = geometry.unpack(bundles)
    for name in ("gate", "up", "down"):
        dtype = getattr(geometry, name)
        got = getattr(neurons, name)
        if dtype is None:
            assert got is None
        else:
            np.testing.assert_array_equal(got, decode(encode(values[name], dtype), dtype))
    if geometry.biased:
        np.testing.assert_array_equal(neurons.up_bias, values["bias"][:, -1])
        assert (neurons.gate_bias is None) == (geometry.gate is None)
        if geometry.gate is not None:
            np.testing.assert_array_equal(neurons.gate_bias, values["bias"][:, 0])
    else:
        assert neurons.gate_bias is None
        assert neurons.up_bias is None


@given(geometry=geometries(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_bytes_in_the_segments_format_are_taken_over_untouched(geometry, seed):
    values = weights(geometry, 3, seed)
    encoded, plain = (np.zeros((3, geometry.stride), np.uint8) for _ in range(2))
    for name, part in values.items():
        geometry.pack_into(plain, name, part)
        geometry.pack_into(encoded, name, encode(part, "f32" if name == "bias" else getattr(geometry, name)))
    assert np.array_equal(encoded, plain)


@given(geometry=geometries())
@settings(deadline=None, max_examples=200)
def test_segments_are_aligned_in_order_and_within_the_stride(geometry):
    end = 0
    for offset, size in geometry.segments().values():
        assert offset >= end
        assert offset % SEGMENT_ALIGN == 0
        end = offset + size
    assert end == geometry.nbytes <= geometry.stride
    order = [n for n in ("gate", "up", "down", "bias") if n in geometry.segments()]
    assert list(geometry.segments()) == order


@given(geometry=geometries())
@settings(deadline=None, max_examples=200)
def test_the_stride_wastes_little_and_bundles_do_not_straddle_pages_needlessly(geometry):
    stride, page, need = geometry.stride, geometry.page, geometry.nbytes
    assert stride % SEGMENT_ALIGN == 0
    if need >= page:
        assert stride % page == 0
        assert stride - need < page
    elif page % stride:  # then a share of a page would have wasted more than an eighth
        assert stride - need < SEGMENT_ALIGN
    else:
        assert stride * 7 < (need + SEGMENT_ALIGN) * 8


def test_a_4096_wide_int4_neuron_is_two_pages():
    geometry = BundleGeometry(4096, "q4_0", "q4_0", "q4_0")
    assert geometry.stride == 2 * 4096
    assert geometry.segments() == {"gate": (0, 2304), "up": (2304, 2304), "down": (4608, 2304)}


def test_neurons_can_be_taken_by_slice_or_ids():
    full = np.arange(12, dtype=np.float32).reshape(4, 3)
    part = Neurons(None, full, full + 1, None, full[:, 0])[np.array([1, 3], np.int32)]
    assert part.gate is None
    assert np.array_equal(part.up, full[[1, 3]])
    assert np.array_equal(part.up_bias, full[[1, 3], 0])


@given(geometry=geometries())
@settings(deadline=None, max_examples=50)
def test_a_geometry_survives_the_manifest(geometry):
    assert BundleGeometry.from_dict(geometry.to_dict()) == geometry


GOOD = BundleGeometry(64, "q4_0", "q4_0", "q8_0").to_dict()


@pytest.mark.parametrize("name", list(GOOD))
def test_a_geometry_without_one_of_its_numbers_is_refused(name):
    with pytest.raises(FormatError, match=r"lacks|contradicts"):
        BundleGeometry.from_dict({k: v for k, v in GOOD.items() if k != name})


@pytest.mark.parametrize(
    ("name", "value"),
    [("d_model", 0), ("d_model", "64"), ("d_model", True), ("d_model", 1 << 21), ("d_model", 65),
     ("gate", "q5_0"), ("up", None), ("down", 8), ("biased", 1), ("page", 32), ("page", 4097),
     ("page", 1 << 21), ("page", 4096.0), ("gate", ["q4_0"]), ("up", {})],
)  # fmt: skip
def test_impossible_values_are_refused(name, value):
    with pytest.raises(FormatError):
        BundleGeometry.from_dict(GOOD | {name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("stride", 1), ("stride", GOOD["stride"] + 16), ("segments", {}), ("extra", 1), ("biased", True)],
)
def test_derived_numbers_that_disagree_are_refused(name, value):
    with pytest.raises(FormatError, match="contradicts"):
        BundleGeometry.from_dict(GOOD | {name: value})


def test_a_geometry_is_a_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BundleGeometry(64, None, "f32", "f32").page = 512
