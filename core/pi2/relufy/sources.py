"""Models to take apart and to write: a pi2 model as the source of another, and a twin as one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from pi2.api import ModelSource
from pi2.container.reader import PiModel
from pi2.tensor import F32, Tensor

_NEURONS = re.compile(r"layers\.(\d+)\.ffn\.(gate|up|down)\.(weight|bias)")


class PiModelSource(ModelSource):
    """An opened pi2 model.  Weights read as they are stored, so rounded."""

    def __init__(self, model: PiModel) -> None:
        self._model = model
        self.architecture = model.architecture
        self.provenance = dict(model.manifest.source)
        self.notes = model.manifest.notes

    def tensor(self, name: str) -> Tensor:
        place = _NEURONS.fullmatch(name)
        if place is None:
            return self._model.matrix(name)
        bundles = self._model.bundles(int(place[1]))
        return Tensor.from_f32(self._model.geometry.unpack_segment(bundles, place[2]))

    def vector(self, name: str) -> F32:
        place = _NEURONS.fullmatch(name)
        if place is None or place[2] == "down":
            return self._model.vector(name)
        values = self._model.geometry.unpack_segment(self._model.bundles(int(place[1])), "bias")
        return values[:, 0 if place[2] == "gate" else -1]

    def tokenizer_json(self) -> str:
        return self._model.tokenizer_json

    def chat_template(self) -> str | None:
        return self._model.chat_template


class TwinSource(ModelSource):
    """A model with some weights replaced, and ReLU for its activation function."""

    def __init__(self, original: ModelSource, weights: Mapping[str, F32], notes: Sequence[str]) -> None:
        self._original, self._weights = original, weights
        self.architecture = dataclasses.replace(original.architecture, activation="relu")
        self.provenance = {**original.provenance, "relufied": f"{original.architecture.activation} to relu"}
        self.notes = (*original.notes, *notes)

    def tensor(self, name: str) -> Tensor:
        values = self._weights.get(name)
        return self._original.tensor(name) if values is None else Tensor.from_f32(values)

    def vector(self, name: str) -> F32:
        values = self._weights.get(name)
        return self._original.vector(name) if values is None else values

    def tokenizer_json(self) -> str:
        return self._original.tokenizer_json()

    def chat_template(self) -> str | None:
        return self._original.chat_template()
