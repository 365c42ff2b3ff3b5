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

from pi2.activations import activate
from pi2.api import Backend, FfnSpec, Probe
from pi2.builtin.exact_predictor import ExactPredictor
from pi2.container.layout import NEURONS
from pi2.decoder import Decoder
from pi2.engine import Engine
from pi2.errors import OptionError
from pi2.evaluate import Likelihood
from pi2.kv_cache import KvCache
from pi2.tensor import F32, U8, Ids, Tensor
from pi2.text_files import opening, read_texts
from pi2.thresholds import RULES, Curve, Rule, Thresholds

DENSITIES: Final = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
SEQUENCE: Final = 256
TOKENS: Final = 3072
"""A third of them for the cuts, the rest for the losses."""
_HOPELESS = 0.5  # loss behind which smaller densities of a rule are not judged any more
_SHARE = 3  # every third sequence is for the cuts

# Scores are counted in bins of 1/64 octave from 2^-64 on, so a cut is within 1.1 % of its quantile.
_BINS, _PER_OCTAVE, _LOWEST = 1 << 13, 64, -64
Histograms = NDArray[np.int64]
Visit = Callable[[int, F32, F32, F32], F32]
"""(number of the FFN, act(gate), the other factor or 1, their product), all (n, neurons) -> what to keep."""


class ProbedBackend(Backend):
    """Does what ``inner`` does, but FFNs in NumPy, and shows ``visit`` what every neuron computes.

    The weights of an FFN are decoded by each call, one matrix at a time: give many tokens at once.
    """

    name = "probed"

    def __init__(self, inner: Backend, visit: Visit) -> None:
        self._inner, self.visit = inner, visit
        self._placed = 0

    @classmethod
    def probe(cls) -> Probe:
        return Probe(0, "looks into another backend's work; not to be chosen")

    def place(self, weight: Tensor) -> object:
        return self._inner.place(weight)

    def linear(self, weight: Any, x: F32, out: F32, rows: Ids | None = None) -> None:
        self._inner.linear(weight, x, out, rows)

    def place_ffn(self, bundles: U8, spec: FfnSpec) -> object:
        self._placed += 1  # FFNs are placed in their order
        return self._placed - 1, bundles, spec

    def ffn(self, ffn: Any, x: F32, out: F32, rows: Ids | None = None) -> int:
        number, bundles, spec = ffn
        gate, other = factors(bundles, spec, x)
        h = self.visit(number, gate, other, gate * other)
        np.matmul(h, spec.geometry.unpack_segment(bundles, "down"), out=out)
        return int(np.count_nonzero(h))

    def release(self, handle: Any) -> None:
        self._inner.release(handle)


def factors(bundles: U8, spec: FfnSpec, x: F32) -> tuple[F32, F32]:
    """The two factors of every neuron, (n, d) -> two (n, neurons): act(gate) and up; act(up) and 1."""
    g = spec.geometry
    up = x @ g.unpack_segment(bundles, "up").T
    bias = g.unpack_segment(bundles, "bias") if g.biased else None
    if bias is not None:
        up += bias[:, -1]
    if g.gate is None:
        return activate(spec, up), np.ones((1, 1), np.float32)
    gate = x @ g.unpack_segment(bundles, "gate").T
    if bias is not None:
        gate += bias[:, 0]
    return activate(spec, gate), np.maximum(up, 0) if spec.up_relu else up


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
        self._backend = ProbedBackend(engine.backend, lambda ffn, gate, other, h: h)
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
                    dense = self._perplexity("dense", lambda ffn, gate, other, h: h)
                visit = self._cutter(rule, curve.cuts[k])
                what = f"{rule}, density {curve.densities[k]:.0%}"
                curve.losses[k] = self._perplexity(what, visit) / dense - 1
                checkpoint()

    def _find_cuts(self) -> None:
        """Two readings of a part of the text: how large up values are, then all scores."""
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
        histograms = {rule: np.zeros((arch.n_layers, _BINS), np.int64) for rule in RULES}

        def add_scores(ffn: int, gate: F32, other: F32, h: F32) -> F32:
            for rule, counted in histograms.items():
                counted[ffn] += np.bincount(_bins(self._scores(rule, ffn, gate, h)), minlength=_BINS)
            return h

        self._read("scores", self._for_cuts, add_scores)
        for rule, counted in histograms.items():
            cuts = np.stack([quantiles(counted, 1 - density) for density in DENSITIES])
            t.curves[rule] = Curve(np.array(DENSITIES), cuts, np.full(len(DENSITIES), np.nan))

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
        self, what: str, sequences: list[NDArray[np.int64]], visit: Visit, score: Likelihood | None = None
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
        return self._length * (2 * len(self._for_cuts) + judgements * len(self._for_losses))


def _spread(
    engine: Engine, paths: Sequence[Path], length: int, wanted: int
) -> tuple[list[NDArray[np.int64]], tuple[str, ...]]:
    """``wanted`` sequences, in turns from each text; the texts' checksums."""
    texts = list(read_texts(paths, engine.tokenizer, length))
    turns: Iterator[Any] = (ids for row in zip_longest(*(t.sequences for t in texts)) for ids in row)
    chosen = [ids for ids in turns if ids is not None][:wanted]
    return chosen, tuple(t.sha256 for t in texts)


def _bins(scores: F32) -> NDArray[np.int64]:
    with np.errstate(divide="ignore"):
        octaves = np.log2(scores.ravel(), dtype=np.float32)
    places = np.nan_to_num((octaves - _LOWEST) * _PER_OCTAVE, nan=_BINS, posinf=_BINS, neginf=0)
    bins: NDArray[np.int64] = np.clip(places, 0, _BINS - 1).astype(np.int64)
    return bins


def quantiles(histograms: Histograms, share: float) -> F32:
    """(layers, bins) -> (layers,): the score that ``share`` of a layer's scores lie below, or the bin above.

    0 where nothing lies below, so that nothing is cut.
    """
    below = histograms.cumsum(axis=1)
    wanted = share * below[:, -1:]
    bins = (below <= wanted).sum(axis=1)  # bins that may be cut whole
    edges = np.exp2(bins / _PER_OCTAVE + _LOWEST)
    return np.where(bins > 0, edges, 0).astype(np.float32)
