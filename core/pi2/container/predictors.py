"""``predictors.safetensors``: two small layers an FFN that guess its active neurons (PowerInfer §5.1).

Neuron i of FFN N may be active for input x (d,) iff ``(fc2 @ relu(fc1 @ x + b1) + b2)[i] > threshold``.
For every layer N that has a predictor, of a width of its own:

    layers.N.ffn.fc1.weight   (width, d)          layers.N.ffn.fc1.bias    F32 (width,)
    layers.N.ffn.fc2.weight   (neurons, width)    layers.N.ffn.fc2.bias    F32 (neurons,)
                                                  layers.N.ffn.threshold   F32 (1,)

Weights lie as in ``dense.safetensors``: F32, F16, or U8 rows of q8_0 or q4_0, and ``metadata[name]`` is
their format.  A layer without tensors has no predictor: all its neurons are asked.  Further metadata:

    format     "pi2 predictors 1"
    model      SHA-256 of the ``neurons.safetensors`` that the predictors were made for
    sha256     of everything behind the header
    measured   JSON: {"loss": share by which the perplexity rises, e^KL - 1, or null,
               "layers": {"N": [density, predicted density, recall]}}, on text not trained on
    training   JSON: texts that say how they were made
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from pi2.architecture import Architecture
from pi2.bundle import PAGE
from pi2.container.layout import NEURONS, stored_shape
from pi2.container.manifest import read_manifest
from pi2.container.safetensors_file import Header, build_header, parse_json, read_header
from pi2.errors import FormatError
from pi2.inventory import ffn_name
from pi2.tensor import DTYPES, F32, U8, Tensor

PREDICTORS: Final = "predictors.safetensors"
FORMAT: Final = "pi2 predictors 1"
TRAIN_HINT: Final = "make them: pi2 train-predictor MODEL TEXT..."
_HINT = "remove the file, and make it again: pi2 train-predictor MODEL TEXT..."
_MAX_HEADER = 1 << 22  # bytes; a layer takes about 700
_MAX_WIDTH = 1 << 14
_NAME = re.compile(r"layers\.(0|[1-9]\d{0,3})\.ffn\.(fc1\.weight|fc1\.bias|fc2\.weight|fc2\.bias|threshold)")
_PARTS = 5


@dataclass(frozen=True, slots=True)
class Measured:
    """What a predictor did on held-out text, as shares of (token, neuron) pairs."""

    density: float
    predicted_density: float
    recall: float
    """Share of the active that were named."""


@dataclass(frozen=True, slots=True)
class FfnPredictor:
    """The predictor of one FFN.  fc1 (width, d), fc2 (neurons, width), biases (width,) and (neurons,)."""

    fc1: Tensor
    fc1_bias: F32
    fc2: Tensor
    fc2_bias: F32
    threshold: float
    measured: Measured | None = None

    @property
    def width(self) -> int:
        return self.fc1.rows

    @property
    def nbytes(self) -> int:
        """Bytes in memory, which every token reads."""
        arrays = (self.fc1.data, self.fc1_bias, self.fc2.data, self.fc2_bias)
        return sum(array.nbytes for array in arrays)


@dataclass(slots=True)
class Predictors:
    """The predictors of a model, by layer."""

    model: str
    """SHA-256 of the model's ``neurons.safetensors``."""
    layers: dict[int, FfnPredictor]
    loss: float | None = None
    """By how much the perplexity rises on held-out text, as a share: e^KL - 1 of the mean divergence KL from
    the dense model, of which a difference of perplexities is a noisy estimate.  None if not measured.
    """
    training: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers.values())

    def save(self, path: Path) -> None:
        """Write the file, in the order of the layers.  Raises OSError."""
        arrays: dict[str, tuple[str, tuple[int, ...], U8]] = {}
        metadata = {"format": FORMAT, "model": self.model, "training": json.dumps(self.training)}
        metadata["measured"] = json.dumps({"loss": self.loss, "layers": self._measured()})
        for number, layer in sorted(self.layers.items()):
            at = ffn_name(number)
            for name, tensor in (("fc1", layer.fc1), ("fc2", layer.fc2)):
                metadata[f"{at}.{name}.weight"] = tensor.dtype
                arrays[f"{at}.{name}.weight"] = (*stored_shape(tensor.dtype, *tensor.shape), tensor.data)
            vectors = {"fc1.bias": layer.fc1_bias, "fc2.bias": layer.fc2_bias}
            vectors["threshold"] = np.array([layer.threshold], np.float32)
            for name, vector in vectors.items():
                arrays[f"{at}.{name}"] = "F32", vector.shape, vector.view(np.uint8)
        # whole words first, so that they are aligned; a sort keeps the order of layers
        ordered = dict(sorted(arrays.items(), key=lambda item: item[1][0] != "F32"))
        digest = hashlib.sha256()
        for _, _, data in ordered.values():
            digest.update(np.ascontiguousarray(data).data)
        metadata["sha256"] = digest.hexdigest()
        head, _ = build_header({n: (kind, shape) for n, (kind, shape, _) in ordered.items()}, metadata, PAGE)
        with path.open("wb") as f:
            f.write(head)
            for _, _, data in ordered.values():
                f.write(np.ascontiguousarray(data).data)

    def _measured(self) -> dict[str, list[float]]:
        found = {number: layer.measured for number, layer in sorted(self.layers.items())}
        return {str(number): [m.density, m.predicted_density, m.recall] for number, m in found.items() if m}

    @classmethod
    def load(cls, path: Path, arch: Architecture, model: str) -> Self:
        """Read back ``save`` for the model with this hash, treating the file as hostile.

        The weights are read into memory and compared with their checksum.  Raises FormatError, OSError.
        """
        header = read_header(path, _MAX_HEADER)
        try:
            return cls._load(path, header, arch, model)
        except FormatError as e:
            raise FormatError(f"{path}: {e}", hint=e.hint or _HINT) from None

    @classmethod
    def _load(cls, path: Path, header: Header, arch: Architecture, model: str) -> Self:
        metadata = header.metadata
        if metadata.get("format") != FORMAT:
            raise FormatError(f"its format is {metadata.get('format', '')[:40]!r}, not {FORMAT!r}")
        if metadata.get("model") != model:
            raise FormatError("the predictors were made for another model", hint=_HINT)
        numbers = _layer_numbers(header, arch)
        loss, measured = _parse_measured(metadata)
        training = parse_json(metadata.get("training", "{}").encode(), "training")
        data = np.fromfile(path, np.uint8, offset=header.data_start)
        if hashlib.sha256(data.data).hexdigest() != metadata.get("sha256"):
            raise FormatError("the checksum of the weights is wrong")
        layers = {n: _layer(header, data, arch, n, measured.get(n)) for n in numbers}
        return cls(model, layers, loss, {str(k): str(v) for k, v in training.items()})


