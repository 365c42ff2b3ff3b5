"""How wide the predictor of each layer is: more where it lets more neurons be skipped (PowerInfer §5.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pi2.tensor import DType, row_bytes

BUDGET = 0.06
"""All predictors together, as a share of the model's weights (PowerInfer §5.1: 6 % of the parameters)."""
_STEPS = (32, 64, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024)


def candidates(d_model: int) -> tuple[int, ...]:
    """Widths that are worth a try: from a certain width on the gate itself is cheaper."""
    return tuple(width for width in _STEPS if width <= max(32, d_model // 2))


def predictor_bytes(width: int, d_model: int, neurons: int, dtype: DType) -> int:
    """Bytes of ``FfnPredictor`` of this width."""
    return width * row_bytes(dtype, d_model) + neurons * row_bytes(dtype, width) + 4 * (width + neurons)


def choose_widths(
    curves: Sequence[Mapping[int, float]], cost: Mapping[int, int], neuron_bytes: int, budget: int
) -> list[int]:
    """A width for every layer.

    ``curves[layer][width]`` is how many neurons must be named for the recall wanted, ``cost[width]`` bytes
    of a predictor.  From the smallest width on, the layer is widened that gains most per byte: a named
    neuron costs ``neuron_bytes``, and widening must save more than it costs.  ``budget`` bytes are the end.
    """
    steps = sorted(cost)
    at = [0] * len(curves)
    spent = len(curves) * cost[steps[0]]
    while True:
        best, gain = -1, 1.0
        for layer, curve in enumerate(curves):
            if at[layer] + 1 == len(steps):
                continue
            here, there = steps[at[layer]], steps[at[layer] + 1]
            more = cost[there] - cost[here]
            saved = (curve[here] - curve[there]) * neuron_bytes
            if saved > gain * more and spent + more <= budget:
                best, gain = layer, saved / more
        if best < 0:
            return [steps[i] for i in at]
        spent += cost[steps[at[best] + 1]] - cost[steps[at[best]]]
        at[best] += 1
