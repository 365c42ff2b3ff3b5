"""Powers of two that keep fp16 in its range: what goes into a graph is below 1, token by token.

A token is divided by 2**e, the weights by powers of their own (``pi2_backend_qnn.pack``).  ReLUs commute with
that; of SiLU and GELU, which are g * share(g), only the share is asked for the true g.  The result is
multiplied back in float32, so that all this is exact.

Below 1, what few and weak neurons give together can be lost: fp16 has nothing between 0 and 2**-24.  So
tokens are multiplied by 2**lift, as far as no neuron that takes part, nor their sum, can exceed fp16.
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
_MOST = 15  # of fp16, whose largest number is nearly 2**16


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
    bounds: tuple[tuple[int, F32], ...]
    """Of dot products, activations and hidden values: how often e counts, and what none exceeds, (k,), if the
    magnitudes of a token add up to 1, and "ones" is at most 1."""
    shares: F32
    """What each neuron adds to a number of the result at most then, (k,)."""

    @classmethod
    def of(
        cls, spec: FfnSpec, largest: Mapping[str, F32], exponents: Mapping[str, int], biases: F32 | None
    ) -> FfnScaling:
        """``largest``: what no weight of a neuron exceeds, (k,) for each part; ``biases`` (k, 1 or 2)."""
        gated, square = spec.geometry.gate is not None, spec.activation == "relu2"
        pre = exponents["gate" if gated else "up"]
        fixed = pre * (1 + square) + exponents["down"] + (exponents["up"] if gated else 0)
        bias = None
        if biases is not None:
            least = min(exponents["up"], pre)
            bias = max(_ONES, int(np.frexp(np.abs(biases).max(initial=0))[1]) - least - 4)
        most = {name: np.ldexp(each, -exponents[name]) for name, each in largest.items()}
        added = np.zeros((len(most["up"]), 1), np.float32) if biases is None else np.abs(biases)
        up = most["up"] + np.ldexp(added[:, -1], -exponents["up"])
        dots = most["gate"] + np.ldexp(added[:, 0], -pre) if gated else up
        act = dots ** (1 + square)
        hidden = act * up if gated else act
        factor = 1 + square + gated
        bounds = ((1, np.maximum(dots, up)), (1 + square, act), (factor, hidden))
        return cls(pre, fixed, factor, bias, bounds, hidden * most["down"])

    def lift(self, x: F32, e: Exponents, count: int) -> Exponents:
        """The powers of two, at least 0, that tokens (n, d) divided by 2**e can be multiplied by if the
        first ``count`` neurons may take part.  A token's own, whatever else is computed: the same bits.
        """
        most = [(times, values[:count].max(initial=0)) for times, values in self.bounds]
        most.append((self.factor, self.shares[:count].sum()))
        room = min((_MOST - int(np.frexp(value)[1])) // times for times, value in most)
        sizes = np.abs(scaled(x, -e)).sum(axis=1)
        if self.bias is not None:
            sizes = np.maximum(sizes, np.ldexp(np.float32(1), -e))
        lift: Exponents = np.clip(room - np.frexp(sizes)[1], 0, _MOST).astype(np.int32)
        return lift

    def inputs(self, x: F32, spec: FfnSpec, count: int) -> tuple[Exponents, dict[str, F32]]:
        """e of every token, and what the graph is fed: x (n, d), "true" and "ones" (n, 1) if it asks.

        ``count`` as in ``lift``; "true" and "ones" stay in the range of normal numbers.
        """
        smooth, e = spec.activation not in ("relu", "relu2"), input_exponents(x)
        if self.bias is not None:
            e = np.maximum(e, np.int32(self.bias))
        lift = self.lift(x, e, count)
        if smooth:
            lift = np.minimum(lift, e + self.pre - _TRUE[0])
        if self.bias is not None:
            lift = np.minimum(lift, e - _ONES)
        e = e - np.maximum(lift, 0)
        fed = {"x": scaled(x, -e)}
        one = np.ones((len(x), 1), np.float32)
        if smooth:
            fed["true"] = scaled(one, np.clip(e + self.pre, *_TRUE))
        if self.bias is not None:
            fed["ones"] = scaled(one, -e)
        return e, fed

    def outputs(self, y: F32, e: Exponents) -> F32:
        """The true result of (n, d) from a graph."""
        return scaled(y, self.factor * e + self.fixed)
