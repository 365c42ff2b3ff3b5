"""Calibrating thresholds: which cuts give which density, and what perplexity each costs, measured on text.

Cuts come from histograms of the scores on one part of the text, losses from another part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pi2.allocation import (
    BINS,
    Histograms,
    bounded,
    energy_below,
    energy_cuts,
    greedy_cuts,
    histogram,
    uniform_cuts,
)
from pi2.builtin.exact_predictor import ExactPredictor
from pi2.container.layout import NEURONS
from pi2.decoder import Decoder
from pi2.divergence import Divergence
from pi2.engine import Engine
from pi2.errors import OptionError
from pi2.evaluate import Likelihood
from pi2.kv_cache import KvCache
from pi2.probed_backend import ProbedBackend, Visit
from pi2.tensor import F32
from pi2.text_files import opening, read_texts
from pi2.thresholds import RULES, Curve, Rule, Thresholds

DENSITIES: Final = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
SEQUENCE: Final = 256
TOKENS: Final = 3072
"""A third of them for the cuts, the rest for the losses."""
_HOPELESS = 0.5  # loss behind which smaller densities of a rule are not judged any more
_SHARE = 3  # every third sequence is for the cuts
_PROBE = 0.01  # of a layer's energy is left out for that, where a density of one half leaves out zeros


def _unchanged(ffn: int, gate: F32, other: F32, h: F32) -> F32:
    return h


class Calibration:
    """One run over texts.  ``thresholds`` is whole after every density that was judged."""

    def __init__(self, engine: Engine, paths: Sequence[Path], tokens: int | None = None) -> None:
        self._model, arch = engine.model, engine.model.architecture
        self._opening = np.array(opening(engine.tokenizer), np.int64)
        limit = KvCache(arch, engine.context).limit
        length = min(SEQUENCE, limit - len(self._opening))
        if length < 2:
            raise OptionError(f"a context of {limit} is too small to calibrate in", hint="raise --context")
        sequences, texts = _spread(engine, paths, length, max(2, (tokens or TOKENS) // length))
        self._for_cuts = sequences[::_SHARE]
        self._for_losses = [s for i, s in enumerate(sequences) if i % _SHARE]
        if not self._for_losses:
            raise OptionError(
                f"there are {length} tokens of text, too few to calibrate with",
                hint=f"give at least {2 * length}",
            )
        self._backend = ProbedBackend(_unchanged)
        self._decoder = Decoder(engine.model, self._backend, ExactPredictor())
        self.thresholds = Thresholds(
            engine.model.manifest.files[NEURONS].sha256,
            np.zeros((arch.n_layers, arch.n_neurons), np.float32),
            texts,
            length * len(self._for_losses),
        )
        self._length = length
        self._done = 0
        self._progress: Callable[[str, int, int], None] = lambda what, done, total: None

    def resume(self, found: Thresholds) -> None:
        """Go on from what was calibrated on the same text; anything else is not looked at."""
        mine = self.thresholds
        if (found.model, found.texts, found.tokens) == (mine.model, mine.texts, mine.tokens):
            self.thresholds = found

    def run(
        self,
        progress: Callable[[str, int, int], None] = lambda what, done, total: None,
        checkpoint: Callable[[], None] = lambda: None,
    ) -> None:
        """Find cuts, and judge every density that was not judged yet."""
        self._progress, curves = progress, self.thresholds.curves
        self._done = 0
        if not curves:
            self._find_cuts()
            checkpoint()
        dense: float | None = None
        for rule in RULES:
            curve = curves[rule]
            while (k := curve.judged) < len(curve.densities) and curve.losses[:k].max(initial=0) <= _HOPELESS:
                if dense is None:
                    dense = self._perplexity("dense", _unchanged)
                visit = self._cutter(rule, curve.cuts[k])
                what = f"{rule}, density {curve.densities[k]:.0%}"
                curve.losses[k] = self._perplexity(what, visit) / dense - 1
                checkpoint()

    def _find_cuts(self) -> None:
        """Read a part of the text: how large up values are, all scores, how much each layer minds."""
        arch, t = self._model.architecture, self.thresholds
        squares = np.zeros(t.weights.shape, np.float64)

        def add_squares(ffn: int, gate: F32, other: F32, h: F32) -> F32:
            squares[ffn] += np.square(other, dtype=np.float64).mean(axis=0) * len(h)
            return h

        self._read("sizes of up", self._for_cuts, add_squares)
        count = sum(map(len, self._for_cuts))
        for ffn in range(arch.n_layers):
            down = self._model.geometry.unpack_segment(self._model.bundles(ffn), "down")
            t.weights[ffn] = np.sqrt(squares[ffn] / count) * np.linalg.norm(down, axis=1)
        histograms = {rule: np.zeros((arch.n_layers, BINS), np.int64) for rule in RULES}

        def add_scores(ffn: int, gate: F32, other: F32, h: F32) -> F32:
            for rule, counted in histograms.items():
                counted[ffn] += histogram(self._scores(rule, ffn, gate, h))
            return h

        self._read("scores", self._for_cuts, add_scores)
        shares = [1 - density for density in DENSITIES]
        even = {
            rule: np.stack([uniform_cuts(h, share) for share in shares]) for rule, h in histograms.items()
        }
        even["product"] = self._shared_out(histograms["product"], even["product"])
        for rule, cuts in even.items():
            t.curves[rule] = Curve(np.array(DENSITIES), cuts, np.full(len(DENSITIES), np.nan))

    def _shared_out(self, histograms: Histograms, even: F32) -> F32:
        """(densities, layers): densities shared out by sensitivity, by its root, or evenly, whatever diverges
        least on another sequence.

        For the rule "product" only: its score is what a neuron adds, so that its square is the harm.
        """
        sensitivity = bounded(self._sensitivity(histograms))
        ways = {"even": even}
        for name, power in (("greedy", 1.0), ("greedy, dampened", 0.5)):
            ways[name] = np.stack([greedy_cuts(histograms, sensitivity**power, 1 - d) for d in DENSITIES])
        middle = DENSITIES.index(0.5)
        divergence = self._against_dense(self._for_cuts[-1:])
        nats = {
            name: divergence(f"density {DENSITIES[middle]:.0%}, {name}", cuts[middle])
            for name, cuts in ways.items()
        }
        return ways[min(nats, key=lambda name: nats[name])]

    def _sensitivity(self, histograms: Histograms) -> NDArray[np.float64]:
        """(layers,): nats of divergence from the dense model for each unit of energy left out."""
        cuts = uniform_cuts(histograms, 0.5)
        cuts = np.where(cuts > 0, cuts, energy_cuts(histograms, _PROBE))
        energies = energy_below(histograms, cuts)
        divergence = self._against_dense(self._for_cuts[:1])
        found = np.full(len(cuts), np.nan)
        for ffn, energy in enumerate(energies):
            alone = np.zeros_like(cuts)
            alone[ffn] = cuts[ffn]
            if energy > 0:
                found[ffn] = divergence(f"sensitivity of layer {ffn}", alone) / energy
        return found

    def _against_dense(self, sequences: list[NDArray[np.int64]]) -> Callable[[str, F32], float]:
        """A function (what to call it, cuts) -> nats by which predictions diverge, by the rule "product"."""
        divergence = Divergence()
        self._read("dense", sequences, _unchanged, divergence)

        def measure(what: str, cuts: F32) -> float:
            divergence.begin()
            self._read(what, sequences, self._cutter("product", cuts), divergence)
            return divergence.nats

        return measure

    def _scores(self, rule: Rule, ffn: int, gate: F32, h: F32) -> F32:
        return np.abs(h) if rule == "product" else np.abs(gate) * self.thresholds.weights[ffn]

    def _cutter(self, rule: Rule, cuts: F32) -> Visit:
        def cut(ffn: int, gate: F32, other: F32, h: F32) -> F32:
            h[self._scores(rule, ffn, gate, h) < cuts[ffn]] = 0
            return h

        return cut

    def _perplexity(self, what: str, visit: Visit) -> float:
        likelihood = Likelihood()
        self._read(what, self._for_losses, visit, likelihood)
        return likelihood.perplexity

    def _read(
        self,
        what: str,
        sequences: list[NDArray[np.int64]],
        visit: Visit,
        score: Likelihood | Divergence | None = None,
    ) -> None:
        self._backend.visit = visit
        before = len(self._opening)
        for ids in sequences:
            whole = np.concatenate((self._opening, ids))
            cache = KvCache(self._model.architecture, len(whole))
            logits = self._decoder.forward(whole, cache, all_logits=True)
            if score is not None:
                first = max(before, 1)  # nothing foresees a token that nothing stands before
                score.add(logits[first - 1 : -1], whole[first:])
            self._done += len(ids)
            self._progress(what, self._done, max(self._total(), self._done))

    def _total(self) -> int:
        """Tokens of all readings, if none is hopeless."""
        judgements = len(RULES) * len(DENSITIES) + 1
        probed = self._model.architecture.n_layers + 1 + 4  # one sequence each
        whole = 2 * len(self._for_cuts) + probed + judgements * len(self._for_losses)
        return self._length * whole


def _spread(
    engine: Engine, paths: Sequence[Path], length: int, wanted: int
) -> tuple[list[NDArray[np.int64]], tuple[str, ...]]:
    """``wanted`` sequences, in turns from each text; the texts' checksums."""
    texts = list(read_texts(paths, engine.tokenizer, length))
    turns: Iterator[Any] = (ids for row in zip_longest(*(t.sequences for t in texts)) for ids in row)
    chosen = [ids for ids in turns if ids is not None][:wanted]
    return chosen, tuple(t.sha256 for t in texts)
