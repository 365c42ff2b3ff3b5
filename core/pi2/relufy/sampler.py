"""Rows to train on, drawn from texts in given shares, by the seed and the number of the row alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from pi2.relufy.corpus import Document, Row, Text, begin, pack
from pi2.text import TextTokenizer

_LEAST_CONVERSATION = 64  # tokens of room below which no conversation is begun
_LEAST_PIECE = 24  # tokens; a shorter rest of a row goes to the piece before it


@dataclass(slots=True)
class Drawn:
    """How far a sampler has come: all that a checkpoint needs to know of it."""

    rows: int = 0
    tokens: list[int] = field(default_factory=list)
    """By text."""
    documents: list[int] = field(default_factory=list)
    """By text; what is drawn whole is drawn without replacement."""


class Sampler:
    """Packs rows of ``sequence`` tokens, every fourth of twice as many."""

    def __init__(
        self,
        texts: Sequence[Text],
        tokenizer: TextTokenizer,
        *,
        shares: Sequence[float],
        sequence: int,
        longest: int,
        seed: int,
    ) -> None:
        weights = np.array(shares or [1.0] * len(texts))
        self._texts, self._tokenizer = texts, tokenizer
        self._shares = weights / weights.sum()
        self._sequence, self._longest, self._seed = sequence, longest, seed
        self.drawn = Drawn(tokens=[0] * len(texts), documents=[0] * len(texts))

    def next(self) -> Row:
        """The next row."""
        drawn = self.drawn
        rng = np.random.default_rng([self._seed, 0, drawn.rows])
        room = self._sequence * (2 if drawn.rows % 4 == 3 else 1)
        documents: list[Document] = []
        while room > 0:
            which = self._furthest_behind(room)
            text = self._texts[which]
            document = self._whole(which, room) if text.whole else self._piece(text, room, rng)
            drawn.tokens[which] += len(document.ids)
            documents.append(document)
            room -= len(document.ids)
        drawn.rows += 1
        return pack(documents)

    def _furthest_behind(self, room: int) -> int:
        done = np.array(self.drawn.tokens)
        behind = self._shares - done / max(1, done.sum())
        if room < _LEAST_CONVERSATION:
            plain = np.array([not text.whole for text in self._texts])
            behind = np.where(plain, behind, behind - 2 * plain.any())
        return int(behind.argmax())

    def _whole(self, which: int, room: int) -> Document:
        documents = self._texts[which].documents
        epoch, at = divmod(self.drawn.documents[which], len(documents))
        self.drawn.documents[which] += 1
        document = documents[int(self._order(which, epoch)[at])]
        return document.cut(0, min(room, self._longest, len(document.ids)))

    def _order(self, which: int, epoch: int) -> NDArray[np.int64]:
        rng = np.random.default_rng([self._seed, 1, which, epoch])
        return rng.permutation(len(self._texts[which].documents))

    def _piece(self, text: Text, room: int, rng: Generator) -> Document:
        """From a random place of a plain text, with the begin-of-text token in front."""
        (document,) = text.documents
        length = min(room, self._longest, self._sequence * int(rng.integers(1, 4)) // 2)
        if room - length < _LEAST_PIECE:
            length = min(room, self._longest)
        start = int(rng.integers(0, max(1, len(document.ids) - length + 1)))
        return begin(document.cut(start, start + length), self._tokenizer).cut(0, length)
