"""FFNs whose weights are on flash: predict, look up, read what is missing, compute (PowerInfer-2 §4)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from pi2.api import Backend, FfnSpec, Predictor, StorageTier
from pi2.budget import Regions, Room
from pi2.errors import OptionError, StorageError
from pi2.ffns import add_range, dense_ranges
from pi2.lookahead import Lookahead
from pi2.memory import give_back_unused, rss_bytes
from pi2.neuron_cache import NeuronCache
from pi2.offload_count import OffloadCount
from pi2.offload_options import OffloadOptions
from pi2.pipeline import FfnPipeline, NativePipeline, PythonPipeline, head_bytes
from pi2.powers import SlotState, SupportsAsyncRead, SupportsStorageAbi, SupportsStreaming
from pi2.prefill import DenseReader
from pi2.read_pattern import two_phases_pay
from pi2.tensor import F32, U8, Ids
from pi2.trace import TraceWriter

if TYPE_CHECKING:
    from pi2.container.reader import PiModel

_RECENT = 8  # tokens at the end of a prompt whose neurons the next ones will probably want
_PRESENT = int(SlotState.PRESENT)  # an enum is slow to compare arrays with
_MARGIN = 4 << 20  # bytes of the budget that are left for what a token may need


class OffloadedFfns:
    """``Ffns`` over a neuron cache.  One token: neuron by neuron; many: dense, range by range.

    After an error, or Ctrl-C, the cache is as good as before: what was not read is read when wanted next.
    """

    def __init__(
        self, model: PiModel, backend: Backend, tier: StorageTier, predictor: Predictor,
        cache: NeuronCache, options: OffloadOptions, room: Room, dense: Backend | None = None,
    ) -> None:  # fmt: skip
        """``dense``: another backend, for many tokens."""
        arch = model.architecture
        self.cache, self.options = cache, options
        self.count = OffloadCount()
        self._room, self._tokens = room, 0
        self._inside = False  # of a call
        self._late: tuple[int, Ids] | None = None  # a guess for an FFN that has been computed
        self._thrashes = False
        self.notes: list[str] = []
        """What the user should know: slower than could be, smaller than wise."""
        self._predictor, self._backend, self._dense = predictor, backend, dense or backend
        self._spec = FfnSpec(model.geometry, arch.activation, arch.up_relu)
        self._last = arch.n_layers - 1
        self._all = np.arange(arch.n_neurons, dtype=np.int32)
        self.places = [model.ffn_place(ffn) for ffn in range(arch.n_layers)]
        ranges = dense_ranges(model.geometry, arch.n_neurons)
        self.reader = DenseReader(tier, self.places, ranges, model.geometry.stride)
        self.two_phase = self._two_phases(tier, options.two_phase)
        """Whether gates are read first."""
        self.pipeline = self._open_pipeline(tier, options)
        ahead = isinstance(tier, SupportsAsyncRead)
        if options.prefetch == "on" and not ahead:
            raise OptionError(f"storage {tier.name} cannot read ahead", hint="prefetch=auto does if it can")
        self.lookahead = Lookahead(model, options.prefetch if ahead else "off")
        self.trace = TraceWriter(options.trace) if options.trace else None

    @property
    def regions(self) -> Regions:
        """How the budget is shared out now."""
        return self._room.regions(self.cache.capacity, self.cache.n_hot)

    def fit(self, tokens: int) -> None:
        """Resize the regions for ``tokens`` computed together (PowerInfer-2 §4.2).  Nothing is being read."""
        if tokens == self._tokens:
            return
        if tokens == 1:
            self.reader.stop()
            give_back_unused()
        self.cache.resize(self._room.slots(tokens))
        self._tokens = tokens

    def _two_phases(self, tier: StorageTier, wish: str) -> bool:
        head = head_bytes(self._spec)
        if head is None or wish == "off" or not self.options.bundled:
            return False
        if wish == "on":
            return True
        stride, sure = self.cache.slab.shape[1], self._predictor.lossless  # named is active then
        return not sure and two_phases_pay(tier, self.places[0], self.cache.neurons, stride, head)

    def _open_pipeline(self, tier: StorageTier, options: OffloadOptions) -> FfnPipeline:
        backend, cache = self._backend, self.cache
        native = isinstance(backend, SupportsStreaming) and isinstance(tier, SupportsStorageAbi)
        if options.pipeline == "native" and not native:
            raise OptionError(
                f"{backend.name} with {tier.name} has no native pipeline", hint="see pi2 plugins, or leave it"
            )
        if not native or options.pipeline == "python":
            return PythonPipeline(
                backend, tier, cache.slab, cache.states, cache.neurons, self._spec,
                two_phase=self.two_phase, trace=options.trace is not None, bundled=options.bundled,
            )  # fmt: skip
        assert isinstance(backend, SupportsStreaming)
        assert isinstance(tier, SupportsStorageAbi)
        return NativePipeline(
            backend, backend.place_slab(cache.slab, cache.neurons, self._spec), cache.states,
            tier.abi_address(), two_phase=self.two_phase, cluster=options.cluster,
            trace=options.trace is not None, overlap=options.overlap, bundled=options.bundled,
        )  # fmt: skip

    def expect(self, ffn: int, tokens: Sequence[int]) -> None:
        return None

    def sparse(self, ffn: int, x: F32, predictor: Predictor, out: F32) -> int:
        rows = predictor.predict(ffn, x)
        neurons = self._all if rows is None else rows
        self._begin()
        try:
            if self.lookahead.pending and self.lookahead.pending[0] != ffn:
                self._forget_guess()
            if ffn == 0:
                self.fit(1)
                self.lookahead.next_token()
            slots = self.cache.acquire(ffn, neurons)
            self.count.wanted += len(neurons)
            guessed = self.lookahead.pending
            meanwhile = partial(self._meanwhile, ffn, neurons, slots, x)
            count = self.pipeline.ffn(self.places[ffn], neurons, slots, x, out, meanwhile)
            self._late = guessed
            if ffn == self._last:
                self._settle()
        except StorageError:
            self._forget_guess()
            self._inside = False
            raise
        self.count.add(count)
        self._inside = False
        return count.active

    def _begin(self) -> None:
        """If the last call was interrupted, the tables of the cold region are not to be trusted."""
        if self._inside:
            self.reader.stop()
            self.pipeline.settle(cancel=True)
            self.lookahead.pending = self._late = None
            self.cache.reset()
        self._inside = True

    def _meanwhile(self, ffn: int, neurons: Ids, slots: Ids, x: F32) -> None:
        """While ``neurons`` are read: put tables in order, judge what was guessed, guess what comes next."""
        self.cache.tell()
        self._settle()
        if self.lookahead.pending:
            guessed = self.lookahead.pending[1]
            at = neurons.searchsorted(guessed)
            useful = int(np.count_nonzero(neurons.take(at, mode="clip") == guessed)) if len(neurons) else 0
            self.count.useful += useful
            self.lookahead.learn(len(guessed), useful)
            self.lookahead.pending = None
        if self.lookahead.on:
            self._guess_next(ffn, x, slots)

    def _guess_next(self, ffn: int, x: F32, slots: Ids) -> None:
        """Start to read what FFN ``ffn + 1`` will probably want and does not have."""
        guess = self.lookahead.guess(self._predictor, ffn, x)
        if guess is None or len(guess[0]) + len(slots) > self.cache.capacity:
            return
        likely, sure = guess
        absent = np.flatnonzero(self.cache.slots(ffn + 1, likely) < 0)
        likely = self.lookahead.surest(likely[absent], None if sure is None else sure[absent])
        neurons, where = self.cache.admit(ffn + 1, likely, slots)
        self.lookahead.pending = ffn + 1, neurons
        self.pipeline.prefetch(self.places[ffn + 1], neurons, where)
        self.count.guessed += len(neurons)

    def _forget_guess(self) -> None:
        """Nothing is read for later any more: the next FFN may be any."""
        self.count.wasted_bytes += self.pipeline.settle(cancel=True)
        self._settle()
        self._late, self.lookahead.pending = self.lookahead.pending, None
        self._settle()

    def _settle(self) -> None:
        """Call back what was guessed for the last FFN and not wanted, as far as it is still being read."""
        if self._late is None:
            return
        (ffn, guessed), self._late = self._late, None
        slots = self.cache.slots(ffn, guessed)
        if (self.cache.states[slots] == _PRESENT).all():  # -1 looks at the last one, whatever that is
            return
        slots = slots[slots >= 0]
        loading = slots[self.cache.states[slots] == SlotState.LOADING]
        if len(loading):
            self.count.wasted_bytes += self.pipeline.settle(loading, cancel=True)
        self.cache.drop(slots[self.cache.states[slots] == SlotState.EMPTY])

    def dense(self, ffn: int, chunks: Sequence[tuple[F32, F32]]) -> int:
        self._begin()
        try:
            self._forget_guess()
            if ffn == 0:
                self.fit(sum(len(x) for x, _ in chunks))
            active = self._dense_ranges(ffn, chunks)
        except StorageError:
            self._inside = False
            raise
        self._inside = False
        return active

    def _dense_ranges(self, ffn: int, chunks: Sequence[tuple[F32, F32]]) -> int:
        active, begin = 0, time.perf_counter()
        neurons, slots = self._likely_next(ffn, chunks[-1][0])
        for first, bundles in self.reader.bundles(ffn):
            placed = self._dense.place_ffn(bundles, self._spec)
            try:
                for x, out in chunks:
                    active += add_range(self._dense, placed, x, out, None, first == 0)
            finally:
                self._dense.release(placed)
            self._warm(neurons, slots, first, bundles)
        self.count.stream.wall_s += time.perf_counter() - begin
        return active

    def _likely_next(self, ffn: int, x: F32) -> tuple[Ids, Ids]:
        """Neurons that the last tokens of a prompt used, and slots for those that are not in memory."""
        neurons = self._predictor.predict(ffn, np.ascontiguousarray(x[-_RECENT:]))
        if neurons is None:
            neurons = self._all[:0]
        slots = self.cache.acquire(ffn, neurons)
        absent = self.cache.states[slots] != SlotState.PRESENT
        return neurons[absent], slots[absent]

    def _warm(self, neurons: Ids, slots: Ids, first: int, bundles: U8) -> None:
        """Copy what goes through memory anyway into the cache."""
        here = slice(*np.searchsorted(neurons, (first, first + len(bundles))))
        self.cache.slab[slots[here]] = bundles[neurons[here] - first]
        self.cache.states[slots[here]] = SlotState.PRESENT

    def take_count(self) -> OffloadCount:
        """What happened since the last call, which was a token, or a prefill."""
        taken, self.count = self.count, OffloadCount()
        taken.add(self.reader.take_count())
        if self.trace is not None:
            self.trace.add(self.pipeline.spans())
            if self.trace.failure:
                self._note(self.trace.failure)
        if taken.wanted > self.cache.capacity and not self._thrashes:
            self._thrashes = True
            self._note(
                f"the cache holds {self.cache.capacity} neurons, a token wants {taken.wanted}:"
                " most of them are read again for every token"
            )
        self._begin()
        if self.lookahead.pending:  # of a token that was not finished: nothing is read while slots go
            self._forget_guess()
        self._stay_within_budget()
        self._inside = False
        return taken

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _stay_within_budget(self) -> None:
        """The fixed region was estimated: the cold one gives what that was too low by, and takes the rest."""
        cache, budget = self.cache, self.options.memory
        if budget is None:
            return
        stride, spare = cache.slab.shape[1], budget - rss_bytes() - self._room.outside()
        if spare < 0:
            least = cache.n_hot + cache.neurons
            slots, planned = max(least, cache.capacity - -(spare // stride)), self._room.slots(1)
            if slots < planned:
                self._room.correct((planned - slots) * stride)
            cache.resize(slots)
            if slots == least:
                self._note("more memory than the budget is in use: the estimate of the minimum was too low")
        elif self._tokens == 1 and self._room.alone:
            cache.resize(cache.capacity + max(0, (spare - _MARGIN) // stride - cache.untouched))

    def close(self) -> None:
        """End all reads and give the slab back."""
        self.reader.stop()
        self.pipeline.close()
        if self.trace is not None:
            self.trace.close()
