"""A pi2 model in q4_0 as a GGUF of the same values, for llama.cpp and its kin (arch ``llama``).

They compute SiLU where pi2 computes ReLU: the shapes and the bytes are the same, so speeds can be
compared, texts cannot.  One tensor is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf_files import add, letters
from pi2.container.reader import PiModel
from pi2.tensor import BLOCK, U8, Tensor

HALF = BLOCK // 2
Made = Callable[[], np.ndarray[Any, Any]]


def export(model: PiModel, path: Path) -> None:
    """Write the GGUF at ``path``; what was there is replaced when it is complete."""
    partial = path.with_name(f"{path.name}.partial")
    arch = model.architecture
    writer = gguf.GGUFWriter(partial, "llama")
    keys = {
        "context_length": arch.max_context, "embedding_length": arch.d_model, "block_count": arch.n_layers,
        "feed_forward_length": arch.n_neurons, "attention.head_count": arch.n_heads,
        "attention.head_count_kv": arch.n_kv_heads, "attention.key_length": arch.head_dim,
        "attention.value_length": arch.head_dim, "rope.dimension_count": arch.head_dim,
        "rope.freq_base": arch.rope.theta, "attention.layer_norm_rms_epsilon": arch.norm_eps,
    }  # fmt: skip
    pairs = {f"llama.{key}": value for key, value in keys.items()} | letters(arch.vocab_size)
    for key, value in (pairs | {"pi2.hidden_act": arch.activation}).items():
        add(writer, key, value)
    tensors = list(_tensors(model))
    for name, shape, kind, _ in tensors:
        nbytes = int(np.prod(shape)) * (4 if kind is Type.F32 else 18) // (1 if kind is Type.F32 else BLOCK)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, _, _, made in tensors:
        writer.write_tensor_data(made())
    writer.close()
    partial.rename(path)


def _tensors(model: PiModel) -> Iterator[tuple[str, tuple[int, int] | tuple[int], Type, Made]]:
    """GGUF's name, shape, type and how to make the data, in the order of the file."""
    arch = model.architecture
    d, n = arch.d_model, arch.n_neurons

    def matrix(name: str, own: str, heads: int = 0) -> tuple[str, tuple[int, int], Type, Made]:
        shape = model.matrix(own).shape
        return f"{name}.weight", shape, Type.Q4_0, lambda: interleaved(_rope_order(model.matrix(own), heads))

    def norm(name: str, own: str) -> tuple[str, tuple[int], Type, Made]:
        return f"{name}.weight", (d,), Type.F32, lambda: model.vector(f"{own}.weight").copy()

    yield matrix("token_embd", "embed.weight")
    for i in range(arch.n_layers):
        at, own = f"blk.{i}", f"layers.{i}"
        yield norm(f"{at}.attn_norm", f"{own}.attn.norm")
        yield matrix(f"{at}.attn_q", f"{own}.attn.q.weight", arch.n_heads)
        yield matrix(f"{at}.attn_k", f"{own}.attn.k.weight", arch.n_kv_heads)
        yield matrix(f"{at}.attn_v", f"{own}.attn.v.weight")
        yield matrix(f"{at}.attn_output", f"{own}.attn.o.weight")
        yield norm(f"{at}.ffn_norm", f"{own}.ffn.norm")
        yield f"{at}.ffn_gate.weight", (n, d), Type.Q4_0, lambda i=i: interleaved(_segment(model, i, "gate"))
        yield f"{at}.ffn_up.weight", (n, d), Type.Q4_0, lambda i=i: interleaved(_segment(model, i, "up"))
        yield f"{at}.ffn_down.weight", (d, n), Type.Q4_0, lambda i=i: transposed(_segment(model, i, "down"))
    yield norm("output_norm", "final_norm")
    yield matrix("output", "head.weight")


def _segment(model: PiModel, layer: int, name: str) -> Tensor:
    offset, size = model.geometry.segments()[name]
    return Tensor(model.bundles(layer)[:, offset : offset + size], "q4_0", model.geometry.d_model)


def _rope_order(tensor: Tensor, heads: int) -> Tensor:
    """Rows as llama.cpp's ``llama`` wants them: RoPE pairs neighbours there, halves of a head in pi2."""
    if not heads:
        return tensor
    rows = tensor.data.reshape(heads, 2, tensor.rows // heads // 2, -1).swapaxes(1, 2)
    return Tensor(np.ascontiguousarray(rows).reshape(tensor.data.shape), tensor.dtype, tensor.cols)


def _parts(tensor: Tensor) -> tuple[U8, U8]:
    """Quants (rows, blocks, 16) and the two bytes of each scale (rows, blocks, 2)."""
    blocks = tensor.cols // BLOCK
    quants, scales = tensor.data[:, : blocks * HALF], tensor.data[:, blocks * HALF :]
    return quants.reshape(-1, blocks, HALF), scales.reshape(-1, blocks, 2)


def interleaved(tensor: Tensor) -> U8:
    """q4_0 rows of pi2 in GGUF's order: each block's scale before its quants."""
    assert tensor.dtype == "q4_0"
    quants, scales = _parts(tensor)
    return np.concatenate((scales, quants), axis=2)


def transposed(tensor: Tensor) -> U8:
    """(neurons, d) as rows of (d, neurons): the same values, where a block of columns has one scale."""
    quants, scales = _parts(tensor)
    assert (scales == scales[0]).all(), "the matrix has no common scales, so it cannot be turned exactly"
    neurons = len(quants)
    assert neurons % BLOCK == 0
    values = np.concatenate((quants & 15, quants >> 4), axis=2).reshape(neurons, -1)  # nibbles (neurons, d)
    turned = np.ascontiguousarray(values.T).reshape(-1, neurons // BLOCK, 2, HALF)  # (d, blocks, 2, 16)
    packed = turned[:, :, 0] | turned[:, :, 1] << 4
    column = np.repeat(scales[0], BLOCK, axis=0)  # (d, 2)
    return np.concatenate((np.repeat(column[:, None], neurons // BLOCK, axis=1), packed), axis=2)
