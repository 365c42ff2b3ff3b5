"""How far a model's predictions are from another's."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from pi2.tensor import F32

_POSITIONS: Final = 2  # of so many positions one is compared, since a vocabulary of floats is kept for each


class Divergence:
    """How far the distributions of next tokens are from those of a first reading of the same text."""

    def __init__(self) -> None:
        self._first: list[F32] = []
        self._next: int | None = None  # None: this is the first reading
        self._sum, self._count = 0.0, 0

    def begin(self) -> None:
        """Begin another reading."""
        self._next, self._sum, self._count = 0, 0.0, 0

    @property
    def nats(self) -> float:
        """Mean Kullback-Leibler divergence of this reading, over a share of its tokens."""
        return self._sum / self._count

    def add(self, logits: F32, targets: NDArray[np.int64]) -> None:
        """``logits`` (n, vocab); the targets are not looked at."""
        some = logits[::_POSITIONS].astype(np.float32)
        some -= some.max(axis=1, keepdims=True)
        some -= np.log(np.exp(some).sum(axis=1, keepdims=True))
        if self._next is None:
            self._first.append(some)
            return
        first = self._first[self._next]
        self._next += 1
        self._sum += float((np.exp(first) * (first - some)).sum(dtype=np.float64))
        self._count += len(some)
