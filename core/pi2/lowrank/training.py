"""Training the predictors of a model on text: collect inputs, choose widths, train layer by layer, measure.

Everything that is finished lies in a directory of its own, so that a run that was stopped goes on there.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

import pi2
from pi2.allocation import bounded
from pi2.builtin.lowrank_predictor import PlacedPredictor
from pi2.container.layout import NEURONS
from pi2.container.predictors import FfnPredictor, Predictors
from pi2.engine import Engine
from pi2.errors import FormatError, OptionError, StorageError
from pi2.lowrank.closed_form import (
    ClosedForm,
    Layers,
    Weigher,
    calibrated,
    closed_form,
    density_at,
    labels,
    missed_share,
)
from pi2.lowrank.inputs import Corpus, Inputs, Progress, read_corpus
from pi2.lowrank.sharing import Comparison, recall_levels, share_out
from pi2.lowrank.widths import BUDGET, candidates, choose_widths, predictor_bytes
from pi2.tensor import F32, DType, Tensor
from pi2.thresholds import CALIBRATE_HINT

_LOSS_TOKENS, _PROBE_TOKENS = 2048, 512  # held out: for the loss, and for what one layer does to it
_CAUTIOUS = 0.9  # of what is expected to be just allowed
_HIGHEST_RECALL = 0.9995


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """What is wanted of the predictors.  ``width`` None: by layer, within ``budget`` of the model's bytes."""

    tokens: int = 32768
    recall: float = 0.97
    """Share of the active neurons that each layer's threshold must name on held-out text, at least."""
    max_loss: float | None = 0.001
    """Raise recalls until the perplexity rises by less than this share; None does not measure it."""
    width: int | None = None
    budget: float = BUDGET
    dtype: DType = "q4_0"
    seed: int = 0
    steps: int = 150
    """Of gradient descent, for every layer."""

    def __post_init__(self) -> None:
        if not 0.5 <= self.recall <= _HIGHEST_RECALL:
            raise OptionError(f"a recall of {self.recall:g} cannot be had", hint=f"0.5 to {_HIGHEST_RECALL}")
        if self.width is not None and (self.width < 32 or self.width % 32):
            raise OptionError(f"a width of {self.width} cannot be stored", hint="a multiple of 32, or auto")


