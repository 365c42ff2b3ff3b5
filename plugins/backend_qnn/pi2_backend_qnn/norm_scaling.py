"""Powers of two for graphs of integers: every token's 2-norm is below 1 when it goes in.

A dot product is at most the product of both 2-norms, so that with the norms of weights all ranges are known
(``pi2_backend_qnn.integer_graph``).  Weights get powers of two that leave fp16, between products, as much
room below as there is: nothing can exceed 2**15, whatever the token is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pi2.api import FfnSpec
from pi2.tensor import F32, U8

from pi2_backend_qnn.errors import GraphRefused
from pi2_backend_qnn.pack import Sizes
from pi2_backend_qnn.scaling import MOST, Exponents, FfnScaling, input_exponents, is_smooth, scaled

_GROWN = 2
"""Powers of two: rounded weights, and outliers apart, have norms of at most 2 * 2**0.5 of what they had."""
_ROUNDED = np.float32(1 + 2**-12)  # more than float32 loses of a norm
_SMOOTH = 6  # the power of two that gates of SiLU and GELU stay below at most
_LINEAR = 8  # the power of two that results of a matrix stay below, but for what rounding adds


def norm_exponents(x: F32) -> Exponents:
    """An e for each row of finite ``x`` (n, cols) with a 2-norm of less than 2**e; 0 for a row of zeros."""
    e = input_exponents(x)
    norms = np.linalg.norm(scaled(x, -e), axis=1) * _ROUNDED
    found: Exponents = e + np.frexp(norms)[1].astype(np.int32)
    return found


def linear_exponent(sizes: Sizes) -> int:
    """Of a matrix."""
    return int(_powers(sizes.norms.max(initial=0))) - _LINEAR


@dataclass(frozen=True, slots=True)
class Powers:
    """Of two, that weights are divided by: those of gate and up, and of each output of ``down``, (d,)."""

    dots: dict[str, int]
    down: Exponents

    @classmethod
    def of(cls, spec: FfnSpec, sizes: Mapping[str, Sizes], bundles: U8, cluster: int) -> Powers:
        """For the neurons (k, stride), in clusters of so many.

        A dot product and its bias are at most half of 2**b each, b powers of two for each factor of a hidden
        value, and these at most 2**15; all clusters' results of ``down`` together, of hidden values up to 1,
        are 2**15 at most, too.  Raises GraphRefused.
        """
        half = _dots_power(spec) - 1
        dots = {
            name: int(_powers(each.norms.max(initial=0))) + _GROWN - half
            for name, each in sizes.items()
            if name != "down"
        }
        norms = np.zeros(spec.geometry.d_model, np.float32)
        for first in range(0, len(bundles), cluster):
            down = spec.geometry.unpack_segment(bundles[first : first + cluster], "down")
            with np.errstate(over="ignore"):  # then they are refused
                norms += np.linalg.norm(down, axis=0)
        return cls(dots, _powers(norms) + np.int32(_GROWN - MOST + math.ceil(0.5 * math.log2(cluster))))

    @property
    def all(self) -> dict[str, Any]:
        """By part, as a worker is told."""
        return {**self.dots, "down": self.down.tolist(), "hidden": 0}


def _powers(sizes: F32) -> Exponents:
    """The least e with size < 2**e for each; 0 for nothing.  Raises GraphRefused if there is none."""
    if not np.isfinite(sizes).all():
        raise GraphRefused("weights are too large", hint="use qnn:weights=exact")
    found: Exponents = np.frexp(sizes)[1].astype(np.int32)
    return found


def _factors(spec: FfnSpec) -> int:
    return 1 + (spec.activation == "relu2") + (spec.geometry.gate is not None)


def _dots_power(spec: FfnSpec) -> int:
    """Less for SiLU and GELU: with "true" at its lower end the share is off by 2**(6 - 14) / 4 at most."""
    most = MOST // _factors(spec)
    return min(most, _SMOOTH) if is_smooth(spec) else most


@dataclass(frozen=True, slots=True)
class NormScaling(FfnScaling):
    """``outputs_of``: powers of two for each output beside the others, (d,)."""

    outputs_of: Exponents

    @classmethod
    def of_norms(cls, spec: FfnSpec, powers: Powers, biases: F32 | None) -> NormScaling:
        """``biases`` (k, 1 or 2).  Raises GraphRefused."""
        pre, fixed, counts = FfnScaling.fixed_of(spec, {**powers.dots, "down": 0})
        bias = None
        if biases is not None:
            largest = int(_powers(np.abs(biases).max(initial=0)))
            bias = max(-MOST, largest - min(powers.dots["up"], pre) - _dots_power(spec) + 1)
        return cls(pre, fixed, counts, bias, (), powers.down)

    def exponents(self, x: F32, spec: FfnSpec) -> Exponents:
        e = norm_exponents(x)
        return e if self.bias is None else np.maximum(e, np.int32(self.bias))

    def outputs(self, y: F32, e: Exponents, lifts: F32) -> F32:
        positive = y + np.float32(0)  # a zero, whose sign depends on how many clusters a graph has
        with np.errstate(over="ignore"):
            true: F32 = np.ldexp(positive, self.powers_of(e, lifts)[:, None] + self.outputs_of)
        return true