def model_predictors(path: Path, arch: Architecture, file: Path | None = None) -> Predictors:
    """The predictors of the pi2 model in directory ``path``, or those in ``file`` made for it.

    Raises FormatError, with the command that trains them if there are none.
    """
    manifest = read_manifest(path)
    if file is None:
        if PREDICTORS not in manifest.files:
            raise FormatError(f"{path}: the model has no predictors", hint=TRAIN_HINT)
        file = path / PREDICTORS
    try:
        return Predictors.load(file, arch, manifest.files[NEURONS].sha256)
    except OSError as e:
        raise FormatError(f"{file}: {e.strerror or e}", hint=TRAIN_HINT) from None


def _layer_numbers(header: Header, arch: Architecture) -> list[int]:
    """The layers of the file, ascending, each of which has all its tensors and no other."""
    parts: dict[int, set[str]] = {}
    for name in header.entries:
        match = _NAME.fullmatch(name)
        if match is None or int(match[1]) >= arch.n_layers:
            raise FormatError(f"it has an unknown tensor {name[:80]!r}")
        parts.setdefault(int(match[1]), set()).add(match[2])
    torn = [n for n, found in parts.items() if len(found) != _PARTS]
    if torn:
        raise FormatError(f"the predictor of layer {min(torn)} is incomplete")
    return sorted(parts)


def _layer(
    header: Header, data: U8, arch: Architecture, number: int, measured: Measured | None
) -> FfnPredictor:
    at = ffn_name(number)
    shape = header.entries[f"{at}.fc1.weight"].shape
    width = shape[0] if shape else 0
    if not 0 < width <= _MAX_WIDTH:
        raise FormatError(f"the predictor of layer {number} has the impossible width {width}")

    def take(name: str, stored: str, wanted: tuple[int, ...]) -> U8:
        entry = header.entries[name]
        if (entry.dtype, entry.shape) != (stored, wanted):
            raise FormatError(f"{name} is {entry.dtype} {entry.shape}, not {stored} {wanted}")
        start = entry.offset - header.data_start
        return data[start : start + entry.nbytes]

    def tensor(name: str, rows: int, cols: int) -> Tensor:
        dtype = header.metadata.get(f"{at}.{name}.weight")
        if dtype not in DTYPES:
            raise FormatError(f"the metadata does not give the format of {at}.{name}.weight")
        taken = take(f"{at}.{name}.weight", *stored_shape(dtype, rows, cols))
        return Tensor(taken.reshape(rows, -1), dtype, cols)

    def vector(name: str, length: int) -> F32:
        values = take(f"{at}.{name}", "F32", (length,)).view(np.float32)
        if not np.isfinite(values).all():
            raise FormatError(f"{at}.{name} holds what is no number")
        return values

    return FfnPredictor(
        tensor("fc1", width, arch.d_model),
        vector("fc1.bias", width),
        tensor("fc2", arch.n_neurons, width),
        vector("fc2.bias", arch.n_neurons),
        float(vector("threshold", 1)[0]),
        measured,
    )


def _parse_measured(metadata: Mapping[str, str]) -> tuple[float | None, dict[int, Measured]]:
    raw = parse_json(metadata.get("measured", "").encode(), "measured")
    loss, layers = raw.get("loss"), raw.get("layers")
    if not (loss is None or _is_number(loss)) or not isinstance(layers, dict):
        raise FormatError("what was measured is malformed")
    found: dict[int, Measured] = {}
    for number, shares in layers.items():
        honest = isinstance(shares, list) and len(shares) == 3 and all(map(_is_share, shares))
        if not honest or not number.isdecimal() or len(number) > 4:
            raise FormatError("what was measured is malformed")
        found[int(number)] = Measured(*map(float, shares))
    return loss, found


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # False for a NaN


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1
