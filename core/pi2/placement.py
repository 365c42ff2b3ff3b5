"""The order in which neurons lie on flash: those that are read together lie together, so that reads merge.

Neurons are ranked by how often they fire; within bands of similar rank they form a path along which
neighbours fire together (a greedy one, as in Ripple, arXiv 2410.19274 §4).  A model with its neurons in
another order computes the same sums in another order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pi2 import inventory
from pi2.activation_counts import ActivationCounts
from pi2.activity import Active
from pi2.api import ModelSource
from pi2.container.layout import NEURONS, QuantPlan
from pi2.container.manifest import read_manifest
from pi2.container.predictors import PREDICTORS, FfnPredictor, Predictors, model_predictors
from pi2.container.reader import PiModel
from pi2.container.writer import replace_file
from pi2.convert import Progress, convert
from pi2.errors import FormatError
from pi2.statistics_file import STATISTICS, Statistics
from pi2.tensor import F32, Tensor

BAND: Final = 512
"""Neurons of similar rank that are ordered among themselves."""

Order = NDArray[np.int64]
"""(neurons,): ``order[i]`` is the number that the neuron at place i had before."""


def reading_order(frequency: NDArray[np.float64], active: Active) -> Order:
    """The order for one FFN: ``frequency`` (neurons,), a sample of active sets (tokens, neurons)."""
    ranked = np.argsort(-frequency, kind="stable")
    bands = [_path(active[:, ranked[i : i + BAND]]) + i for i in range(0, len(ranked), BAND)]
    return ranked[np.concatenate(bands)]


def _path(active: Active) -> Order:
    """A path through neurons (tokens, k) that begins at 0 and goes on to whoever fires most alike."""
    fired = active.astype(np.float32)
    both = fired.T @ fired  # (k, k): tokens at which both fired
    alone = np.diagonal(both)
    alike = both / np.maximum(alone[:, None] + alone - both, 1)
    path = np.zeros(len(alone), np.int64)
    alike[:, 0] = -1  # whoever is on the path is nobody's next
    for place in range(1, len(path)):
        path[place] = np.argmax(alike[path[place - 1]])
        alike[:, path[place]] = -1
    return path


def reads(active: Active, resident: Active) -> float:
    """Reads a token, runs of neighbours being one: ``active`` (tokens, neurons), ``resident`` (neurons,)."""
    missing = active & ~resident
    begins = missing & ~np.pad(missing, ((0, 0), (1, 0)))[:, :-1]
    return float(begins.sum(axis=1).mean()) if len(missing) else 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """Orders of all FFNs, and reads a token and FFN if the more frequent half is resident."""

    orders: list[Order]
    reads_before: float
    reads_after: float


def place(counts: ActivationCounts) -> Placement:
    """Orders from one half of the sampled tokens, judged on the other."""
    frequency = np.nan_to_num(counts.frequency[:, 0])
    orders, before, after = [], [], []
    for layer, each in enumerate(frequency):
        active = counts.sketch.active(layer)
        order = reading_order(each, active[::2])
        resident = np.zeros(len(each), np.bool_)
        resident[np.argsort(-each, kind="stable")[: len(each) // 2]] = True
        before.append(reads(active[1::2], resident))
        after.append(reads(active[1::2][:, order], resident[order]))
        orders.append(order)
    return Placement(orders, float(np.mean(before)), float(np.mean(after)))


class PlacedModel(ModelSource):
    """A pi2 model with its neurons in other orders, as a source for ``pi2.convert``: all values exact."""

    def __init__(self, model: PiModel, orders: list[Order]) -> None:
        self.architecture = model.architecture
        digest = hashlib.sha256(np.stack(orders).data).hexdigest()  # a stopped conversion is of one order
        self.provenance = {**model.manifest.source, "placed": f"neurons in reading order {digest[:12]}"}
        self.notes = model.manifest.notes
        self._model = model
        self._ffns = {
            name: (layer, segment, order)
            for layer, order in enumerate(orders)
            for segment, name in inventory.neuron_matrices(model.architecture, layer).items()
        }
        self._biases = {
            name: (layer, number, order)
            for layer, order in enumerate(orders)
            for number, name in enumerate(inventory.neuron_biases(model.architecture, layer))
        }

    def plan(self) -> QuantPlan:
        """The formats that the model has."""
        kinds = dict(self._model.manifest.quantisation)
        missing = {"gate": kinds["up"], "head": kinds["embed"]}
        return QuantPlan.named(kinds["up"], **(missing | kinds))

    def tensor(self, name: str) -> Tensor:
        if name not in self._ffns:
            return self._model.matrix(name)
        layer, segment, order = self._ffns[name]
        g = self._model.geometry
        offset, size = g.segments()[segment]
        bundles = self._model.bundles(layer)
        return Tensor(bundles[order, offset : offset + size], getattr(g, segment), g.d_model)

    def vector(self, name: str) -> F32:
        if name not in self._biases:
            return self._model.vector(name)
        layer, number, order = self._biases[name]
        biases = self._model.geometry.unpack_segment(self._model.bundles(layer), "bias")
        return np.ascontiguousarray(biases[order, number])

    def tokenizer_json(self) -> str:
        return self._model.tokenizer_json

    def chat_template(self) -> str | None:
        return self._model.chat_template


def placed_statistics(found: Statistics, orders: list[Order], model: str) -> Statistics:
    """The same statistics of the model with this checksum, whose neurons lie in these orders."""
    counts, thresholds = found.counts, found.thresholds
    if counts is not None:
        sets = [
            np.packbits(counts.sketch.active(layer)[:, order], axis=1) for layer, order in enumerate(orders)
        ]
        sketch = dataclasses.replace(counts.sketch, sets=np.stack(sets))
        ordered = np.stack([each[:, order] for each, order in zip(counts.counts, orders, strict=True)])
        counts = dataclasses.replace(counts, model=model, counts=ordered, sketch=sketch)
    if thresholds is not None:
        weights = np.stack([each[order] for each, order in zip(thresholds.weights, orders, strict=True)])
        thresholds = dataclasses.replace(thresholds, model=model, weights=weights)
    return Statistics(counts, thresholds)


def placed_predictors(found: Predictors, orders: list[Order], model: str) -> Predictors:
    """The same predictors for the model with this checksum, whose neurons lie in these orders."""

    def ordered(layer: FfnPredictor, order: Order) -> FfnPredictor:
        fc2 = Tensor(layer.fc2.data[order], layer.fc2.dtype, layer.fc2.cols)
        return dataclasses.replace(layer, fc2=fc2, fc2_bias=layer.fc2_bias[order])

    layers = {number: ordered(layer, orders[number]) for number, layer in found.layers.items()}
    return dataclasses.replace(found, model=model, layers=layers)


def place_model(
    model: PiModel, destination: Path, progress: Progress | None = None, *, overwrite: bool = False
) -> Placement:
    """Write ``model`` to ``destination`` with its neurons in reading order; the weights stay the same.

    Statistics and predictors go along.  Raises FormatError if the statistics have no sample of active
    sets, and what ``pi2.convert.convert`` raises.
    """
    found = Statistics.of_file(model.path / STATISTICS, model.manifest.files[NEURONS].sha256)
    if found.counts is None or found.counts.sketch.tokens < 2:
        raise FormatError(
            f"{model.path}: nothing is known of which neurons fire together",
            hint=f"count first: pi2 collect {shlex.quote(str(model.path))} TEXT...",
        )
    placement = place(found.counts)
    source = PlacedModel(model, placement.orders)
    convert(source, destination, source.plan(), progress, overwrite=overwrite, page=model.geometry.page)
    placed = read_manifest(destination).files[NEURONS].sha256
    replace_file(destination, STATISTICS, placed_statistics(found, placement.orders, placed).save)
    if PREDICTORS in model.manifest.files:
        predictors = model_predictors(model.path, model.architecture)
        replace_file(destination, PREDICTORS, placed_predictors(predictors, placement.orders, placed).save)
    return placement
