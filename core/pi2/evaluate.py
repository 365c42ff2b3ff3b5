"""Judging a predictor on text: what its misses cost, what it names, and how long it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pi2.activity import active_neurons
from pi2.api import Predictor, Probe
from pi2.builtin.exact_predictor import ExactPredictor
from pi2.container.reader import PiModel
from pi2.decoder import Decoder
from pi2.engine import Engine
from pi2.errors import OptionError
from pi2.kv_cache import KvCache
from pi2.powers import SupportsFootprint
from pi2.tensor import F32, Ids
from pi2.text_files import opening, read_texts

_SEQUENCE = 256
_BLOCK = 64  # tokens whose inputs of all FFNs are held at a time


@dataclass(slots=True)
class Likelihood:
    """How well a model foresees a text: what each token costs, and which one it finds likeliest there."""

    losses: list[float] = field(default_factory=list)
    """-ln p of every token."""
    likeliest: list[int] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        """exp of the mean of -ln p; NaN for no tokens."""
        with np.errstate(over="ignore"):
            return float(np.exp(np.mean(self.losses))) if self.losses else float("nan")

    def add(self, logits: F32, targets: NDArray[np.int64]) -> None:
        """``logits`` (n, vocab) foresee ``targets`` (n,)."""
        wide = logits.astype(np.float64)
        wide -= wide.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(wide).sum(axis=1))
        self.losses += (log_sum - wide[np.arange(len(targets)), targets]).tolist()
        self.likeliest += logits.argmax(axis=1).tolist()


@dataclass(slots=True)
class LayerScore:
    """What a predictor named for one FFN, in (token, neuron) pairs."""

    total: int = 0
    active: int = 0
    named: int = 0
    hits: int = 0
    """Named and active."""
    seconds: float = 0.0
    calls: int = 0
    width: int = 0
    nbytes: int = 0
    """Of the predictor's own weights for this FFN, if it has some."""

    @property
    def density(self) -> float:
        return _share(self.active, self.total)

    @property
    def predicted_density(self) -> float:
        return _share(self.named, self.total)

    @property
    def recall(self) -> float:
        """Share of the active that were named; 1 if none was active."""
        return _share(self.hits, self.active)

    @property
    def precision(self) -> float:
        """Share of the named that were active; 1 if none was named."""
        return _share(self.hits, self.named)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


class PredictorMeter(Predictor):
    """Asks another predictor, and keeps the score of its answers against ``active_neurons``."""

    name = "meter"
    lossless = False  # as the inner one, which is asked for its own

    def __init__(self, inner: Predictor, model: PiModel) -> None:
        self.scores = [LayerScore() for _ in range(model.architecture.n_layers)]
        self._inner, self._model = inner, model
        self._inputs: list[list[F32]] = [[] for _ in self.scores]
        self._named: list[list[Ids | None]] = [[] for _ in self.scores]

    @classmethod
    def probe(cls) -> Probe:
        return Probe(0, "measures another predictor; not to be chosen")

    def predict(self, ffn: int, x: F32) -> Ids | None:
        start = time.perf_counter()
        ids = self._inner.predict(ffn, x)
        self.scores[ffn].seconds += time.perf_counter() - start
        self.scores[ffn].calls += 1
        self._inputs[ffn].append(x[0].copy())
        self._named[ffn].append(ids)
        return ids

    def settle(self) -> None:
        """Score what was asked since the last call: many tokens at once, since weights are decoded for it."""
        for ffn, score in enumerate(self.scores):
            if not self._inputs[ffn]:
                continue
            active = active_neurons(self._model, ffn, np.stack(self._inputs[ffn]))
            named = np.zeros_like(active)
            for row, ids in zip(named, self._named[ffn], strict=True):
                row[slice(None) if ids is None else ids] = True
            score.total += active.size
            score.active += int(active.sum())
            score.named += int(named.sum())
            score.hits += int((active & named).sum())
            self._inputs[ffn].clear()
            self._named[ffn].clear()


