"""Making the estimate of an LM head: the rank-r matrix that errs least on the states that occur.

With E the head less its mean row (which changes no difference of logits) and C the second moment of the
final states, minimises trace((E - A B) C (E - A B)^T): an SVD in the metric of the states.  The plain SVD
of E is of no use: the states lie in few of its directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pi2.container.head import HeadEstimate
from pi2.container.layout import DENSE
from pi2.engine import Engine
from pi2.errors import OptionError
from pi2.sparse_head import final_states
from pi2.tensor import BLOCK, F32, U8, Tensor

CANDIDATES = (64, 128, 256, 512, 1024)
"""Numbers of candidates whose agreement is measured."""
_RIDGE = 0.01  # of the mean energy of a dimension: states that the text did not have
_SAMPLE = 16_384  # rows of the head that stand for all in its Gram matrix
_CHUNK = 1 << 21  # weights that are decoded at a time
_HELD_OUT = 5  # every so many-th sequence is measured on

F64 = NDArray[np.float64]


def train_head(
    engine: Engine,
    paths: Sequence[Path],
    *,
    rank: int | None = None,
    tokens: int = 5120,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> HeadEstimate:
    """The estimate of the engine's LM head; without ``rank`` a third of d_model.

    A fifth of the text's sequences only measures how often the likeliest token is a candidate.
    Raises OptionError if the rank cannot be, or the text has fewer than two sequences.
    """
    model, arch = engine.model, engine.model.architecture
    rank = rank or max(BLOCK, arch.d_model // 3 // BLOCK * BLOCK)
    if rank % BLOCK or not 0 < rank <= arch.d_model:
        raise OptionError(
            f"a rank of {rank} cannot be stored", hint=f"a multiple of {BLOCK}, at most {arch.d_model}"
        )
    progress("reading the text", 0, 3)
    states = [x for _, x in final_states(engine, paths, tokens)]
    if len(states) < 2:
        raise OptionError("the text is too short to hold some of it out", hint="give more text or --tokens")
    held_out = np.concatenate(states[::-_HELD_OUT])
    rest = [x for i, x in enumerate(reversed(states)) if i % _HELD_OUT]
    progress("factors", 1, 3)
    head = model.matrix("embed.weight" if arch.tied else "head.weight")
    mean = _mean_row(head)
    left, basis = factors(_gram(head, mean), _moment(np.concatenate(rest)), rank)
    rows = _project(head, mean, left)
    progress("measuring", 2, 3)
    agreement = _agreement(head, rows, basis, mean, held_out)
    progress("done", 3, 3)
    return HeadEstimate(model.manifest.files[DENSE].sha256, rows, basis, mean, len(held_out), agreement)


def factors(gram: F64, moment: F64, rank: int) -> tuple[F32, F32]:
    """L (d, rank) and B (rank, d), so that E L B is the best estimate of E: E^T E and C are (d, d)."""
    values, vectors = np.linalg.eigh(moment)
    values = np.maximum(values, values.max() * 1e-9)
    half = (vectors * np.sqrt(values)) @ vectors.T
    inverse = (vectors / np.sqrt(values)) @ vectors.T
    _, directions = np.linalg.eigh(half @ gram @ half)
    best = directions[:, ::-1][:, :rank]
    return (half @ best).astype(np.float32), np.ascontiguousarray((inverse @ best).T.astype(np.float32))


def _moment(states: F32) -> F64:
    wide = states.astype(np.float64)
    moment: F64 = wide.T @ wide / len(wide)
    moment[np.diag_indices_from(moment)] += _RIDGE * np.mean(np.square(wide))
    return moment


def _chunks(head: Tensor) -> list[slice]:
    step = max(1, _CHUNK // head.cols)
    return [slice(at, min(at + step, head.rows)) for at in range(0, head.rows, step)]


def _mean_row(head: Tensor) -> F32:
    total = sum(head.to_f32(rows).sum(axis=0, dtype=np.float64) for rows in _chunks(head))
    mean: F32 = np.asarray(total / head.rows, np.float32)
    return mean


def _gram(head: Tensor, mean: F32) -> F64:
    ids = np.linspace(0, head.rows - 1, min(_SAMPLE, head.rows)).astype(np.int32)
    gram = np.zeros((head.cols, head.cols))
    step = max(1, _CHUNK // head.cols)
    for at in range(0, len(ids), step):
        some = head.to_f32(ids[at : at + step]) - mean
        gram += some.T @ some
    return gram


def _project(head: Tensor, mean: F32, left: F32) -> Tensor:
    def part(rows: slice) -> U8:
        centred: F32 = head.to_f32(rows) - mean
        return Tensor.from_f32(np.matmul(centred, left, dtype=np.float32), "q8_0").data

    parts = [part(rows) for rows in _chunks(head)]
    return Tensor(np.concatenate(parts), "q8_0", left.shape[1])


def _agreement(head: Tensor, rows: Tensor, basis: F32, mean: F32, states: F32) -> dict[int, float]:
    """For each number of candidates, how often the likeliest token is one of them."""
    small = states @ basis.T
    best, place = np.full(len(states), -np.inf, np.float32), np.zeros(len(states), np.int64)
    for chunk in _chunks(head):
        logits = states @ head.to_f32(chunk).T
        at = logits.argmax(axis=1)
        value = logits[np.arange(len(states)), at]
        place = np.where(value > best, at + chunk.start, place)
        best = np.maximum(best, value)
    mine = np.sum(small * rows.to_f32(place.astype(np.int32)), axis=1)
    above = np.zeros(len(states), np.int64)
    for chunk in _chunks(head):
        above += (small @ rows.to_f32(chunk).T > mine[:, None]).sum(axis=1)
    return {k: float(np.mean(above < k)) for k in CANDIDATES if k <= head.rows}