class Training:
    """The training of one model's predictors; a context manager that holds the lock on ``directory``.

    Call ``collect``, ``train`` and ``measure`` in this order.  An exception, also KeyboardInterrupt, keeps
    what is done for the next run with the same model, texts and settings; ``discard`` removes it.
    """

    def __init__(
        self, engine: Engine, paths: Sequence[Path], settings: TrainSettings, directory: Path
    ) -> None:
        if not engine.model.architecture.sparse:
            raise OptionError(
                f"{engine.model.architecture.activation} has no exact zeros: there is nothing to predict",
                hint=f"for --predictor threshold {CALIBRATE_HINT}",
            )
        self.settings = settings
        self._engine, self._model = engine, engine.model
        self._arch, self._directory = engine.model.architecture, directory
        predictor_bytes(settings.width or 32, self._arch.d_model, 1, settings.dtype)  # refuses odd widths
        self.corpus: Corpus = read_corpus(engine, paths, settings.tokens)
        self._layers: dict[int, FfnPredictor] = {}
        self._lock = -1

    def __enter__(self) -> Self:
        self._lock = _locked(self._directory)
        state = json.dumps(self._state(), indent=1)
        place = self._directory / "settings.json"
        if not place.exists() or place.read_text() != state:
            for old in self._directory.iterdir():
                old.unlink()
            place.write_text(state)
        self._inputs = Inputs(self._engine, self.corpus, self._directory)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def discard(self) -> None:
        """Remove the directory and everything in it."""
        shutil.rmtree(self._directory)

    def collect(self, progress: Progress) -> None:
        """Run the model over the texts; progress in tokens."""
        self._inputs.collect(progress)

    def train(self, progress: Progress) -> None:
        """Choose the widths and train every layer; progress in layers, each of which is looked at twice."""
        n = self._arch.n_layers
        for layer, width in enumerate(self._choose_widths(progress)):
            self._layers[layer] = self._kept(layer) or self._train_layer(layer, width)
            progress(f"training layer {layer}", n + layer + 1, 2 * n)

    def take(self, layers: Mapping[int, FfnPredictor]) -> None:
        """In place of ``train``: predictors from elsewhere."""
        self._layers = dict(layers)

    def measure(self, progress: Progress) -> Predictors:
        """Set the thresholds and measure what is lost with them; progress in readings of the model.

        Every layer has the recall that was asked for, at least.  As long as more than ``max_loss`` is lost,
        those layers miss fewer whose misses do the most harm for what they save (see ``sharing``).
        """
        s = self.settings
        if s.max_loss is None:
            return self._found({n: self._calibrated_layer(n, [s.recall])[0][0] for n in self._layers})
        levels = {
            n: self._calibrated_layer(n, recall_levels(s.recall, _HIGHEST_RECALL)) for n in self._layers
        }
        named = np.array([[_named(layer) for layer, _ in found] for found in levels.values()])
        missed = np.array([[share for _, share in found] for found in levels.values()])
        harm = missed * self._sensitivities({n: found[0] for n, found in levels.items()}, progress)[:, None]
        sequences = self.corpus.sequences[self.corpus.held_out]
        judge = Comparison(self._engine, self.corpus, sequences[: max(1, _LOSS_TOKENS // sequences.shape[1])])
        most, rows, readings = float("inf"), np.arange(len(harm)), 0
        while True:
            at = share_out(harm, named, most)
            found = self._found(
                {n: levels[n][level][0] for n, level in zip(levels, at.tolist(), strict=True)}
            )
            found.loss = float(np.expm1(judge.nats(found.layers)))
            readings += 1
            progress("measuring what is lost", readings, readings)
            if not found.loss > s.max_loss or (at == harm.shape[1] - 1).all():
                return found
            expected = harm[rows, at].sum()
            most = expected * _CAUTIOUS * min(s.max_loss / found.loss, 1) if expected > 0 else -1.0

    def _sensitivities(
        self, found: Mapping[int, tuple[FfnPredictor, float]], progress: Progress
    ) -> NDArray[np.float64]:
        """(layers,): nats of divergence for all of a layer's energy, from what each misses at its level."""
        held = self.corpus.sequences[self.corpus.held_out]
        few = Comparison(self._engine, self.corpus, held[: max(1, _PROBE_TOKENS // held.shape[1])])
        nats = []
        for number, (n, (layer, missed)) in enumerate(found.items(), 1):
            nats.append(few.nats({n: layer}) / missed if missed > 0 else np.nan)
            progress(f"sensitivity of layer {n}", number, len(found))
        return bounded(np.array(nats))

    def _choose_widths(self, progress: Progress) -> list[int]:
        n, s, d, neurons = self._arch.n_layers, self.settings, self._arch.d_model, self._arch.n_neurons
        if s.width is not None:
            return [s.width] * n
        place = self._directory / "curves.json"
        curves: list[dict[str, float]] = json.loads(place.read_text()) if place.exists() else []
        for layer in range(len(curves), n):
            form, (_, held), _, active = self._closed_form(layer)
            shares = {w: density_at(form.layers(w).scores(held), active, s.recall) for w in candidates(d)}
            curves.append({str(w): share * neurons for w, share in shares.items()})
            _write(place, json.dumps(curves))
            progress(f"looking at layer {layer}", layer + 1, 2 * n)
        cost = {w: predictor_bytes(w, d, neurons, s.dtype) for w in candidates(d)}
        named = [{int(w): count for w, count in curve.items()} for curve in curves]
        return choose_widths(named, cost, self._model.geometry.stride, int(s.budget * self._model.nbytes))

    def _closed_form(self, layer: int) -> tuple[ClosedForm, tuple[F32, F32], Any, Any]:
        """The start, the inputs, and the active neurons of both parts of them."""
        x, held = self._inputs.layer(layer)
        active = labels(self._model, layer, x)
        return closed_form(self._model, layer, x, active), (x, held), active, labels(self._model, layer, held)

    def _train_layer(self, layer: int, width: int) -> FfnPredictor:
        from pi2.lowrank.fit import FitSettings, fit

        s, (form, (x, held), _, held_active) = self.settings, self._closed_form(layer)

        weigh = Weigher(self._model, layer)
        start, held_weights = form.layers(width), weigh(held)
        density = density_at(start.scores(held), held_active, s.recall)

        def judge(found: Layers) -> float:
            return missed_share(_restored(_stored(found, s.dtype)).scores(held), held_weights, density)

        seed = int(np.random.SeedSequence([s.seed, layer]).generate_state(1)[0])
        how = FitSettings(steps=s.steps)
        made = _stored(fit(start, x, weigh, judge, s.dtype, seed, how), s.dtype)
        fresh = self._directory / "layer.new"
        Predictors(self._hash, {layer: made}).save(fresh)
        fresh.replace(self._directory / f"layer-{layer}")
        return made

    def _kept(self, layer: int) -> FfnPredictor | None:
        """What an earlier run trained."""
        try:
            return Predictors.load(self._directory / f"layer-{layer}", self._arch, self._hash).layers[layer]
        except (FormatError, OSError, KeyError):
            return None  # not there, or torn: it is trained again

    def _found(self, layers: dict[int, FfnPredictor]) -> Predictors:
        return Predictors(self._hash, layers, None, {k: str(v) for k, v in self._state().items()})

    def _calibrated_layer(self, number: int, recalls: Sequence[float]) -> list[tuple[FfnPredictor, float]]:
        """With the threshold for each recall, by what the backend computes, and the energy that it misses."""
        layer, (x, held) = self._layers[number], self._inputs.layer(number)
        active = labels(self._model, number, held)
        judged = np.concatenate((held, x[:: self.corpus.sequences.shape[1]]))  # and what begins a sequence
        placed = PlacedPredictor(self._engine.backend, layer)
        scores = placed.scores(judged) + layer.fc2_bias
        placed.release()
        weights = Weigher(self._model, number)(judged)
        return [calibrated(layer, scores, active, weights, recall) for recall in recalls]

    @property
    def _hash(self) -> str:
        return self._model.manifest.files[NEURONS].sha256

    def _state(self) -> dict[str, Any]:
        """Everything that the result depends on, but for what ``measure`` does."""
        s = self.settings
        return {
            "pi2": pi2.__version__,
            "model": self._hash,
            "backend": f"{self._engine.backend.name} {self._engine.backend.describe()}",
            "texts": " ".join(self.corpus.texts),
            "tokens": self.corpus.sequences.size,
            "recall": s.recall,
            "width": "auto" if s.width is None else s.width,
            "budget": s.budget,
            "dtype": s.dtype,
            "seed": s.seed,
            "steps": s.steps,
        }


def _named(layer: FfnPredictor) -> float:
    assert layer.measured is not None
    return layer.measured.predicted_density


def _stored(layers: Layers, dtype: DType) -> FfnPredictor:
    fc1, fc2 = Tensor.from_f32(layers.fc1, dtype), Tensor.from_f32(layers.fc2, dtype)
    return FfnPredictor(fc1, layers.b1.astype(np.float32), fc2, layers.b2.astype(np.float32), 0.0)


def _restored(layer: FfnPredictor) -> Layers:
    return Layers(layer.fc1.to_f32(), layer.fc1_bias, layer.fc2.to_f32(), layer.fc2_bias)


def _write(place: Path, text: str) -> None:
    fresh = place.with_name(f"{place.name}.new")
    fresh.write_text(text)
    fresh.replace(place)


def _locked(directory: Path) -> int:
    """Make the directory if need be and lock it against a second training; released when the fd closes."""
    try:
        directory.mkdir(exist_ok=True)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as e:
        hint = "write elsewhere with --out FILE"
        raise StorageError(e.strerror or str(e), path=directory, hint=hint) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise StorageError(
            "another training is writing here", path=directory, hint="wait for it, or choose another --out"
        ) from None
    return fd
