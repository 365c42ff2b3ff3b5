"""What the FFNs of a model see on text, kept on disk: predictors learn from it, layer by layer."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pi2.engine import Engine
from pi2.errors import BudgetError, OptionError
from pi2.kv_cache import KvCache
from pi2.tensor import F32
from pi2.text_files import TextFile, opening, read_texts

SEQUENCE = 128
"""Tokens of a sequence, where the model's context has room for so many."""
HELD_OUT = 8
"""One sequence of so many is not trained on."""
_FLUSH_EVERY = 16  # sequences
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Sequences (n, tokens) from the texts in turn, n >= 2, and what stands before each."""

    sequences: NDArray[np.int64]
    opening: list[int]
    texts: tuple[str, ...]
    """SHA-256 of each text."""

    @property
    def held_out(self) -> NDArray[np.bool_]:
        """(n,): the sequences that nothing is trained on."""
        n = len(self.sequences)
        every = min(HELD_OUT, n)
        chosen: NDArray[np.bool_] = np.arange(n) % every == every - 1
        return chosen


def read_corpus(engine: Engine, paths: Sequence[Path], tokens: int) -> Corpus:
    """About ``tokens`` tokens, from each text in turn.  Raises OptionError if that is too little."""
    before = opening(engine.tokenizer)
    length = min(SEQUENCE, KvCache(engine.model.architecture, engine.context).limit - len(before))
    texts: list[TextFile] = list(read_texts(paths, engine.tokenizer, max(1, length)))
    turns = itertools.zip_longest(*(text.sequences for text in texts))
    chosen = [ids for turn in turns for ids in turn if ids is not None][: tokens // length]
    if len(chosen) < 2:
        raise OptionError(
            f"{len(chosen) * length} tokens are too few: one sequence is trained on, another judges",
            hint=f"give a longer text and at least {2 * length} --tokens",
        )
    return Corpus(np.stack(chosen), before, tuple(text.sha256 for text in texts))


class Inputs:
    """The inputs of every FFN for every token of a corpus, as float16 in ``directory``.

    What an earlier, stopped run kept there is taken over; the caller sees to it that it was of the same
    model and corpus.
    """

    def __init__(self, engine: Engine, corpus: Corpus, directory: Path) -> None:
        arch, (n, length) = engine.model.architecture, corpus.sequences.shape
        self._engine, self._corpus = engine, corpus
        self._journal = directory / "inputs.done"
        file, shape = directory / "inputs", (arch.n_layers, n * length, arch.d_model)
        nbytes = 2 * int(np.prod(shape))
        old = file.stat().st_size if file.exists() else 0
        free = shutil.disk_usage(directory).free + old
        if nbytes > free:
            raise BudgetError(
                f"the inputs of {n * length} tokens take {nbytes} bytes, {directory} has {free} free",
                hint="train on fewer --tokens, or write elsewhere with --out",
            )
        self._done = _count(self._journal) if old == nbytes else 0
        self._values: NDArray[np.float16] = np.memmap(
            file, np.float16, "r+" if old == nbytes else "w+", shape=shape
        )

    def collect(self, progress: Progress) -> None:
        """Run the model over the sequences that are not there yet: dense prefill, one at a time."""
        total = self._corpus.sequences.size
        length = self._corpus.sequences.shape[1]
        try:
            for i in range(self._done, len(self._corpus.sequences)):
                self._sequence(i)
                self._done = i + 1
                if self._done % _FLUSH_EVERY == 0:
                    self._flush()
                progress("reading", self._done * length, total)
        finally:
            self._flush()

    def layer(self, layer: int) -> tuple[F32, F32]:
        """What one FFN saw: (n, d) to train on and (m, d) to judge by."""
        length = self._corpus.sequences.shape[1]
        held_out = np.repeat(self._corpus.held_out, length)
        values = self._values[layer]
        return values[~held_out].astype(np.float32), values[held_out].astype(np.float32)

    def _sequence(self, i: int) -> None:
        ids, before, decoder = self._corpus.sequences[i], self._corpus.opening, self._engine.decoder
        place = slice(i * len(ids), (i + 1) * len(ids))

        def observe(layer: int, x: F32) -> None:
            self._values[layer, place] = x[len(before) :]

        decoder.observer = observe
        try:
            whole = np.concatenate((np.array(before, np.int64), ids))
            decoder.forward(whole, decoder.new_cache(len(whole)))
        finally:
            decoder.observer = None

    def _flush(self) -> None:
        self._values.flush()  # type: ignore[attr-defined]  # of a memmap
        self._journal.write_text(str(self._done))


def _count(journal: Path) -> int:
    """Sequences that are on the disk."""
    try:
        return int(journal.read_text())
    except (FileNotFoundError, ValueError):
        return 0
