"""Counting which neurons are active on text (PowerInfer-2 §5, offline profiling)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pi2.activation_counts import BATCHES, ActivationCounts, Sums
from pi2.activity import Active, open_factors
from pi2.activity_sketch import ActivitySketch
from pi2.api import Predictor
from pi2.container.layout import NEURONS
from pi2.engine import Engine
from pi2.errors import OptionError
from pi2.kv_cache import KvCache
from pi2.tensor import F32, U8
from pi2.text_files import TextFile, opening, read_texts

SEQUENCE = 128
"""Tokens of a sequence, where the model's context has room for so many."""


@dataclass(frozen=True, slots=True)
class _Work:
    """Sequences ``start`` ... ``end`` - 1 of a text that are still to be counted."""

    text: TextFile
    start: int
    end: int


class Collector:
    """Runs texts through a model and counts.  Dense prefill: what is counted does not depend on a predictor.

    A text is cut into sequences, and as many consecutive ones as the largest batch has make a group.  A
    batch of b are b sequences of a group at the same position; groups do not reach over the end of a
    text, so that the counts of several texts are the sum of the counts of each.
    """

    def __init__(
        self, engine: Engine, batches: Sequence[int] = BATCHES, named_by: tuple[str, Predictor] | None = None
    ) -> None:
        """``named_by``: an attached predictor that keeps nothing between calls, and what to call it.

        Then a neuron counts if it is named; without, if it is not zero.
        """
        model, arch = engine.model, engine.model.architecture
        if not arch.sparse and named_by is None:
            raise OptionError(
                f"{arch.activation} has no exact zeros: every neuron is active for every token",
                hint="count what a threshold leaves: --density 0.5",
            )
        self._engine, self._model = engine, model
        self._predictor = named_by and named_by[1]
        self._opening = opening(engine.tokenizer)
        limit = KvCache(arch, engine.context).limit
        sequence = min(SEQUENCE, limit - len(self._opening))
        if sequence < 1:
            raise OptionError(f"a context of {limit} has no room for a token", hint="raise --context")
        self.counts = ActivationCounts.empty(
            model.manifest.files[NEURONS].sha256,
            arch.n_layers,
            arch.n_neurons,
            sequence=sequence,
            batches=tuple(batches),
            activity=named_by[0] if named_by else "exact",
        )

    def resume(self, found: ActivationCounts) -> None:
        """Go on from what was counted.  Raises FormatError if it is of another model or setting."""
        self.counts = self.counts.merged(found)

    def run(
        self,
        paths: Sequence[Path],
        tokens: int | None = None,
        progress: Callable[[str, int, int], None] = lambda what, done, total: None,
        checkpoint: Callable[[], None] = lambda: None,
    ) -> None:
        """Count what ``counts`` does not have of the texts, at most ``tokens`` of them in all.

        ``progress`` hears (file, tokens done, tokens in all), ``checkpoint`` is called after each group,
        when ``counts`` is whole.  An exception, also KeyboardInterrupt, leaves it so too.
        """
        length = self.counts.sequence
        plan, total, done = self._plan(paths, tokens)
        for work in plan:
            for start in range(work.start, work.end, self.counts.batches[-1]):
                end = min(start + self.counts.batches[-1], work.end)

                def show(counted: int, name: str = work.text.path.name, before: int = done) -> None:
                    progress(name, (before + counted) * length, total * length)

                self._group(work.text, start, end, show)
                done += end - start
                checkpoint()

    def _plan(self, paths: Sequence[Path], tokens: int | None) -> tuple[list[_Work], int, int]:
        """The work, sequences in all, and how many of these are counted already."""
        room = None if tokens is None else max(1, tokens // self.counts.sequence)
        plan, total, counted = [], 0, 0
        for text in read_texts(paths, self._engine.tokenizer, self.counts.sequence):
            wanted = len(text.sequences) if room is None else min(room - total, len(text.sequences))
            have = min(wanted, self.counts.texts.get(text.sha256, 0))
            plan.append(_Work(text, have, wanted))
            total, counted = total + wanted, counted + have
            if total == room:
                break  # before the next text is read
        return plan, total, counted

    def _group(self, text: TextFile, start: int, end: int, on_sequence: Callable[[int], None]) -> None:
        arch, decoder, length = self._model.architecture, self._engine.decoder, self.counts.sequence
        packed: U8 = np.empty(
            (arch.n_layers, end - start, length, -(-arch.n_neurons // 8)), np.uint8
        )  # one bit a neuron
        factors = np.zeros((arch.n_layers, 3), np.int64)

        for i, ids in enumerate(text.sequences[start:end]):

            def observe(layer: int, x: F32, i: int = i) -> None:
                active, opened = self._active(layer, x[len(self._opening) :])
                factors[layer] += opened
                packed[layer, i] = np.packbits(active, axis=1)

            decoder.observer = observe
            try:
                decoder.forward(self._with_opening(ids), decoder.new_cache(len(ids) + len(self._opening)))
            finally:
                decoder.observer = None
            on_sequence(i + 1)
        fresh = self._counted(text.sha256, start, packed, factors)
        self.counts = self.counts.merged(fresh, later=True)  # at once, or not at all

    def _active(self, layer: int, x: F32) -> tuple[Active, tuple[int, int, int]]:
        """Activity of the tokens ``x``, and how many gates, up sides and both were open."""
        if self._predictor is not None:
            active = np.zeros((len(x), self._model.architecture.n_neurons), np.bool_)
            for row, token in zip(active, x, strict=True):
                ids = self._predictor.predict(layer, token[None])
                row[slice(None) if ids is None else ids] = True
            n = int(active.sum())
            return active, (n, n, n)
        gate, up = open_factors(self._model, layer, x)
        active = gate if up is None else gate & up
        return active, (int(gate.sum()), gate.size if up is None else int(up.sum()), int(active.sum()))

    def _counted(self, text: str, start: int, packed: U8, factors: Sums) -> ActivationCounts:
        """Counts of a group, ``packed`` (layers, sequences, positions, bytes), from sequence ``start`` on."""
        whole = self.counts
        layers, neurons = whole.counts.shape[0], whole.counts.shape[2]
        fresh = ActivationCounts.empty(
            whole.model, layers, neurons, sequence=whole.sequence, batches=whole.batches,
            activity=whole.activity,
        )  # fmt: skip
        for layer in range(layers):
            fresh.add(layer, np.unpackbits(packed[layer], axis=2, count=neurons).view(np.bool_))
        fresh.factors += factors
        tokens = packed.reshape(layers, -1, packed.shape[3])
        fresh.sketch = ActivitySketch.of_tokens(text, start * whole.sequence, tokens, neurons)
        fresh.finish_group(text, packed.shape[1])
        return fresh

    def _with_opening(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.concatenate((np.array(self._opening, np.int64), ids))
