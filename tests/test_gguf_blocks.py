"""Decoding of GGUF's blocks, against gguf-py, bit for bit."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from pi2.formats.gguf_blocks import BLOCKS, decode_rows, exact_dtype, to_tensor, type_name

# Places of the fp16 scales in a block; they must be finite, every other byte is free.
SCALES = {
    2: [0],
    3: [0, 2],
    6: [0],
    7: [0, 2],
    8: [0],
    10: [80, 82],
    11: [108],
    12: [0, 2],
    13: [0, 2],
    14: [208],
}


def random_rows(kind: int, rows: int, blocks: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    size = BLOCKS[kind][1]
    raw = random.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for at in SCALES.get(kind, []):
        scale = random.standard_normal((rows, blocks, 1)).astype(np.float16)
        raw[:, :, at : at + 2] = scale.view(np.uint8).reshape(rows, blocks, 2)
    if kind == 1:
        raw[:, :, 1] &= 0x3B
    if kind in (0, 30):
        raw[:, :, -1] &= 0x3E
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", sorted(BLOCKS), ids=type_name)
@settings(deadline=None, max_examples=15)
@given(rows=st.integers(1, 40), blocks=st.integers(1, 5), seed=st.integers(0, 2**32))
def test_every_type_decodes_to_the_bits_of_the_reference(kind, rows, blocks, seed):
    raw = random_rows(kind, rows, blocks, seed)
    expected = dequantize(raw, GGMLQuantizationType(kind)).view(np.uint32)
    assert np.array_equal(decode_rows(raw, kind).view(np.uint32), expected)
    # The reference writes -0 where q = 0 meets a negative scale just as pi2.tensor does: compare bits too.
    assert np.array_equal(to_tensor(raw, kind).to_f32().view(np.uint32), expected)


@pytest.mark.parametrize("kind", sorted(BLOCKS), ids=type_name)
def test_the_table_of_blocks_is_that_of_the_reference(kind):
    from gguf.constants import GGML_QUANT_SIZES

    assert BLOCKS[kind] == GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    assert type_name(kind) == GGMLQuantizationType(kind).name


@pytest.mark.parametrize("kind", [2, 8], ids=type_name)
def test_types_that_pi2_has_itself_keep_every_bit_of_quants_and_scales(kind):
    raw = random_rows(kind, 7, 3, seed=1)
    tensor = to_tensor(raw, kind)
    assert tensor.dtype == exact_dtype(kind)
    blocks = raw.reshape(7, 3, -1)
    quants, scales = np.split(tensor.data, [tensor.data.shape[1] - 3 * 2], axis=1)
    assert np.array_equal(quants.reshape(7, 3, -1), blocks[:, :, 2:])
    assert np.array_equal(scales.reshape(7, 3, 2), blocks[:, :, :2])


def test_large_tensors_are_decoded_in_portions_to_the_same_values():
    raw = random_rows(14, 300, 8, seed=2)
    whole = dequantize(raw, GGMLQuantizationType.Q6_K)
    assert np.array_equal(decode_rows(raw, 14), whole)
