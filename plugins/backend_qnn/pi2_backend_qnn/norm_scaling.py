"""Powers of two for graphs of integers: every token's 2-norm is below 1 when it goes in.

A dot product is at most the product of both 2-norms, so that with the norms of weights all ranges are known
(``pi2_backend_qnn.integer_graph``).  Weights get powers of two that leave fp16, between products, as much
room below as there is: nothing can exceed 2**15, whatever the token is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from pi2.api import FfnSpec
from pi2.tensor import F32, U8

from pi2_backend_qnn.errors import GraphRefused
from pi2_backend_qnn.pack import Sizes
from pi2_backend_qnn.scaling import MOST, TRUE, Exponents, FfnScaling, input_exponents, scaled

HIDDEN_MARGIN = 1.125
"""What the norm of hidden values is multiplied by, for what fp16 loses of it."""
_GROWN = 2
"""Powers of two: rounded weights, and outliers apart, have norms of at most 2 * 2**0.5 of what they had."""
_ROUNDED = np.float32(1 + 2**-12)  # more than float32 loses of a norm
_LINEAR = 8  # the power of two that results of a matrix stay below, but for what rounding adds


def norm_exponents(x: F32) -> Exponents:
    """An e for each row of finite ``x`` (n, cols) with a 2-norm of less than 2**e; 0 for a row of zeros."""
    e = input_exponents(x)
    norms = np.linalg.norm(scaled(x, -e), axis=1) * _ROUNDED
    found: Exponents = e + np.frexp(norms)[1].astype(np.int32)
    return found


def linear_exponent(sizes: Sizes) -> int:
    """Of a matrix."""
    return _power(sizes.norms.max(initial=0)) - _LINEAR


def ffn_exponents(spec: FfnSpec, sizes: Mapping[str, Sizes], bundles: U8, cluster: int) -> dict[str, int]:
    """Of gate, up and down of the neurons (k, stride), in clusters of so many.

    A dot product and its bias are at most half of 2**b each, b powers of two for each factor of a hidden
    value, and these at most 2**15; all results of ``down`` together are 2**15 at most, too.
    """
    half = _dots_power(spec) - 1
    found = {
        name: _power(each.norms.max(initial=0)) + _GROWN - half
        for name, each in sizes.items()
        if name != "down"
    }
    norms = 0.0
    for first in range(0, len(bundles), cluster):
        down = spec.geometry.unpack_segment(bundles[first : first + cluster], "down")
        norms += float(np.linalg.norm(down, axis=0).max(initial=0))
    found["down"] = _power(norms) + _GROWN + math.ceil(math.log2(HIDDEN_MARGIN * math.sqrt(cluster)))
    return found


def _power(size: float) -> int:
    """The least e with size < 2**e; 0 for nothing.  Raises GraphRefused if there is none."""
    if not np.isfinite(size):
        raise GraphRefused("weights are too large", hint="use qnn:weights=exact")
    return math.frexp(size)[1]


def _factors(spec: FfnSpec) -> int:
    return 1 + (spec.activation == "relu2") + (spec.geometry.gate is not None)


def _dots_power(spec: FfnSpec) -> int:
    return MOST // _factors(spec)


@dataclass(frozen=True, slots=True)
class NormScaling(FfnScaling):
    """Which e tokens are given at least is in ``least``: for biases, and so that SiLU and GELU can be asked
    for the true gate in fp16.
    """

    least: int

    @classmethod
    def of_norms(cls, spec: FfnSpec, exponents: Mapping[str, int], biases: F32 | None) -> NormScaling:
        """``biases`` (k, 1 or 2)."""
        base = FfnScaling.powers(spec, exponents)
        least = -(1 << 20)
        if biases is not None:
            largest = _power(np.abs(biases).max(initial=0))
            least = max(-MOST, largest - min(exponents["up"], base[0]) - _dots_power(spec) + 1)
        if spec.activation not in ("relu", "relu2"):
            least = max(least, TRUE[0] - base[0])
        return cls(*base, None if biases is None else least, (), least)

    def exponents(self, x: F32, spec: FfnSpec, count: int) -> Exponents:
        return np.maximum(norm_exponents(x), np.int32(self.least))
