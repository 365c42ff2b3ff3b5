"""The storage formats against per-element references, GGUF's own quantiser, and their byte layout."""

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pi2.errors import FormatError
from pi2.tensor import BLOCK, DTYPES, Tensor, cols_of, decode, encode, join_row, row_bytes

F = np.float32
finite = st.floats(-1e5, 1e5, width=32)
matrices = st.integers(1, 3).flatmap(
    lambda blocks: hnp.arrays(np.float32, st.tuples(st.integers(0, 3), st.just(32 * blocks)), elements=finite)
)
quantised = pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])


def reference_q8(block):
    """quantize_row_q8_0_ref of GGUF's C sources, one weight at a time."""
    scale = F(max(abs(x) for x in block)) / F(127)
    inverse = F(1) / scale if scale else F(0)
    quants = []
    for x in block:
        y = float(F(x) * inverse)
        whole = int(abs(y))
        away = whole + (abs(y) - whole >= 0.5)  # roundf: half away from zero
        quants.append(int(np.copysign(away, y)))
    return scale, quants


def reference_q4(block):
    """quantize_row_q4_0_ref of GGUF's C sources (without fused multiply-add), one weight at a time."""
    peak = F(0)
    for x in block:
        if abs(x) > abs(peak):
            peak = F(x)
    scale = peak / F(-8)
    inverse = F(1) / scale if scale else F(0)
    return scale, [min(15, int(F(F(x) * inverse) + F(8.5))) - 8 for x in block]


@quantised
@given(values=matrices)
@settings(deadline=None, max_examples=60)
def test_quantising_follows_the_reference_weight_by_weight(dtype, values):
    reference = reference_q8 if dtype == "q8_0" else reference_q4
    values = np.where(np.abs(values) < 1e-30, F(0), values)  # the inverse of a tiny scale overflows
    got = decode(encode(values, dtype), dtype)
    for row, out in zip(values, got, strict=True):
        for at in range(0, len(row), BLOCK):
            scale, quants = reference(row[at : at + BLOCK])
            expected = np.array(quants, F) * F(np.float16(scale))
            np.testing.assert_array_equal(out[at : at + BLOCK], expected)


def test_half_is_rounded_away_from_zero_and_just_below_half_is_not():
    row = np.zeros((1, 32), np.float32)
    row[0, :6] = [127, 0.5, -0.5, 0.49999997, 1.5, -2.5]
    assert decode(encode(row, "q8_0"), "q8_0")[0, :6].tolist() == [127, 1, -1, 0, 2, -3]


@given(values=matrices.filter(lambda m: len(m) > 0))
@settings(deadline=None, max_examples=60)
def test_q8_0_has_the_bits_of_the_gguf_package(values):
    values = np.where(np.abs(values) < 1e-30, F(0), values)  # their inverse of a tiny scale overflows
    n = len(values)
    theirs = quantize(values, gguf.GGMLQuantizationType.Q8_0).reshape(n, -1, 34)
    scales = np.ascontiguousarray(theirs[:, :, :2]).reshape(n, -1).view(np.float16)
    assert np.array_equal(encode(values, "q8_0"), join_row(theirs[:, :, 2:].reshape(n, -1), scales))


def test_q4_0_has_the_bits_of_the_gguf_package_except_at_exact_ties():
    values = np.random.default_rng(0).standard_normal((50, 256)).astype(np.float32)
    theirs = quantize(values, gguf.GGMLQuantizationType.Q4_0).reshape(50, -1, 18)
    scales = np.ascontiguousarray(theirs[:, :, :2]).reshape(50, -1).view(np.float16)
    assert np.array_equal(encode(values, "q4_0"), join_row(theirs[:, :, 2:].reshape(50, -1), scales))


@quantised
def test_values_are_those_of_gguf_for_any_bits_of_the_quants(dtype):
    rng = np.random.default_rng(1)
    size = 32 if dtype == "q8_0" else 16
    quants = rng.integers(0, 256, (7, 5, size), np.uint8)
    scales = rng.standard_normal((7, 5)).astype(np.float16)
    blocks = np.concatenate((scales[:, :, None].view(np.uint8), quants), axis=2).reshape(7, -1)
    theirs = dequantize(blocks, gguf.GGMLQuantizationType[dtype.upper()])
    np.testing.assert_array_equal(decode(join_row(quants.reshape(7, -1), scales), dtype), theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@given(values=matrices)
@settings(deadline=None, max_examples=30)
def test_the_error_of_a_weight_is_within_half_a_step(dtype, values):
    values = np.clip(values, -65000, 65000)
    tensor = Tensor.from_f32(values, dtype)
    assert tensor.shape == values.shape
    assert tensor.data.shape == (len(values), row_bytes(dtype, values.shape[1]))
    assert tensor.data.dtype == np.uint8
    blocks = np.abs(values).reshape(len(values), values.shape[1] // 32, 32)
    peak = np.repeat(blocks.max(axis=2), 32, axis=1)
    # q8_0: half of peak/127; q4_0: a whole step of peak/8 at the end of the range; 2^-11 for fp16 scales
    step = {"f32": 0 * peak, "f16": peak * 2**-11, "q8_0": peak / 254 * 1.2, "q4_0": peak / 8 * 1.01}[dtype]
    assert (np.abs(tensor.to_f32() - values) <= step + (0 if dtype == "f32" else 1e-5)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_can_be_taken_by_ids_or_by_a_slice(dtype):
    values = np.random.default_rng(2).standard_normal((9, 64)).astype(np.float32)
    tensor = Tensor.from_f32(values, dtype)
    whole = tensor.to_f32()
    ids = np.array([0, 3, 8], np.int32)
    assert np.array_equal(tensor.to_f32(ids), whole[ids])
    assert np.array_equal(tensor.to_f32(slice(2, 5)), whole[2:5])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_quants_then_scales_and_its_length_tells_its_width(dtype):
    for cols in (32, 64, 576):
        assert cols_of(dtype, row_bytes(dtype, cols)) == cols
    with pytest.raises(FormatError, match="cannot have"):
        cols_of(dtype, row_bytes(dtype, 32) + 1)
    row = encode(np.full((1, 64), 2.0, np.float32), dtype)
    if dtype in ("q8_0", "q4_0"):
        scales = row[0, -4:].copy().view(np.float16)
        assert scales.tolist() == [np.float16(2 / 127 if dtype == "q8_0" else -0.25)] * 2


@quantised
def test_rows_that_are_no_whole_number_of_blocks_are_refused(dtype):
    with pytest.raises(FormatError, match="not a multiple of 32") as caught:
        encode(np.zeros((1, 33), np.float32), dtype)
    assert "f16" in caught.value.hint


@quantised
def test_weights_too_small_for_a_scale_become_zero(dtype):
    row = np.full((1, 32), 1e-41, np.float32)
    assert not decode(encode(row, dtype), dtype).any()
