"""The part of ``pi2 collect`` that calibrates thresholds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi2.cli.output import print_json, print_table, say
from pi2.cli.progress import progress_bar

if TYPE_CHECKING:
    from pi2.cli.collect import Target
    from pi2.engine import Engine
    from pi2.thresholds import Thresholds


def calibrate(
    engine: Engine, texts: list[Path], tokens: int | None, target: Target, *, force: bool, json: bool
) -> None:
    """Find cuts, judge them, and keep every step in ``target``."""
    from pi2.calibrate import Calibration

    calibration = Calibration(engine, texts, tokens)
    if target.found.thresholds is not None and not force:
        calibration.resume(target.found.thresholds)
    try:
        with progress_bar(lambda n: f"{n} tokens") as progress:
            calibration.run(progress, lambda: target.save(thresholds=calibration.thresholds))
    except KeyboardInterrupt:
        say("\nstopped: what was judged is kept; the same command goes on")
        raise
    if json:
        print_json(describe(calibration.thresholds, target.path))
        return
    judged = calibration.thresholds.tokens
    say(f"{target.path}: what it costs to compute only a share of the neurons, judged on {judged} tokens")
    _print(calibration.thresholds)


def describe(found: Thresholds, place: Path) -> dict[str, Any]:
    """The object of ``--json``.  Densities that were not judged are left out."""
    from pi2.activity_report import threshold_costs

    curves = threshold_costs(found)
    return {"path": str(place), "tokens": found.tokens, "texts": list(found.texts), "thresholds": curves}


def _print(found: Thresholds) -> None:
    rows = [["density", *(f"perplexity, rule {rule}" for rule in found.curves)]]
    densities = next(iter(found.curves.values())).densities.tolist()
    for k, density in enumerate(densities):
        losses = [c.losses[k] for c in found.curves.values()]
        rows.append([f"{density:.0%}", *("-" if loss != loss else f"{loss:+.2%}" for loss in losses)])
    print_table(rows)
    print()
    for rule, curve in found.curves.items():
        print(f"rule {rule} loses 1 % at a density of {curve.at_loss(0.01).density:.0%}")
