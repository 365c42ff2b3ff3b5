"""Powers of two that keep fp16 in its range: what goes into a graph is below 1, token by token.

A token is divided by 2**e, the weights by powers of their own (``pi2_backend_qnn.pack``).  ReLUs commute with
that; of SiLU and GELU, which are g * share(g), only the share is asked for the true g.  The result is
multiplied back in float32, so that all this is exact.

Below 1, what few and weak neurons give could be lost: fp16 has nothing between 0 and 2**-24.  So tokens are
multiplied by 2**lift, as far as no hidden value, of whichever neuron, can exceed 2**15: a dot product is at
most the largest weight times the token's 1-norm, and at most the product of both 2-norms.  From there on
nothing depends on neurons that do not take part: the graph multiplies each token's hidden values by the
power of two that brings their largest to 2**hidden, so that no sum can exceed 2**15.  A ReLU that is to be
squared and multiplied with "up" is brought to 2**RELU before.  What can be lost, beside the tolerance:

    weights        2**-25 of the power of two that all weights of a matrix are below
    dot products   2**-29 of the largest that there could be, of whichever neuron
    hidden values  2**-38 of the largest that there could be, and 2**-25 of the largest that there is
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pi2.api import FfnSpec
from pi2.tensor import F32

from pi2_backend_qnn.pack import Sizes, exponent

Exponents = NDArray[np.int32]
"""(n,), one a token."""

LEAST = -14
"""The least power of two that is a normal number in fp16."""
MOST = 15
"""The power of two that nothing exceeds in fp16, whose largest number is nearly 2**16."""
RELU = 5
"""As above, of a ReLU whose square is multiplied."""
SQUARED_AND_GATED = (2, 1)


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
class _Dots:
    """Of the weights of a factor: what none of them, no neuron's 2-norm of them, and no bias exceeds."""

    weight: float
    norm: float
    bias: float

    def largest(self, x: F32, ones: F32) -> F32:
        """What no dot product exceeds, with tokens (n, d) and their ``ones`` (n,): (n,)."""
        sizes = self.weight * np.linalg.norm(x, 1, axis=1), self.norm * np.linalg.norm(x, axis=1)
        largest: F32 = np.minimum(*sizes) + self.bias * ones
        return largest


