"""The FFNs of a model as the decoder sees them, and the resident way to have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pi2.api import Backend, FfnSpec, Predictor
from pi2.bundle import BundleGeometry
from pi2.tensor import F32, Ids

if TYPE_CHECKING:
    from pi2.container.reader import PiModel
    from pi2.offload_count import OffloadCount

RANGE_BYTES = 8 << 20
"""Of bundles in a range of neurons that is read and computed as one in prefill: long reads, few buffers."""


class Ffns(Protocol):
    """Computes any FFN of a model, wherever its weights are."""

    def expect(self, ffn: int, tokens: Sequence[int]) -> None:
        """FFN number ``ffn`` comes after the next attention block, for chunks of so many ``tokens`` each."""
        ...

    def sparse(self, ffn: int, x: F32, predictor: Predictor, out: F32) -> int:
        """``out`` = FFN number ``ffn`` of one token, both (1, d), over the neurons that are predicted.

        Returns the number of neurons that were active.  Raises Pi2Error.
        """
        ...

    def dense(self, ffn: int, chunks: Sequence[tuple[F32, F32]]) -> int:
        """``out`` = FFN number ``ffn`` of ``x`` for every pair (x, out), (n, d) each, over all neurons.

        The sum of ``dense_ranges`` in their order, each as ``Backend.ffn`` computes it for the n tokens.
        Returns the number of (token, neuron) pairs that were active.  Raises StorageError.
        """
        ...

    def take_count(self) -> OffloadCount | None:
        """What was read and waited for since the last call; None if nothing ever is."""
        ...


def dense_ranges(geometry: BundleGeometry, neurons: int) -> list[tuple[int, int]]:
    """First and last + 1 of the ranges of neurons that many tokens are computed in.

    A function of the geometry alone, so that the sums, and with them their bits, are the same wherever
    the weights are.  One range for a small FFN.
    """
    step = max(64, RANGE_BYTES // geometry.stride // 64 * 64)
    return [(first, min(neurons, first + step)) for first in range(0, neurons, step)]


class ResidentFfns:
    """All bundles placed on the backend."""

    def __init__(self, model: PiModel, backend: Backend) -> None:
        arch = model.architecture
        spec = FfnSpec(model.geometry, arch.activation, arch.up_relu)
        self._backend = backend
        self._ffns: list[Any] = [backend.place_ffn(model.bundles(i), spec) for i in range(arch.n_layers)]
        ranges = dense_ranges(model.geometry, arch.n_neurons)
        self._ranges = [np.arange(*ends, dtype=np.int32) for ends in ranges]

    def expect(self, ffn: int, tokens: Sequence[int]) -> None:
        return None

    def sparse(self, ffn: int, x: F32, predictor: Predictor, out: F32) -> int:
        return self._backend.ffn(self._ffns[ffn], x, out, predictor.predict(ffn, x))

    def dense(self, ffn: int, chunks: Sequence[tuple[F32, F32]]) -> int:
        placed = self._ffns[ffn]
        if len(self._ranges) == 1:
            return sum(self._backend.ffn(placed, x, out) for x, out in chunks)
        return sum(
            add_range(self._backend, placed, x, out, neurons, at == 0)
            for at, neurons in enumerate(self._ranges)
            for x, out in chunks
        )

    def take_count(self) -> None:
        return None


def add_range(backend: Backend, placed: Any, x: F32, out: F32, rows: Ids | None, first: bool) -> int:
    """Add the partial sum of a range of neurons to ``out``, or write it there if it is the first one."""
    if first:
        return backend.ffn(placed, x, out, rows)
    part = np.empty_like(out)
    active = backend.ffn(placed, x, part, rows)
    out += part
    return active
