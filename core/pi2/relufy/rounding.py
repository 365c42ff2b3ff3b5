"""Rounding of weights to pi2's storage formats in PyTorch, bit-exact with ``pi2.tensor``."""

from __future__ import annotations

import torch
from torch import Tensor

from pi2.tensor import BLOCK, DType

_SMALLEST_INVERTIBLE = 3e-39  # as in pi2.tensor


def rounded(weight: Tensor, dtype: DType) -> Tensor:
    """What ``weight`` (rows, cols) float32 reads as when it was stored as ``dtype``; for f32 itself.

    Blocks of 32 lie along the columns.  Takes no part in gradients.
    """
    with torch.no_grad():
        if dtype == "f32":
            return weight
        if dtype == "f16":
            return weight.half().float()
        blocks = weight.reshape(-1, BLOCK)
        return (_q8_0(blocks) if dtype == "q8_0" else _q4_0(blocks)).view(weight.shape)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() > _SMALLEST_INVERTIBLE, 1 / scale, torch.zeros_like(scale))


def _q8_0(blocks: Tensor) -> Tensor:
    """(n, 32) -> (n, 32): quants rounded half away from zero."""
    scale = blocks.abs().amax(1, keepdim=True) / 127
    scaled = blocks * _inverse(scale)
    whole = scaled.trunc()  # adding 0.5 would round 0.49999997 up
    quants = whole + scaled.sign() * ((scaled - whole).abs() >= 0.5)
    return quants.mul_(scale.half().float())


def _q4_0(blocks: Tensor) -> Tensor:
    """(n, 32) -> (n, 32): the weight of largest magnitude becomes -8, quants rounded half up."""
    high, low = blocks.amax(1, keepdim=True), blocks.amin(1, keepdim=True)
    largest = torch.where(high > -low, high, low)
    ties = (high == -low).flatten().nonzero().flatten()  # the first counts, and argmax alone is slow
    if len(ties):
        tied = blocks[ties]
        largest[ties] = tied.gather(1, tied.abs().argmax(1, keepdim=True))
    scale = largest / -8
    quants = (blocks * _inverse(scale)).add_(8.5).floor_().clamp_(0, 15).sub_(8)
    return quants.mul_(scale.half().float())
