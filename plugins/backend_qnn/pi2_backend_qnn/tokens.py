"""Tokens on their way into static graphs: cut to pieces, padded, and freed of what is not finite."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pi2.tensor import F32

from pi2_backend_qnn.placed import rows_for


@dataclass(frozen=True, slots=True)
class Bad:
    """Tokens with an infinity or a NaN: which, and what they are."""

    rows: NDArray[np.int64]
    x: F32


def finite_rows(x: F32) -> tuple[F32, Bad | None]:
    """``x`` (n, cols) with zeros in place of rows that are not finite, and those rows, if there are any."""
    finite = np.logical_and.reduce(np.isfinite(x), axis=1)
    if finite.all():
        return x, None
    rows = np.flatnonzero(~finite)
    return np.where(finite[:, None], x, np.float32(0)), Bad(rows, x[rows])


def pieces(tokens: int) -> list[slice]:
    """The tokens that go through a graph together."""
    most = rows_for(tokens)
    return [slice(first, min(tokens, first + most)) for first in range(0, tokens, most)]


def pad(x: F32, rows: int) -> F32:
    """(n, cols) -> (1, rows, cols), zeros behind what is there."""
    padded = np.zeros((1, rows, x.shape[1]), np.float32)
    padded[0, : len(x)] = x
    return padded
