"""Predictors that others trained, for a pi2 model of the same weights.

    PowerInfer    a GGUF with ``blk.N.fc1.weight`` (width, d) and ``blk.N.fc2.weight`` (neurons, width), or
                  a directory of ``model_N.pt``, each with ``fc1.weight`` and ``fc2.weight``
    TurboSparse,  a Hugging Face directory whose checkpoint has ``model.layers.N.mlp.predictor.fc1.weight``
    Bamboo        and ``.fc2.weight``

All say "active" where ``fc2 @ relu(fc1 @ x)`` is above a threshold, by default 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from pi2.architecture import Architecture
from pi2.container.predictors import FfnPredictor
from pi2.errors import FormatError, OptionError, StorageError, UnsupportedModel
from pi2.extras import require_torch
from pi2.formats.checkpoint import Checkpoint
from pi2.formats.gguf import GgufFile
from pi2.formats.gguf_blocks import decode_rows
from pi2.tensor import BLOCK, F32, DType, Tensor, decode

_MAX_WIDTH = 1 << 14
_GGUF = re.compile(r"blk\.(\d{1,4})\.fc([12])\.weight")
_PT = re.compile(r"model_(\d{1,4})\.pt")
_CHECKPOINT = re.compile(r"(?:model\.)?layers\.(\d{1,4})\.(?:mlp|ffn)\.predictor\.fc([12])\.weight")
_EXPERTS = re.compile(r".*\.experts\.\d+\.predictor\.fc[12]\.weight")
_HINT = "give a PowerInfer GGUF, a directory of model_N.pt, or a checkpoint with predictors"

Shape = tuple[int, ...]
Weights = dict[int, dict[int, tuple[Shape, Callable[[], F32]]]]
"""Layer -> 1 or 2 -> shape of fc1 or fc2, and what reads it."""


def import_predictors(path: Path, arch: Architecture, dtype: DType) -> dict[int, FfnPredictor]:
    """The predictors in ``path``, stored as ``dtype``, with a threshold of 0 and not measured.

    Widths are filled up with zeros to a multiple of 32.  Raises Pi2Error if there are none, or if they
    are of another architecture.
    """
    found = _find(path)
    if not found:
        raise FormatError(f"{path} holds no predictors", hint=_HINT)
    layers = {}
    for number in sorted(found):
        layers[number] = _layer(path, number, found[number], arch, dtype)
    return layers


def _find(path: Path) -> Weights:
    if path.is_dir():
        return _pt_files(path) or _checkpoint(path)
    if not path.is_file():
        raise StorageError("no such file or directory", path=path, hint=_HINT)
    return _gguf(path)


def _gguf(path: Path) -> Weights:
    file = GgufFile(path, powerinfer=True)
    found: Weights = {}
    for name, info in file.tensors.items():
        if match := _GGUF.fullmatch(name):
            part = found.setdefault(int(match[1]), {})
            part[int(match[2])] = info.shape, partial(decode_rows, file.data(info), info.type)
    return found


def _checkpoint(path: Path) -> Weights:
    if not any(path.glob("*.safetensors")):
        return {}
    weights = Checkpoint(path)
    found: Weights = {}
    for name in weights:
        if _EXPERTS.fullmatch(name):
            raise UnsupportedModel(
                f"{path} has a predictor for every expert", hint="pi2 has no models with experts yet"
            )
        if match := _CHECKPOINT.fullmatch(name):
            part = found.setdefault(int(match[1]), {})
            part[int(match[2])] = weights.shape(name), partial(_matrix, weights, name)
    return found


def _matrix(weights: Checkpoint, name: str) -> F32:
    weights.check(name, weights.shape(name))
    data, dtype, _ = weights.rows(name)
    return decode(data, dtype)


def _pt_files(path: Path) -> Weights:
    """By the number in the name: sorted as texts, 10 would come before 2."""
    numbered = {int(m[1]): file for file in path.iterdir() if (m := _PT.fullmatch(file.name))}
    if not numbered:
        return {}
    require_torch("reading .pt files")
    return {number: dict(_pt_file(file)) for number, file in sorted(numbered.items())}


def _pt_file(file: Path) -> Iterator[tuple[int, tuple[Shape, Callable[[], F32]]]]:
    import pickle

    import torch

    try:
        state = torch.load(file, map_location="cpu", weights_only=True)  # nothing but tensors is unpickled
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as e:
        raise FormatError(f"{file} is no PyTorch file of tensors: {str(e)[:80]!r}", hint=_HINT) from None
    if not isinstance(state, Mapping):
        raise FormatError(f"{file} does not hold named tensors", hint=_HINT)
    for part in (1, 2):
        tensor = state.get(f"fc{part}.weight")
        if isinstance(tensor, torch.Tensor):
            values = tensor.float().contiguous().numpy()
            yield part, (values.shape, partial(np.asarray, values))


def _layer(
    path: Path,
    number: int,
    parts: dict[int, tuple[Shape, Callable[[], F32]]],
    arch: Architecture,
    dtype: DType,
) -> FfnPredictor:
    if number >= arch.n_layers or set(parts) != {1, 2}:
        raise FormatError(
            f"{path}: the predictor of layer {number} is incomplete, or of no layer", hint=_HINT
        )
    (first, read_fc1), (second, read_fc2) = parts[1], parts[2]
    width = first[0] if first else 0
    wanted = (width, arch.d_model), (arch.n_neurons, width)
    if (first, second) != wanted or not 0 < width <= _MAX_WIDTH:
        raise OptionError(
            f"{path}: layer {number} has predictors of {list(first)} and {list(second)},"
            f" not of {arch.d_model} inputs and {arch.n_neurons} neurons",
            hint="they belong to another model",
        )
    fc1, fc2 = read_fc1(), read_fc2()
    if not (np.isfinite(fc1).all() and np.isfinite(fc2).all()):
        raise FormatError(f"{path}: the predictor of layer {number} holds what is no number")
    missing = math.ceil(width / BLOCK) * BLOCK - width
    fc1, fc2 = np.pad(fc1, ((0, missing), (0, 0))), np.pad(fc2, ((0, 0), (0, missing)))
    biases = np.zeros(len(fc1), np.float32), np.zeros(arch.n_neurons, np.float32)
    return FfnPredictor(Tensor.from_f32(fc1, dtype), biases[0], Tensor.from_f32(fc2, dtype), biases[1], 0.0)
