"""Opening a model that an accelerator and the CPU share: which clusters are hot, and bringing them there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pi2.accelerator import SupportsAsyncFfn
from pi2.api import Backend, FfnSpec, StorageTier
from pi2.errors import OptionError
from pi2.ffns import Ffns
from pi2.hot import HotClusters, activations, hottest_first
from pi2.hybrid import HybridFfns, HybridOptions
from pi2.inventory import dense_matrices
from pi2.memory import give_back_unused
from pi2.offload_setup import read_neurons
from pi2.plugins import Plugins, probe
from pi2.tensor import U8, Ids
from pi2.trace import TraceWriter

if TYPE_CHECKING:
    from pi2.container.reader import PiModel


def is_accelerator(backend: type) -> bool:
    """Whether a class of backends computes FFNs in the background."""
    return issubclass(backend, SupportsAsyncFfn)


def beside(plugins: Plugins, accelerator: str) -> str:
    """The best backend for what the accelerator leaves: none that is one itself.  Raises OptionError."""
    able = {
        name: probe(cls).score
        for name, cls in plugins.of("backends").items()
        if name != accelerator and not is_accelerator(cls)
    }
    best = max(able, key=lambda name: able[name], default=None)
    if best is None or able[best] <= 0:
        raise OptionError(
            f"no backend can compute beside {accelerator}", hint="see pi2 plugins, or name one with --cold"
        )
    return best


@dataclass(slots=True)
class Hybrid:
    """An accelerator that shares a model with another backend, and how."""

    accelerator: Backend
    options: HybridOptions


def hot_bundles(model: PiModel, neurons: Ids, ffn: int) -> U8:
    """The bundles (k, stride) of some neurons of an FFN that is in memory; a view where they are in order."""
    bundles = model.bundles(ffn)
    in_order = neurons[0] == 0 and bool(np.all(np.diff(neurons) == 1))
    return bundles[: len(neurons)] if in_order else bundles[neurons]


class HotPart:
    """Which neurons are an accelerator's, or may become so: the first ``capacity`` of each order."""

    def __init__(self, model: PiModel, options: HybridOptions, *, resident: bool) -> None:
        """``resident``: all weights are in memory."""
        arch = model.architecture
        self.notes: list[str] = []
        counted = activations(model, self.notes)
        counts = None if counted is None else counted[0]
        self.by_statistics = counts is not None
        if counts is None:
            self.notes.append(
                "the model has no statistics: which clusters are hot goes by the number of the neuron"
                " (pi2 collect counts what is active)"
            )
        self.clusters = HotClusters(hottest_first(counts, arch.n_layers, arch.n_neurons), options.cluster)
        most = options.hot if options.most is None else options.most
        whole = resident and options.prefill == "accelerator"
        self.capacity = self.clusters.neurons(1 if whole else most)


class Placed:
    """The hot clusters of a model on the accelerator: as many as will ever be hot."""

    def __init__(self, model: PiModel, hybrid: Hybrid, *, resident: bool) -> None:
        """Decides which they are; nothing is placed yet.  ``resident``: all weights are in memory."""
        arch, options = model.architecture, hybrid.options
        part = HotPart(model, options, resident=resident)
        self.notes, self.by_statistics = part.notes, part.by_statistics
        self.hot, self.capacity = part.clusters, part.capacity
        self.nbytes = arch.n_layers * self.capacity * model.geometry.stride
        """Of their bundles."""
        self.options = options
        self._model, self._accelerator = model, hybrid.accelerator

    def weights(self, model: PiModel) -> int:
        """Bytes of all that the accelerator has at once, if FFNs stay on flash."""
        nbytes, arch = self.nbytes, model.architecture
        if self.options.attention == "accelerator":
            names = (name for name in dense_matrices(arch) if ".attn." in name)
            nbytes += sum(model.matrix(name).data.nbytes for name in names)
        if self.options.prefill == "accelerator":
            nbytes += arch.n_neurons * model.geometry.stride
        return nbytes

    def place(self, tier: StorageTier | None) -> list[Any]:
        """A handle for each FFN.  ``tier``: where bundles are read from if none are in memory."""
        arch, backend = self._model.architecture, self._accelerator
        if self.capacity == 0:
            return [None] * arch.n_layers
        spec = FfnSpec(self._model.geometry, arch.activation, arch.up_relu)
        handles = []
        for ffn, order in enumerate(self.hot.orders):
            handles.append(backend.place_ffn(self._bundles(ffn, order[: self.capacity], tier), spec))
        give_back_unused()
        return handles

    def _bundles(self, ffn: int, neurons: Ids, tier: StorageTier | None) -> U8:
        if tier is not None:
            back = np.argsort(neurons)
            found = read_neurons(tier, self._model.ffn_place(ffn), neurons[back], self._model.geometry.stride)
            return found[np.argsort(back)]
        return hot_bundles(self._model, neurons, ffn)

    def ffns(self, cold: Ffns, handles: list[Any], trace: TraceWriter | None) -> HybridFfns:
        """Both halves as one."""
        ffns = HybridFfns(self._accelerator, handles, self.capacity, self.hot, cold, self.options, trace)
        ffns.notes[:0] = self.notes
        return ffns

    def describe(self, ffns: HybridFfns, cold: Backend) -> dict[str, Any]:
        """For ``--json``: what runs where, and how well the halves met so far."""
        count, options = ffns.count, self.options
        return {
            "accelerator": self._accelerator.name,
            "cpu": cold.name,
            "hot": ffns.share,
            "hot_neurons": self.hot.neurons(ffns.share),
            "neurons": len(self.hot.orders[0]),
            "clusters_by": "statistics" if self.by_statistics else "number of the neuron",
            "accelerator_bytes": self.nbytes,
            "attention": "cpu" if ffns.lost else options.attention,
            "prefill": "cpu" if ffns.lost else options.prefill,
            "lm_head": "cpu",
            "predictor": "cpu",
            "decode_s": {
                "hot": count.hot_s, "cold": count.cold_s, "both": count.overlap_s, "wait": count.wait_s
            },
            "graphs": {"used": count.graphs, "waited_s": count.graph_wait_s},
        }  # fmt: skip