@dataclass(frozen=True, slots=True)
class FfnScaling:
    """How the exponents of an FFN's weights add up.  ``bias``: the least e for its biases, if it has any."""

    pre: int
    """Of what the activation function is given, beside e."""
    fixed: int
    """Of the result, beside e."""
    powers: tuple[int, ...]
    """How often the factors of a hidden value count: the activation's, and "up" if there is a gate."""
    bias: int | None
    dots: tuple[_Dots, ...]
    """Of the same factors."""

    @classmethod
    def of(
        cls, spec: FfnSpec, sizes: Mapping[str, Sizes], exponents: Mapping[str, int], biases: F32 | None
    ) -> FfnScaling:
        """``sizes``: of each part's weights, by neuron; ``biases`` (k, 1 or 2)."""
        pre, fixed, powers = cls.fixed_of(spec, exponents)
        bias, added = None, np.zeros(len(powers))
        if biases is not None:
            least = min(exponents["up"], pre)
            bias = max(LEAST, int(np.frexp(np.abs(biases).max(initial=0))[1]) - least - 4)
            added = np.abs(biases).max(axis=0, initial=0).astype(np.float64)
        dots = []
        for part, largest in zip(("gate", "up")[-len(powers) :], added, strict=True):
            weight = float(sizes[part].largest.max(initial=0))
            norm = min(float(sizes[part].norms.max(initial=0)), weight * spec.geometry.d_model**0.5)
            dots.append(_Dots(*(math.ldexp(each, -exponents[part]) for each in (weight, norm, largest))))
        return cls(pre, fixed, powers, bias, tuple(dots))

    @staticmethod
    def fixed_of(spec: FfnSpec, exponents: Mapping[str, int]) -> tuple[int, int, tuple[int, ...]]:
        """``pre``, ``fixed`` and ``powers`` of an FFN."""
        gated, square = spec.geometry.gate is not None, spec.activation == "relu2"
        pre = exponents["gate" if gated else "up"]
        fixed = pre * (1 + square) + exponents["down"] + (exponents["up"] if gated else 0)
        return pre, fixed, (1 + square, 1) if gated else (1 + square,)

    def lift(self, x: F32, e: Exponents) -> Exponents:
        """The powers of two that tokens (n, d) divided by 2**e are multiplied by.

        A token's own, whatever else is computed, and whichever neurons take part: the same bits.
        """
        small = scaled(x, -e)
        ones = np.zeros(len(x), np.float32) if self.bias is None else np.ldexp(np.float32(1), -e)
        with np.errstate(divide="ignore"):
            dots = [np.log2(each.largest(small, ones)) for each in self.dots]
        if self.powers == SQUARED_AND_GATED:
            room = MOST - 2 * RELU - np.maximum(*dots)
        else:
            product = sum(map(operator.mul, self.powers, dots))
            room = np.minimum(MOST - np.maximum.reduce(dots), (MOST - product) / sum(self.powers))
        lift: Exponents = np.floor(np.minimum(room, MOST)).astype(np.int32)
        return lift

    def exponents(self, x: F32, spec: FfnSpec) -> Exponents:
        """e of every token (n, d).  "true" and "ones" stay in the range of normal numbers."""
        e = input_exponents(x)
        if self.bias is not None:
            e = np.maximum(e, np.int32(self.bias))
        lift = self.lift(x, e)
        if is_smooth(spec):
            lift = np.minimum(lift, np.maximum(e + self.pre - LEAST, 0))
        if self.bias is not None:
            lift = np.minimum(lift, np.maximum(e - LEAST, 0))
        lifted: Exponents = e - lift
        return lifted

    def inputs(self, x: F32, spec: FfnSpec) -> tuple[Exponents, dict[str, F32]]:
        """e of every token, and what the graph is fed: x (n, d), "true" and "ones" (n, 1) if it asks."""
        e = self.exponents(x, spec)
        fed = {"x": scaled(x, -e)}
        one = np.ones((len(x), 1), np.float32)
        if is_smooth(spec):
            fed["true"] = scaled(
                one, np.clip(e + self.pre, LEAST, MOST)
            )  # beyond, the share is 0.5, or 0 or 1
        if self.bias is not None:
            fed["ones"] = scaled(one, -e)
        return e, fed

    @property
    def lifts(self) -> int:
        """How many powers of two a graph gives for each token, which it has multiplied hidden values by.

        The first may be a ReLU's, before it was squared.
        """
        return 1 + (self.powers == SQUARED_AND_GATED)

    def powers_of(self, e: Exponents, lifts: F32) -> Exponents:
        """Those of two that results are multiplied by, (n,)."""
        lifted = np.frexp(lifts.T)[1] - 1
        squared = lifted[0] if self.powers == SQUARED_AND_GATED else 0
        found: Exponents = sum(self.powers) * e + self.fixed - lifted.sum(axis=0) - squared
        return found

    def outputs(self, y: F32, e: Exponents, lifts: F32) -> F32:
        """The true result of (n, d) from a graph, which has ``lifts`` (n, 1 or 2)."""
        return scaled(y, self.powers_of(e, lifts))


def down_powers(sizes: Sizes) -> tuple[int, int]:
    """The power of two that ``down`` is divided by, and ``hidden``."""
    total = math.frexp(sizes.largest.sum(dtype=np.float64))[1]
    down = max(exponent(sizes.largest), total - MOST)
    return down, min(MOST, MOST - (total - down))


def is_smooth(spec: FfnSpec) -> bool:
    """Whether the activation function is asked for the true gate."""
    return spec.activation not in ("relu", "relu2")
