"""Powers of two that keep fp16 in its range: what goes into a graph is below 1, token by token.

A token is divided by 2**e, the weights by powers of their own (``pi2_backend_qnn.pack``).  ReLUs commute with
that; of SiLU and GELU, which are g * share(g), only the share is asked for the true g.  The result is
multiplied back in float32, so that all this is exact.

Below 1, what few and weak neurons give together can be lost: fp16 has nothing between 0 and 2**-24.  So
tokens are multiplied by 2**lift, as far as no neuron that takes part, nor their sum, can exceed 2**15: a dot
product is at most the largest weight times the token's 1-norm, and at most the product of both 2-norms.
A lift is a whole number and counts k times, k factors in a hidden value, so that these can reach 2**(15 - k)
at least, if the lift is not at its end.  What that leaves to be lost, beside the tolerance:

    weights    2**-25 of the power of two that all weights of a matrix are below
    results    2**(k - 39) of the largest that a hidden value could be, times that power of two of ``down``:
               half of 2**-24, both for hidden values and for their sum
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pi2.api import FfnSpec
from pi2.tensor import F32

from pi2_backend_qnn.pack import Sizes

Exponents = NDArray[np.int32]
"""(n,), one a token."""

TRUE = (-14, 15)
"""Powers of two that are normal numbers in fp16; beyond, the share is 0.5, or 0 or 1."""
_ONES = -14
MOST = 15
"""The power of two that nothing exceeds in fp16, whose largest number is nearly 2**16."""


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
class _Bounds:
    """What neurons can give a token whose norm is 1, if "ones" is at most 1."""

    order: int
    """Which norm."""
    stages: tuple[tuple[int, F32], ...]
    """Of dot products, activations and hidden values: how often e counts, and what none exceeds, (k,)."""
    shares: F32
    """What each neuron adds to a number of the result at most, (k,)."""

    @classmethod
    def of(cls, order: int, weights: Mapping[str, F32], added: F32, down: F32, square: bool) -> _Bounds:
        """``weights``: the dual norms, (k,), of "up", and of "gate" if there is one; ``added``: what their
        biases are at most, (2, k), up last; ``down``: the largest magnitudes, (k,).
        """
        up = weights["up"] + added[-1]
        dots = weights["gate"] + added[0] if "gate" in weights else up
        act = dots ** (1 + square)
        hidden = act * up if "gate" in weights else act
        times = 1 + square + ("gate" in weights)
        return cls(order, ((1, np.maximum(dots, up)), (1 + square, act), (times, hidden)), hidden * down)

    def room(self, x: F32, ones: F32, count: int) -> F32:
        """By which powers of two tokens (n, d) and their ``ones`` (n,) can be multiplied, (n,)."""
        most = [(times, values[:count].max(initial=0)) for times, values in self.stages]
        most.append((self.stages[-1][0], self.shares[:count].sum()))
        sizes = np.maximum(np.linalg.norm(x, self.order, axis=1), ones)
        with np.errstate(divide="ignore"):
            rooms = [(MOST - np.log2(value)) / times for times, value in most]
            room: F32 = np.float32(min(rooms)) - np.log2(sizes)
        return room


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
    bounds: tuple[_Bounds, ...]
    """For the 1-norm and the 2-norm of tokens."""

    @classmethod
    def of(
        cls, spec: FfnSpec, sizes: Mapping[str, Sizes], exponents: Mapping[str, int], biases: F32 | None
    ) -> FfnScaling:
        """``sizes``: of each part's weights, by neuron; ``biases`` (k, 1 or 2)."""
        pre, fixed, factor = cls.powers(spec, exponents)
        bias = None
        added = np.zeros((2, len(sizes["up"].largest)), np.float32)
        if biases is not None:
            least = min(exponents["up"], pre)
            bias = max(_ONES, int(np.frexp(np.abs(biases).max(initial=0))[1]) - least - 4)
            added = np.ldexp(np.abs(biases[:, [0, -1]]).T, [[-pre], [-exponents["up"]]]).astype(np.float32)
        down = np.ldexp(sizes["down"].largest, -exponents["down"])
        bounds = []
        for order, which in ((1, "largest"), (2, "norms")):
            dots = {n: np.ldexp(getattr(sizes[n], which), -exponents[n]) for n in sizes if n != "down"}
            bounds.append(_Bounds.of(order, dots, added, down, spec.activation == "relu2"))
        return cls(pre, fixed, factor, bias, tuple(bounds))

    @staticmethod
    def powers(spec: FfnSpec, exponents: Mapping[str, int]) -> tuple[int, int, int]:
        """``pre``, ``fixed`` and ``factor`` of an FFN."""
        gated, square = spec.geometry.gate is not None, spec.activation == "relu2"
        pre = exponents["gate" if gated else "up"]
        fixed = pre * (1 + square) + exponents["down"] + (exponents["up"] if gated else 0)
        return pre, fixed, 1 + square + gated

    def lift(self, x: F32, e: Exponents, count: int) -> Exponents:
        """The powers of two, at least 0, that tokens (n, d) divided by 2**e can be multiplied by if the
        first ``count`` neurons may take part.  A token's own, whatever else is computed: the same bits.
        """
        small = scaled(x, -e)
        ones = np.zeros(len(x), np.float32) if self.bias is None else np.ldexp(np.float32(1), -e)
        rooms = [bounds.room(small, ones, count) for bounds in self.bounds]
        lift: Exponents = np.clip(np.floor(np.maximum(*rooms)), 0, MOST).astype(np.int32)
        return lift

    def exponents(self, x: F32, spec: FfnSpec, count: int) -> Exponents:
        """e of every token (n, d); ``count`` as in ``lift``.

        "true" and "ones" stay in the range of normal numbers.
        """
        smooth, e = is_smooth(spec), input_exponents(x)
        if self.bias is not None:
            e = np.maximum(e, np.int32(self.bias))
        lift = self.lift(x, e, count)
        if smooth:
            lift = np.minimum(lift, e + self.pre - TRUE[0])
        if self.bias is not None:
            lift = np.minimum(lift, e - _ONES)
        lifted: Exponents = e - np.maximum(lift, 0)
        return lifted

    def inputs(self, x: F32, spec: FfnSpec, count: int) -> tuple[Exponents, dict[str, F32]]:
        """e of every token, and what the graph is fed: x (n, d), "true" and "ones" (n, 1) if it asks."""
        e = self.exponents(x, spec, count)
        fed = {"x": scaled(x, -e)}
        one = np.ones((len(x), 1), np.float32)
        if is_smooth(spec):
            fed["true"] = scaled(one, np.clip(e + self.pre, *TRUE))
        if self.bias is not None:
            fed["ones"] = scaled(one, -e)
        return e, fed

    def outputs(self, y: F32, e: Exponents) -> F32:
        """The true result of (n, d) from a graph."""
        return scaled(y, self.factor * e + self.fixed)


def is_smooth(spec: FfnSpec) -> bool:
    """Whether the activation function is asked for the true gate."""
    return spec.activation not in ("relu", "relu2")
