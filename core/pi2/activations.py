"""What a neuron computes from its two dot products, in NumPy: the reference for every kernel."""

from __future__ import annotations

import numpy as np

from pi2.api import FfnSpec
from pi2.tensor import F32

_SQRT_2_OVER_PI = np.float32(0.7978845608028654)


def hidden(spec: FfnSpec, gate: F32 | None, up: F32) -> F32:
    """``act(gate) * up``, or ``act(up)`` without a gate; elementwise, any shape.  NaN stays NaN."""
    if gate is None:
        return activate(spec, up)
    product: F32 = activate(spec, gate) * (np.maximum(up, 0) if spec.up_relu else up)
    return product


def activate(spec: FfnSpec, x: F32) -> F32:
    """The activation function alone, elementwise; float64 in gives float64 out."""
    if spec.activation == "relu":
        return np.maximum(x, 0)
    y: F32
    if spec.activation == "relu2":
        y = np.square(np.maximum(x, 0))
    elif spec.activation == "silu":
        y = x * _sigmoid(x)
    elif spec.activation == "gelu_tanh":
        inner = _SQRT_2_OVER_PI * (x + np.float32(0.044715) * x * x * x)
        y = np.float32(0.5) * x * (1 + np.tanh(inner))
    else:
        y = np.float32(0.5) * x * (1 + _erf(x * np.float32(0.7071067811865476)))
    return y


def _sigmoid(x: F32) -> F32:
    """Without overflow at either end."""
    e = np.exp(-np.abs(x))
    y: F32 = np.where(x >= 0, 1, e) / (1 + e)
    return y


def _erf(x: F32) -> F32:
    """Error function to 1.2e-7 (Numerical Recipes 2nd ed. §6.2, Chebyshev fit of erfc)."""
    t = 1 / (1 + np.float32(0.5) * np.abs(x))
    p = np.full_like(t, 0.17087277)
    for c in (-0.82215223, 1.48851587, -1.13520398, 0.27886807,
              -0.18628806, 0.09678418, 0.37409196, 1.00002368, -1.26551223):  # fmt: skip
        p = p * t + np.float32(c)
    return np.copysign(1 - t * np.exp(p - x * x), x)