@dataclass(slots=True)
class Evaluation:
    """What :func:`evaluate` found."""

    sequence: int
    sequences: int
    scored: int
    """Tokens that were foreseen: all but the first of a sequence that nothing stands before."""
    sparse: Likelihood
    dense: Likelihood | None
    layers: list[LayerScore]
    seconds: float
    """Wall clock of the sparse pass, without judging it."""

    @property
    def agreement(self) -> float | None:
        """Share of the tokens for which sparse and dense find the same token likeliest."""
        if self.dense is None:
            return None
        pairs = zip(self.sparse.likeliest, self.dense.likeliest, strict=True)
        return _share(sum(a == b for a, b in pairs), self.scored)

    @property
    def loss(self) -> float | None:
        """By how much the sparse perplexity is larger, as a share of the dense one."""
        return None if self.dense is None else self.sparse.perplexity / self.dense.perplexity - 1

    @property
    def loss_error(self) -> float | None:
        """Standard error of ``loss``, from the differences token by token."""
        if self.dense is None:
            return None
        with np.errstate(invalid="ignore"):  # of infinite losses
            differences = np.subtract(self.sparse.losses, self.dense.losses)
            return float(differences.std() / np.sqrt(len(differences)))

    def overall(self) -> LayerScore:
        """All layers together."""
        fields = ("total", "active", "named", "hits", "seconds", "calls", "nbytes")
        return LayerScore(**{name: sum(getattr(score, name) for score in self.layers) for name in fields})


def evaluate(
    engine: Engine,
    paths: Sequence[Path],
    *,
    tokens: int,
    sequence: int | None = None,
    against_dense: bool = True,
    exact: Engine | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Evaluation:
    """Run texts through the engine's model one token at a time, as in decoding, and judge its predictor.

    The texts are cut into sequences of ``sequence`` tokens (without a wish 256, or what the context has
    room for), each behind the begin-of-text token if the model has one; at most ``tokens`` are used.  The
    dense model, in which every neuron is asked, reads the same sequences in the same way, so that nothing
    but the predictor makes a difference; ``exact``, if it is given, is the dense model in its place, so
    that what the backend loses of the weights counts, too.
    Raises OptionError if a sequence does not fit into the context.
    """
    before = opening(engine.tokenizer)
    arch, decoder = engine.model.architecture, engine.decoder
    limit = KvCache(arch, engine.context).limit
    if sequence is None:
        sequence = min(_SEQUENCE, limit - len(before))
    if sequence + len(before) > limit or sequence < 2:
        raise OptionError(
            f"sequences of {sequence} tokens do not suit a context of {limit}",
            hint=f"2 to {limit - len(before)} are possible",
        )
    work = _chosen(engine, paths, tokens, sequence, before)
    inner, meter = decoder.predictor, PredictorMeter(decoder.predictor, engine.model)
    if isinstance(inner, SupportsFootprint):
        for ffn, score in enumerate(meter.scores):
            score.width, score.nbytes = inner.footprint(ffn)
    sparse, dense, seconds = Likelihood(), Likelihood(), 0.0
    passes = len(work) * sequence * 2 if against_dense else len(work) * sequence
    done = 0
    for name, ids in work:
        try:
            decoder.predictor = meter
            seconds += _read(decoder, ids, sparse, meter.settle)
            done += sequence
            progress(name, done, passes)
            if against_dense:
                decoder.predictor = ExactPredictor()
                _read(decoder if exact is None else exact.decoder, ids, dense)
                done += sequence
                progress(name, done, passes)
        finally:
            decoder.predictor = inner
    return Evaluation(
        sequence, len(work), len(sparse.likeliest), sparse, dense if against_dense else None,
        meter.scores, seconds,
    )  # fmt: skip


def _chosen(
    engine: Engine, paths: Sequence[Path], tokens: int, sequence: int, before: list[int]
) -> list[tuple[str, NDArray[np.int64]]]:
    """(file name, opening and tokens of a sequence), the first ones of the texts in order."""
    work: list[tuple[str, NDArray[np.int64]]] = []
    wanted = max(1, tokens // sequence)
    for text in read_texts(paths, engine.tokenizer, sequence):
        for ids in text.sequences[: wanted - len(work)]:
            work.append((text.path.name, np.concatenate((np.array(before, np.int64), ids))))
        if len(work) == wanted:
            break  # before the next text is read
    return work


def _read(
    decoder: Decoder,
    ids: NDArray[np.int64],
    likelihood: Likelihood,
    settle: Callable[[], None] = lambda: None,
) -> float:
    """Feed ``ids`` one by one and add how well each but the first was foreseen; seconds of computing."""
    cache = decoder.new_cache(len(ids))
    seconds = 0.0
    for at in range(len(ids) - 1):
        start = time.perf_counter()
        logits = decoder.forward(ids[at : at + 1], cache)
        seconds += time.perf_counter() - start
        likelihood.add(logits[None], ids[at + 1 : at + 2])
        if (at + 1) % _BLOCK == 0 or at + 2 == len(ids):
            settle()
    return seconds
