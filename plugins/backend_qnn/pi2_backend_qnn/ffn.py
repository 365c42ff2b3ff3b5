"""Calls of an FFN: begun, finished or given up."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pi2.accelerator import FfnDone
from pi2.tensor import BLOCK, F32

from pi2_backend_qnn import host
from pi2_backend_qnn.placed import Ffn
from pi2_backend_qnn.programs import Programs, Run
from pi2_backend_qnn.scaling import Exponents
from pi2_backend_qnn.tokens import Bad, finite_rows, pad, pieces


@dataclass(frozen=True, slots=True)
class Call:
    """An FFN that is being computed, in runs of so many tokens each."""

    ffn: Ffn
    mask: F32
    runs: list[tuple[slice, Exponents, Run]]
    bad: Bad | None
    good: NDArray[np.bool_]
    """(n,), which tokens are not bad."""

    def finish(self, out: F32) -> FfnDone:
        """Wait, and write ``out`` (n, d).  Raises QnnError."""
        active, start, end = 0, time.perf_counter(), 0.0
        for number, (part, e, run) in enumerate(self.runs):
            try:
                reply, (y, on, lifts) = run.finish()
            except BaseException:
                self.cancel(number + 1)
                raise
            out[part] = self.ffn.scaling.outputs(y[0, : len(e)], e, lifts[0, : len(e)])
            counts = on[0, : len(e)].sum(axis=1, dtype=np.float64)
            active += int(counts[self.good[part]].sum())
            start, end = min(start, reply.start), max(end, reply.end)
        if self.bad is not None:
            rows = np.flatnonzero(self.mask).astype(np.int32)
            out[self.bad.rows], more = host.ffn(self.ffn, self.bad.x, rows)
            active += more
        return FfnDone(active, start, end, [run.swap for _, _, run in self.runs if run.swap is not None])

    def cancel(self, first: int = 0) -> None:
        """Nobody wants the results of the runs from number ``first`` on."""
        for _, _, run in self.runs[first:]:
            run.cancel()


def begin(programs: Programs, ffn: Ffn, x: F32, mask: F32, count: int) -> Call:
    """Start the FFN of ``x`` (n, d), n >= 1, over the first ``count`` neurons; ``mask`` (k,) is 1 for those
    that take part, 0 for others, which may be computed as well.  Raises QnnError; then nothing was started.
    """
    x, bad = finite_rows(x)
    good = np.ones(len(x), np.bool_)
    if bad is not None:
        good[bad.rows] = False
    call = Call(ffn, mask, [], bad, good)
    try:
        for part in pieces(len(x)):
            e, fed = ffn.scaling.inputs(x[part], ffn.spec)
            shape = programs.choose(ffn, ffn.shape_for(len(e), count))
            inputs = {name: pad(values, shape[0]) for name, values in fed.items()}
            inputs |= _masks(ffn, mask, shape[1])
            widths = ffn.spec.geometry.d_model, shape[1], ffn.scaling.lifts
            outputs = [(1, shape[0], width) for width in widths]
            call.runs.append((part, e, programs.begin(ffn, shape, inputs, outputs)))
    except BaseException:
        call.cancel()
        raise
    return call


def _masks(ffn: Ffn, mask: F32, clusters: int) -> dict[str, F32]:
    """The mask of each cluster (1, 1, n), n padded to whole blocks."""
    masks, first = {}, 0
    for number, size in enumerate(ffn.sizes(clusters)):
        padded = np.zeros((1, 1, -(-size // BLOCK) * BLOCK), np.float32)
        padded[0, 0, :size] = mask[first : first + size]
        masks[f"mask{number}"] = padded
        first += size
    return masks
