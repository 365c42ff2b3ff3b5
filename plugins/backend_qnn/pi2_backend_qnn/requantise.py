"""Weights rounded once more: int8 by output channel, or int4 with the outliers in int8 (PowerInfer-2 §7.6).

An outlier is an input channel, all of whose weights are kept in int8, in a matrix of their own whose product
is added: one channel in 16, those that have the weights that are largest beside the others of their row.
Without them, what is left needs smaller steps.  With them a weight takes 4.5 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pi2.tensor import F32

BITS = {"w8a16": 8, "w4a16": 4}
"""Of a weight, by what the option ``weights`` is called; "exact" is the other one."""
MATRICES = "w8a16"
"""How matrices, which are few beside FFNs, are rounded if FFNs are."""
WORDS = {
    "w8a16": "weights are rounded to int8 by output channel, what they are multiplied with to 16 bits",
    "w4a16": "weights are rounded to int4 by output channel, one input channel in 16 to int8,"
    " what they are multiplied with to 16 bits",
}
"""What is lost, for people."""
OUTLIER_BITS = 8
EVERY = 16
"""Of so many input channels, one is an outlier."""


@dataclass(frozen=True, slots=True)
class Part:
    """Weights by output channel: value = quant * scale, quants (N, K), scales (N,).

    ``channels``: (K,) which input channels these are; None: all, in their order.
    """

    quants: NDArray[np.int8]
    scales: F32
    bits: int
    channels: NDArray[np.int64] | None = None

    def to_f32(self) -> F32:
        return self.quants * self.scales[:, None]


def by_channel(weights: F32, bits: int) -> Part:
    """Finite ``weights`` (N, K), none of which changes by more than half its channel's scale."""
    most = np.float32(2 ** (bits - 1) - 1)
    scales = np.abs(weights).max(axis=1, initial=0) / most
    scales = np.where(scales > 0, scales, np.float32(1))
    quants = np.clip(np.rint(weights / scales[:, None]), -most, most).astype(np.int8)
    return Part(quants, scales, bits)


def outliers(weights: F32) -> NDArray[np.int64]:
    """The input channels of ``weights`` (N, K) that are outliers, ascending: K // 16 of them."""
    sizes = np.abs(weights)
    means = sizes.mean(axis=1, keepdims=True)
    beside = (sizes / np.where(means > 0, means, np.float32(1))).max(axis=0, initial=0)
    chosen = np.argsort(-beside, kind="stable")[: weights.shape[1] // EVERY]
    return np.sort(chosen).astype(np.int64)


def parts_of(weights: F32, bits: int) -> list[Part]:
    """``weights`` (N, K) as matrices whose products are added."""
    chosen = outliers(weights) if bits < OUTLIER_BITS else np.empty(0, np.int64)
    if not len(chosen):
        return [by_channel(weights, bits)]
    rest = weights.copy()
    rest[:, chosen] = 0
    apart = by_channel(weights[:, chosen], OUTLIER_BITS)
    return [by_channel(rest, bits), Part(apart.quants, apart.scales, apart.bits, chosen)]


def weight_bytes(count: int, weights: str) -> int:
    """Of so many weights, at least."""
    return count * BITS[weights] // 8


def rounded(weights: F32, bits: int) -> F32:
    """What ``weights`` (N, K) become."""
    whole, *others = parts_of(weights, bits)
    found = whole.to_f32()
    for part in others:
        found[:, part.channels] += part.to_f32()
    return found
