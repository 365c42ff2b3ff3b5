"""Look-ahead: what the next FFN will want, guessed while this one is computed (beyond the paper)."""

from __future__ import annotations

import time

import numpy as np

from pi2.api import ModelView, Predictor
from pi2.powers import SupportsConfidence
from pi2.residual import FfnInputs
from pi2.tensor import F32, Ids

_FIRST = 32  # tokens that fill the cache and say nothing of later ones
_TRIAL = 16  # tokens with, and as many without
_PERIOD = 512  # tokens after which it is tried again
_USEFUL = 0.9  # share of the guesses that are wanted: with fewer, guess less
_STEP = 1.1


class Lookahead:
    """Asks the predictor of FFN l + 1 with the input of FFN l.

    Mode "auto" tries tokens with and without, and goes on with what took less time; timing decides only
    whether to guess, so it changes no bit.
    """

    def __init__(self, model: ModelView, mode: str) -> None:
        self.mode = mode
        self.pending: tuple[int, Ids] | None = None
        """FFN and neurons of a guess that was not compared with what is wanted yet."""
        self.tokens_with = 0
        self._inputs = FfnInputs(model) if mode != "off" else None
        self._last = model.architecture.n_layers - 1
        self._token = -1
        self._started = 0.0
        self._times: dict[bool, list[float]] = {True: [], False: []}
        self._on = mode != "off"
        self._ran = False  # a trial
        self._share = 0.5  # of what could be guessed, the surest
        self._guessed = self._useful = 0  # of this token

    @property
    def on(self) -> bool:
        """Whether guesses are made for this token."""
        return self._on

    def guess(self, predictor: Predictor, ffn: int, x: F32) -> tuple[Ids, F32 | None] | None:
        """Neurons of FFN ``ffn + 1`` and how sure each is, if that is known; None for no guess."""
        if not self._on or ffn == self._last or self._inputs is None:
            return None
        ahead = self._inputs.carry(ffn, x)
        if isinstance(predictor, SupportsConfidence):
            return predictor.rank(ffn + 1, ahead)
        likely = predictor.predict(ffn + 1, ahead)
        return None if likely is None else (likely, None)

    def surest(self, neurons: Ids, sure: F32 | None) -> Ids:
        """As many of ``neurons``, none of which is in memory, as lately proved useful."""
        leave = int((1 - self._share) * len(neurons))
        if sure is None or leave == 0:
            return neurons
        chosen: Ids = neurons[sure >= np.partition(sure, leave)[leave]]
        return chosen

    def learn(self, guessed: int, useful: int) -> None:
        """Of a guess, so many were wanted."""
        self._guessed += guessed
        self._useful += useful

    def next_token(self) -> None:
        """Another token begins: decide whether to guess for it."""
        now = time.perf_counter()
        if self._guessed:
            good = self._useful >= _USEFUL * self._guessed
            self._share = min(1.0, self._share * _STEP) if good else self._share / _STEP
            self._guessed = self._useful = 0
        if self.mode == "auto":
            if self._token >= _FIRST:
                self._times[self._on].append(now - self._started)
            self._token = (self._token + 1) % _PERIOD
            if self._token == 0:
                self._times = {True: [], False: []}
            if self._token < _FIRST:
                self._on = self._on and self._ran
            elif self._token < _FIRST + 2 * _TRIAL:
                self._on = self._token // 4 % 2 == 0  # in turns, so that what drifts hits both alike
            elif self._token == _FIRST + 2 * _TRIAL:
                self._ran = True
                self._on = float(np.median(self._times[True])) < float(np.median(self._times[False]))
        self._started = now
        self.tokens_with += self._on
