"""FFNs in two halves at the same time: hot clusters on an accelerator, cold neurons on the CPU.

PowerInfer-2 §4.1.2: the accelerator computes its rows densely and asks no predictor; the CPU predicts,
computes what is active of the others, and adds both partial sums.  An FFN is a sum over its neurons, so
which of them are hot changes nothing but rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pi2.accelerator import FfnDone, SupportsAsyncFfn
from pi2.api import Backend, Predictor, Probe
from pi2.errors import OptionError, Pi2Error
from pi2.ffns import Ffns
from pi2.hot import HotClusters
from pi2.offload_count import OffloadCount
from pi2.powers import SPANS, Stage
from pi2.tensor import F32, Ids
from pi2.trace import ACCELERATOR, GRAPHS, TraceWriter


@dataclass(frozen=True, slots=True)
class HybridOptions:
    """How an accelerator and the CPU share a model."""

    hot: float = 0.5
    """Share of each FFN that the accelerator computes, in whole clusters; the CPU has the rest."""
    most: float | None = None
    """The largest share that will be asked for: so much is kept on the accelerator; None: ``hot``."""
    cluster: int = 64
    """Neurons of a cluster."""
    attention: str = "cpu"
    """Where attention is computed: "cpu" or "accelerator"."""
    prefill: str = "cpu"
    """Where the FFNs of many tokens are computed, dense: "cpu" or "accelerator"."""
    lost: str = "stop"
    """What happens if the accelerator fails: "stop", or go on on the "cpu" alone, said aloud."""
    trace: Path | None = None
    """File to write what both halves did to, for Perfetto."""

    def __post_init__(self) -> None:
        if not 0 <= self.hot <= 1:
            raise OptionError(f"{self.hot:g} of an FFN cannot be hot", hint="0 to 1")
        if self.most is not None and not self.hot <= self.most <= 1:
            raise OptionError(
                f"most={self.most:g} is no bound for a hot share of {self.hot:g}", hint="from that to 1"
            )
        if not 1 <= self.cluster <= 1 << 16:
            raise OptionError(f"a cluster of {self.cluster} neurons cannot be", hint="1 to 65536")
        places = ("cpu", "accelerator")
        for name, known in {"attention": places, "prefill": places, "lost": ("stop", "cpu")}.items():
            if (value := getattr(self, name)) not in known:
                says = f"{name} is {known[0]} or {known[1]}, not {value!r}"
                raise OptionError(says, hint=f"{name}={known[0]} is the default")


class OneAfterTheOther:
    """``SupportsAsyncFfn`` for any backend, out of its floor: the slow twin, without the overlap."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def prepare_ffn(self, ffn: Any, tokens: int, count: int) -> bool:
        return True

    def begin_ffn(self, ffn: Any, x: F32, count: int) -> tuple[Any, F32, int]:
        return ffn, x, count

    def finish_ffn(self, ticket: Any, out: F32) -> FfnDone:
        ffn, x, count = ticket
        start = time.perf_counter()
        active = self._backend.ffn(ffn, x, out, np.arange(count, dtype=np.int32))
        return FfnDone(active, start, time.perf_counter())

    def cancel_ffn(self, ticket: Any) -> None:
        return None


class ColdOnly(Predictor):
    """Another predictor that does not name hot neurons: for whoever reads and computes the cold ones."""

    name = "cold-only"
    lossless = False

    def __init__(self, predictor: Predictor, hot: HotClusters) -> None:
        self._predictor, self._hot = predictor, hot
        self.lossless = predictor.lossless  # type: ignore[misc]  # of this one

    @classmethod
    def probe(cls) -> Probe:
        return Probe(0, "part of another predictor; not to be chosen")

    def predict(self, ffn: int, x: F32) -> Ids | None:
        return self._hot.cold(ffn, self._predictor.predict(ffn, x))


@dataclass(slots=True)
class HybridCount:
    """Seconds of wall clock of single tokens' FFNs, and how many there were."""

    ffns: int = 0
    hot_s: float = 0.0
    """The accelerator computed."""
    cold_s: float = 0.0
    """The CPU computed, and predicted."""
    overlap_s: float = 0.0
    """Both did."""
    wait_s: float = 0.0
    """The CPU had nothing left to do but wait for the accelerator."""
    graphs: int = 0
    """Graphs of another shape that the accelerator began to use."""
    graph_wait_s: float = 0.0
    """It had to wait for one."""


