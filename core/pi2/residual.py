"""The residual stream between FFNs: what the input of one says about the input of the next."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from pi2.api import ModelView
from pi2.tensor import F32

_TINY = 1e-6  # a norm weight below it has erased its element: nothing to restore


class FfnInputs:
    """Takes the input of FFN l for that of FFN l + 1, since a layer changes the residual stream little.

    The norm's weights are exchanged for those of the next layer; what attention and FFN add in between is
    not seen.
    """

    def __init__(self, model: ModelView) -> None:
        norms = [_norm(model, layer) for layer in range(model.architecture.n_layers)]
        self._shifts = [bias for _, bias in norms] if model.architecture.norm_bias else None
        self._scales = [
            np.divide(after, before, out=np.zeros_like(before), where=np.abs(before) > _TINY)
            for (before, _), (after, _) in pairwise(norms)
        ]

    def carry(self, ffn: int, x: F32) -> F32:
        """The input (n, d) of FFN ``ffn``, as one of FFN ``ffn + 1``."""
        if self._shifts is None:
            return np.ascontiguousarray(x * self._scales[ffn])
        return np.ascontiguousarray((x - self._shifts[ffn]) * self._scales[ffn] + self._shifts[ffn + 1])


def _norm(model: ModelView, layer: int) -> tuple[F32, F32]:
    """Weight and bias of the norm that makes an FFN's input."""
    arch = model.architecture
    name = f"layers.{layer}.{'attn' if arch.norm_place == 'post' else 'ffn'}.norm"
    weight = model.vector(f"{name}.weight")
    return weight, model.vector(f"{name}.bias") if arch.norm_bias else np.zeros_like(weight)
