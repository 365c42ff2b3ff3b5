"""Improving a predictor by gradient descent.  The only module that needs torch; import it when it is wanted.

What the weights will be stored as is what the loss sees (rounding with straight-through gradients), so
that 4 bits cost little.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from pi2.lowrank.closed_form import Layers
from pi2.tensor import BLOCK, F32, DType

_WARM_UP = 20  # steps


@dataclass(frozen=True, slots=True)
class FitSettings:
    """How to train."""

    steps: int = 150
    batch: int = 512
    rate: float = 6e-3
    judge_every: int = 50
    patience: float = 0.005
    """Stop when that many steps improved the judgement by a smaller share."""


def fit(
    start: Layers,
    x: F32,
    weigh: Callable[[F32], F32],
    judge: Callable[[Layers], float],
    dtype: DType,
    seed: int,
    settings: FitSettings,
) -> Layers:
    """Train from ``start`` on inputs x (n, d).

    ``weigh`` says of some of them how bad it is to miss each neuron, (k, neurons): 0 if it is not active; to
    name one that is not is as bad as 1.  Every so many steps ``judge`` says how bad the predictor is on
    other inputs; the best is returned.
    Deterministic for a seed and a number of threads.
    """
    s = settings
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.nn.Parameter(torch.tensor(a)) for a in (start.fc1, start.b1, start.fc2, start.b2)]
    optimiser = torch.optim.Adam(weights, lr=s.rate)
    inputs = torch.tensor(x)
    best, best_bad = start, judge(start)
    before = best_bad
    for step in range(s.steps):
        _set_rate(optimiser, s, step)
        chosen = torch.randint(0, len(x), (s.batch,), generator=generator)
        misses = torch.from_numpy(weigh(x[chosen.numpy()]))
        wanted = (misses > 0).float()
        logits = _logits(weights, inputs[chosen], dtype)
        loss = binary_cross_entropy_with_logits(logits, wanted, weight=torch.where(misses > 0, misses, 1.0))
        optimiser.zero_grad()
        # torch leaves backward() untyped
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no type for it
        optimiser.step()
        if (step + 1) % s.judge_every == 0 or step + 1 == s.steps:
            found = Layers(*(w.detach().numpy().copy() for w in weights))
            bad = judge(found)
            if bad < best_bad:
                best, best_bad = found, bad
            if bad > before * (1 - s.patience) and step + 1 > 2 * s.judge_every:
                break
            before = bad
    return best


def _set_rate(optimiser: Any, settings: FitSettings, step: int) -> None:
    """Linear warm-up, then linear decay to zero."""
    share = min(1.0, (step + 1) / _WARM_UP) * (1 - step / settings.steps)
    for group in optimiser.param_groups:
        group["lr"] = settings.rate * share


def _logits(weights: list[Any], x: Any, dtype: DType) -> Any:
    fc1, b1, fc2, b2 = weights
    return torch.relu(x @ _rounded(fc1, dtype).T + b1) @ _rounded(fc2, dtype).T + b2


def _rounded(weight: Any, dtype: DType) -> Any:
    """The values that storing gives, with the gradient of the identity."""
    if dtype == "f32":
        return weight
    with torch.no_grad():
        stored = weight.half().float() if dtype == "f16" else _quantised(weight, dtype)
        change = stored - weight
    return weight + change


def _quantised(weight: Any, dtype: DType) -> Any:
    """As ``pi2.tensor.encode``, but for ties: blocks of 32 with a scale in fp16."""
    blocks = weight.reshape(weight.shape[0], -1, BLOCK)
    if dtype == "q8_0":
        scale = blocks.abs().amax(dim=2, keepdim=True) / 127
        low, high = -127, 127
    else:
        largest = blocks.abs().argmax(dim=2, keepdim=True)
        scale = torch.gather(blocks, 2, largest) / -8
        low, high = -8, 7
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    quants = torch.clamp(torch.round(blocks / safe), low, high)
    return (quants * scale.half().float()).reshape(weight.shape)
