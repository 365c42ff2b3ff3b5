"""The weights of a model in training: what is trained, and what that is rounded to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from pi2 import inventory
from pi2.api import ModelSource
from pi2.architecture import Architecture
from pi2.container.layout import Layout
from pi2.relufy.network import Network
from pi2.relufy.rounding import rounded
from pi2.tensor import F32, DType

_FROZEN = ("embed.", "head.")


def trained(name: str) -> bool:
    """Whether a weight is trained: all but embedding and head are."""
    return not name.startswith(_FROZEN)


def load_weights(source: ModelSource) -> dict[str, Tensor]:
    """All weights of a model as float32, by canonical name."""
    arch = source.architecture
    weights = {name: _tensor(source.tensor(name).to_f32()) for name in inventory.dense_matrices(arch)}
    weights |= {name: _tensor(source.vector(name)) for name in inventory.dense_vectors(arch)}
    for layer in range(arch.n_layers):
        for name in inventory.neuron_matrices(arch, layer).values():
            weights[name] = _tensor(source.tensor(name).to_f32())
        for name in inventory.neuron_biases(arch, layer):
            weights[name] = _tensor(source.vector(name))
    return weights


def _tensor(values: F32) -> Tensor:
    return torch.from_numpy(np.array(values, np.float32))  # a copy: the source's may be read-only


def dtypes_of(layout: Layout, arch: Architecture) -> dict[str, DType]:
    """Storage format of every matrix by canonical name; vectors stay f32."""
    dtypes = dict(layout.dtypes)
    for layer in range(arch.n_layers):
        for part, name in inventory.neuron_matrices(arch, layer).items():
            dtypes[name] = getattr(layout.geometry, part)
    return dtypes


class Twin:
    """Weights that begin as another model's.  ``masters`` are trained; the network sees ``shown``.

    Rounding lies in the forward pass and gradients go straight through it (quantisation-aware training):
    without that a small model loses to q4_0 what the distillation gained.  Embedding and head are not
    trained; what is not rounded is not copied.
    """

    def __init__(
        self, arch: Architecture, weights: Mapping[str, Tensor], dtypes: Mapping[str, DType]
    ) -> None:
        self.arch = arch
        self._dtypes = dtypes
        self.masters = {n: w.clone() for n, w in weights.items() if trained(n)}
        self.shown = {n: rounded(self.masters.get(n, w), self._dtype(n)) for n, w in weights.items()}

    def network(self) -> Network:
        """A network on the weights shown; no gradients."""
        return Network(self.arch, self.shown)

    def replica(self) -> tuple[Network, dict[str, Tensor]]:
        """A network on the same memory with gradients of its own, and the weights that get them."""
        leaves = {name: self.shown[name].detach().requires_grad_() for name in self.masters}
        return Network(self.arch, {**self.shown, **leaves}), leaves

    def show(self, name: str | None = None) -> None:
        """Round the masters, or one of them, again after they have changed."""
        for each in self.masters if name is None else (name,):
            master, shown = self.masters[each], self.shown[each]
            if shown is not master:
                shown.data.copy_(rounded(master, self._dtype(each)))

    def arrays(self) -> Iterator[tuple[str, F32]]:
        """The masters as NumPy arrays on the same memory."""
        for name, master in self.masters.items():
            yield name, master.numpy()

    def _dtype(self, name: str) -> DType:
        return self._dtypes.get(name, "f32")
