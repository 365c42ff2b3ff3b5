"""``pi2 collect``: which neurons are active, counted on text; or which matter, for lack of zeros."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pi2.cli import options as o
from pi2.cli.output import print_json, print_table, say
from pi2.cli.progress import progress_bar
from pi2.errors import OptionError, StorageError

if TYPE_CHECKING:
    from pi2.activation_counts import ActivationCounts
    from pi2.api import Predictor
    from pi2.collect import Collector
    from pi2.engine import Engine
    from pi2.statistics_file import Statistics

_SAVE_EVERY = 30.0  # seconds

Batch = Annotated[str, typer.Option("--batch", metavar="B,B,...", help="Batch sizes, ascending.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", help="File to write; without it one in the model."),
]
Force = Annotated[bool, typer.Option("--force", help="Forget what was found before.")]
Thresholds = Annotated[
    bool, typer.Option("--thresholds", help="Calibrate --predictor threshold instead of counting.")
]
Density = Annotated[
    float | None, typer.Option("--density", help="Count what calibrated thresholds leave at this density.")
]


def command(
    model: o.ModelArgument,
    texts: o.Texts,
    batch: Batch = "1,2,4,8,16,32",
    thresholds: Thresholds = False,
    density: Density = None,
    tokens: o.Tokens = None,
    output: Output = None,
    force: Force = False,
    backend: o.Backend = None,
    storage: o.Storage = None,
    json: o.Json = False,
) -> None:
    """Count on text how often each neuron is active; or calibrate thresholds.

    The counts go into the model. Counting again adds what is new: Ctrl-C keeps what was counted, the
    same command goes on, and other texts are added. A batch of B stands for B sequences decoded
    together: B consecutive sequences of a text, at the same position.

    In a SiLU or GELU model every neuron is active. There, and with --thresholds, this finds the cuts of
    --predictor threshold and measures what they cost; then --density D counts the neurons that they leave.
    """
    from pi2.collect import Collector
    from pi2.container.layout import NEURONS
    from pi2.statistics_file import STATISTICS, Statistics

    with o.open_engine(model, backend=backend, storage=storage) as engine:
        place = output or engine.model.path / STATISTICS
        _check_writable(place)
        sha256 = engine.model.manifest.files[NEURONS].sha256
        target = Target(place, Statistics.of_file(place, sha256), listed=output is None)
        if thresholds or (density is None and not engine.model.architecture.sparse):
            from pi2.cli.calibrate import calibrate

            calibrate(engine, texts, tokens, target, force=force, json=json)
        else:
            collector = Collector(engine, parse_batches(batch), _named_by(engine, density))
            _count(collector, texts, tokens, target, force=force, json=json)


def _named_by(engine: Engine, density: float | None) -> tuple[str, Predictor] | None:
    """The predictor that says what is counted, and its name in the statistics."""
    if density is None:
        return None
    from pi2.builtin.threshold_predictor import ThresholdPredictor

    predictor = ThresholdPredictor(density, max_loss=float("inf"))
    predictor.attach(engine.model, engine.backend)
    return f"threshold, density {density:g}", predictor


def _count(
    collector: Collector, texts: list[Path], tokens: int | None, target: Target, *, force: bool, json: bool
) -> None:
    if target.found.counts is not None and not force:
        collector.resume(target.found.counts)
    before = collector.counts.tokens
    try:
        _run(collector, texts, tokens, target)
    except KeyboardInterrupt:
        say(f"\nstopped: {collector.counts.tokens} tokens are counted; the same command goes on")
        raise
    if json:
        print_json(describe(collector.counts, target.path))
        return
    counted = collector.counts.tokens
    say(f"{target.path}: {counted - before} tokens counted, {counted} in all")
    _print_density(collector.counts)


def _run(collector: Collector, texts: list[Path], tokens: int | None, target: Target) -> None:
    """Count, and write at the end, now and then, and when it is stopped."""
    written = time.monotonic(), collector.counts.tokens

    def save() -> None:
        nonlocal written
        target.save(counts=collector.counts)
        written = time.monotonic(), collector.counts.tokens

    def checkpoint() -> None:
        if time.monotonic() - written[0] > _SAVE_EVERY:
            save()

    try:
        with progress_bar(lambda n: f"{n} tokens") as progress:
            collector.run(texts, tokens, progress, checkpoint)
    finally:
        if collector.counts.tokens > written[1]:
            save()


@dataclass(slots=True)
class Target:
    """A file of statistics that is added to; ``listed``: it belongs to the model that it lies in."""

    path: Path
    found: Statistics
    listed: bool

    def save(self, **parts: Any) -> None:
        """Write ``parts`` ("counts", "thresholds") and keep what was there of the others."""
        from pi2.container import replace_file

        self.found = replace(self.found, **parts)
        if self.listed:
            replace_file(self.path.parent, self.path.name, self.found.save)
            return
        fresh = self.path.with_name(f"{self.path.name}.new")
        try:
            self.found.save(fresh)
            fresh.replace(self.path)
        except OSError as e:
            hint = "check that it may be written"
            raise StorageError(e.strerror or str(e), path=self.path, hint=hint) from None


def _check_writable(place: Path) -> None:
    """Now, not after an hour of counting."""
    if not os.access(place.parent, os.W_OK) or place.is_dir():
        raise StorageError(
            "cannot be written",
            path=place,
            hint="name another file with --output FILE, in a directory that is there",
        )


def parse_batches(text: str) -> tuple[int, ...]:
    """``"1,2,4"`` -> (1, 2, 4).  Raises OptionError."""
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        raise OptionError(
            f"--batch takes numbers, not {text!r}", hint="for example --batch 1,2,4,8"
        ) from None


def describe(counts: ActivationCounts, place: Path) -> dict[str, Any]:
    """The object of ``--json``.  A density is None for batch sizes that no text had enough sequences for."""
    return {
        "path": str(place),
        "tokens": counts.tokens,
        "sequence": counts.sequence,
        "texts": counts.texts,
        "batches": counts.batches,
        "steps": counts.steps.tolist(),
        "density": [[None if d != d else d for d in row] for row in counts.density.tolist()],
    }


def _print_density(counts: ActivationCounts) -> None:
    def cells(shares: list[float]) -> list[str]:
        return ["-" if share != share else f"{share:.1%}" for share in shares]

    rows = [["layer", *(f"batch {b}" for b in counts.batches)]]
    rows += [[str(layer), *cells(shares)] for layer, shares in enumerate(counts.density.tolist())]
    print_table([*rows, ["mean", *cells(counts.density.mean(axis=0).tolist())]])
