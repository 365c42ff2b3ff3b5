"""Powers of two that keep fp16 in its range: what goes into a graph is below 1, token by token.

A token is divided by 2**e, the weights by powers of their own (``pi2_backend_qnn.pack``).  ReLUs commute with
that; of SiLU and GELU, which are g * share(g), only the share is asked for the true g.  The result is
multiplied back in float32, so that all this is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pi2.api import FfnSpec
from pi2.tensor import F32

Exponents = NDArray[np.int32]
"""(n,), one a token."""

_TRUE = (-14, 15)  # powers of two that are normal numbers in fp16; beyond, the share is 0.5, or 0 or 1
_ONES = -14


def input_exponents(x: F32) -> Exponents:
    """The least e with |x| < 2**e, for each row of finite ``x`` (n, cols); 0 for a row of zeros."""
    e: Exponents = np.frexp(np.abs(x).max(axis=1, initial=0))[1].astype(np.int32)
    return e


def scaled(x: F32, e: Exponents) -> F32:
    """Rows of ``x`` times 2**e."""
    with np.errstate(over="ignore"):
        y: F32 = np.ldexp(x, e[:, None])
    return y


@dataclass(frozen=True, slots=True)
class FfnScaling:
    """How the exponents of an FFN's weights add up.  ``bias``: the least e for its biases, if it has any."""

    pre: int
    """Of what the activation function is given, beside e."""
    fixed: int
    """Of the result, beside e."""
    factor: int
    """How often e counts in the result."""
    bias: int | None

    @classmethod
    def of(cls, spec: FfnSpec, exponents: Mapping[str, int], biases: F32 | None) -> FfnScaling:
        """``biases`` (k, 1 or 2) as in the bundles."""
        gated, square = spec.geometry.gate is not None, spec.activation == "relu2"
        pre = exponents["gate" if gated else "up"]
        fixed = pre * (1 + square) + exponents["down"] + (exponents["up"] if gated else 0)
        bias = None
        if biases is not None:
            least = min(exponents["up"], pre)
            bias = max(_ONES, int(np.frexp(np.abs(biases).max(initial=0))[1]) - least - 4)
        return cls(pre, fixed, 1 + square + gated, bias)

    def inputs(self, x: F32, spec: FfnSpec) -> tuple[Exponents, dict[str, F32]]:
        """e of every token, and what the graph is fed: x (n, d), "true" and "ones" (n, 1) if it asks."""
        e = input_exponents(x)
        if self.bias is not None:
            e = np.maximum(e, np.int32(self.bias))
        fed = {"x": scaled(x, -e)}
        one = np.ones((len(x), 1), np.float32)
        if spec.activation not in ("relu", "relu2"):
            fed["true"] = scaled(one, np.clip(e + self.pre, *_TRUE))
        if self.bias is not None:
            fed["ones"] = scaled(one, -e)
        return e, fed

    def outputs(self, y: F32, e: Exponents) -> F32:
        """The true result of (n, d) from a graph."""
        return scaled(y, self.factor * e + self.fixed)
