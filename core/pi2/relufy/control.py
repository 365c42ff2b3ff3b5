"""The push towards sparsity, steered so that the density follows a ramp (PI control)."""

from __future__ import annotations

import math
from dataclasses import dataclass

_SETTLE = 20  # steps whose mean is the density that the ramp starts from
_MEMORY = 0.95  # of the running mean of the density: about 20 steps
_INTEGRAL, _LARGEST_INTEGRAL = 0.3, 0.05  # gain a step, and the error that counts at most
_PROPORTIONAL, _LARGEST_PROPORTIONAL = 60.0, 0.03
_LEAST_PUSH, _LARGEST_PUSH = 0.02, 8.0


@dataclass(slots=True)
class DensityControl:
    """Weight of the density in the loss.  A fixed one hardly moves the zeros or overshoots."""

    target: float
    ramp: float
    push: float
    """The integral part, in the loss's unit."""
    mean: float | None = None
    start: float | None = None
    wanted: float | None = None
    """The density that the ramp asks for now."""
    steps: int = 0

    @property
    def weight(self) -> float:
        """What the density counts in the next step's loss."""
        if self.mean is None or self.start is None:
            return self.push
        return self.push * math.exp(_PROPORTIONAL * _clip(self._error(), _LARGEST_PROPORTIONAL))

    def update(self, density: float, share: float) -> None:
        """Hear the density of a step, after ``share`` of the training."""
        self.steps += 1
        self.mean = density if self.mean is None else _MEMORY * self.mean + (1 - _MEMORY) * density
        if self.steps < _SETTLE:
            return
        if self.start is None:
            self.start = self.mean
        self.wanted = self.start + (self.target - self.start) * min(1.0, share / self.ramp)
        push = self.push * math.exp(_INTEGRAL * _clip(self._error(), _LARGEST_INTEGRAL))
        self.push = min(_LARGEST_PUSH, max(_LEAST_PUSH, push))

    def _error(self) -> float:
        assert self.mean is not None
        return 0.0 if self.wanted is None else self.mean - self.wanted


def _clip(value: float, size: float) -> float:
    return max(-size, min(size, value))