class HybridFfns:
    """``Ffns`` of an accelerator and of ``cold``, which has all neurons and computes those that are not hot.

    ``placed``: for each FFN what ``accelerator.place_ffn`` made of the first ``capacity`` neurons of its
    order in ``hot``, or None.
    """

    def __init__(
        self, accelerator: Backend, placed: list[Any], capacity: int, hot: HotClusters, cold: Ffns,
        options: HybridOptions, trace: TraceWriter | None = None,
    ) -> None:  # fmt: skip
        self.options, self.hot, self.cold = options, hot, cold
        self.count = HybridCount()
        self.share = 0.0
        """Of each FFN, hot: what was asked for last."""
        self.capacity = capacity
        """Neurons of each FFN that can be hot."""
        self.notes: list[str] = []
        """What the user should know."""
        self.lost = False
        """The accelerator failed, and the CPU computes everything since."""
        self.also: Callable[[], None] | None = None
        """Takes from the accelerator what else it computes, when it is lost."""
        self._accelerator, self._placed = accelerator, placed
        native = isinstance(accelerator, SupportsAsyncFfn)
        self._power: SupportsAsyncFfn = (
            accelerator if isinstance(accelerator, SupportsAsyncFfn) else OneAfterTheOther(accelerator)
        )
        if not native:
            self.notes.append(
                f"{accelerator.name} computes nothing in the background: one half waits for the other"
            )
        self._neurons = len(hot.orders[0])
        self._trace = trace
        self._spans: list[tuple[int, int, int, int, int, float, float]] = []
        self._dense_here = options.prefill == "accelerator" and capacity == self._neurons
        self.set_share(options.hot)

    def set_share(self, share: float) -> None:
        """So much of each FFN is hot as soon as the accelerator is ready, which it gets ready for meanwhile.

        Raises OptionError for a share that was not provided for.
        """
        if not 0 <= share <= 1 or self.hot.neurons(share) > self.capacity:
            raise OptionError(
                f"{share:g} of an FFN cannot be hot: the accelerator has {self.capacity} of {self._neurons}"
                " neurons", hint="open with a larger most=",
            )  # fmt: skip
        self.share = share

    def expect(self, ffn: int, tokens: Sequence[int]) -> None:
        self.cold.expect(ffn, tokens)
        wanted = self.hot.neurons(self.share)
        if 0 in (wanted, self.hot.count(ffn)):
            self.hot.resize(ffn, wanted)
        for n in sorted(set(tokens)):
            count = wanted if n == 1 else self._neurons * self._dense_here
            if count and self._power.prepare_ffn(self._placed[ffn], n, count) and n == 1:
                self.hot.resize(ffn, count)  # else as many as before, until the accelerator is ready

    def sparse(self, ffn: int, x: F32, predictor: Predictor, out: F32) -> int:
        count = self.hot.count(ffn)
        if count == 0:
            return self.cold.sparse(ffn, x, predictor, out)
        begin = time.perf_counter()
        try:
            ticket = self._power.begin_ffn(self._placed[ffn], x, count)
        except Pi2Error as e:
            self.lose(e)
            return self.sparse(ffn, x, predictor, out)
        part = np.empty_like(out)
        try:
            active = self.cold.sparse(ffn, x, ColdOnly(predictor, self.hot), part)
        except BaseException:
            self._power.cancel_ffn(ticket)
            raise
        waiting = time.perf_counter()
        try:
            done = self._power.finish_ffn(ticket, out)
        except Pi2Error as e:
            self.lose(e)
            return self.sparse(ffn, x, predictor, out)
        out += part
        self._note(ffn, count, done, begin, waiting)
        return active + done.active

    def dense(self, ffn: int, chunks: Sequence[tuple[F32, F32]]) -> int:
        if not self._dense_here:
            return self.cold.dense(ffn, chunks)
        active = 0
        for x, out in chunks:
            try:
                ticket = self._power.begin_ffn(self._placed[ffn], x, self._neurons)
                done = self._power.finish_ffn(ticket, out)
            except Pi2Error as e:
                self.lose(e)
                return self.cold.dense(ffn, chunks)
            active += done.active
            self._span(ffn, Stage.HOT, self._neurons, done.start, done.end)
            self._note_graphs(ffn, self._neurons, done)
        return active

    def lose(self, error: Pi2Error) -> None:
        """The accelerator failed: go on without it if that was asked for, else raise ``error``."""
        if self.options.lost != "cpu":
            raise error
        self.notes.append(f"{error}: the CPU computes everything from here on")
        self.lost, self.share, self.capacity, self._dense_here = True, 0.0, 0, False
        for ffn in range(len(self._placed)):
            self.hot.resize(ffn, 0)
        if self.also is not None:
            self.also()

    def _note(self, ffn: int, count: int, done: FfnDone, begin: float, waiting: float) -> None:
        total = self.count
        total.ffns += 1
        total.hot_s += done.end - done.start
        total.cold_s += waiting - begin
        total.overlap_s += max(0.0, min(done.end, waiting) - max(done.start, begin))
        total.wait_s += time.perf_counter() - waiting
        self._note_graphs(ffn, count, done)
        self._span(ffn, Stage.HOT, count, done.start, done.end)
        self._span(ffn, Stage.COLD, self._neurons - count, begin, waiting)

    def _note_graphs(self, ffn: int, count: int, done: FfnDone) -> None:
        for swap in done.swaps:
            self.count.graphs += 1
            self.count.graph_wait_s += swap.wait_s
            self._span(ffn, Stage.GRAPH, count, swap.start, swap.end)

    def _span(self, ffn: int, stage: Stage, neurons: int, start: float, end: float) -> None:
        if self._trace is not None:
            thread = {Stage.HOT: ACCELERATOR, Stage.GRAPH: GRAPHS}.get(stage, 0)
            self._spans.append((ffn, 0, stage, thread, neurons, start, end))

    def take_count(self) -> OffloadCount | None:
        if self._trace is not None:
            self._trace.add(np.array(self._spans, SPANS))
            self._spans.clear()
        return self.cold.take_count()

    def close(self) -> None:
        """Free what the accelerator has.  ``cold`` is the caller's, and so is the trace."""
        for handle in self._placed:
            if handle is not None:
                self._accelerator.release(handle)
        self._placed = []
