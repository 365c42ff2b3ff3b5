"""``pi2 report``: what statistics of activations look like."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pi2.cli import options as o
from pi2.cli.output import print_json, print_table, say
from pi2.cli.progress import progress_bar
from pi2.errors import FormatError, OptionError, StorageError

if TYPE_CHECKING:
    from pi2.activation_counts import ActivationCounts
    from pi2.statistics_file import Statistics

PAGE = "index.html"

Sources = Annotated[
    list[str],
    typer.Argument(metavar="MODEL_OR_STATISTICS...", help="Models, or files that pi2 collect wrote."),
]
Out = Annotated[
    Path | None, typer.Option("--out", help="Directory for a page and its pictures; made if it is not there.")
]


def command(sources: Sources, out: Out = None, json: o.Json = False) -> None:
    """Show statistics that pi2 collect wrote: density, skew, hot neurons, co-activation.

    Prints the main figures; with --out writes a page with pictures, which needs the extra pi2[report]. Of
    several statistics of one model, made on different texts, it compares the hot sets.
    """
    from pi2.activity_report import describe, overlap, threshold_costs

    found_in = {label: _load(path) for label, path in _labelled(sources).items()}
    counts = {label: _counts(label, found) for label, found in found_in.items()}
    if out is not None:
        _make(out)
    corpora: dict[str, dict[str, Any]] = {}
    total = sum(len(c.counts) for c in counts.values())
    with progress_bar(lambda n: f"{n} layers") as progress:
        for label, found in counts.items():
            before = sum(len(c["density"]) for c in corpora.values())

            def show(done: int, _: int, label: str = label, before: int = before) -> None:
                progress(label, before + done, total)

            corpora[label] = describe(found, show)
            thresholds = found_in[label].thresholds
            if thresholds is not None:
                corpora[label]["thresholds"] = threshold_costs(thresholds)
    pairs = [pair for pair in combinations(counts, 2) if counts[pair[0]].model == counts[pair[1]].model]
    overlaps = {f"{a} and {b}": overlap(counts[a], counts[b]).tolist() for a, b in pairs}
    if out is not None:
        _write(out, corpora, overlaps)
    if json:
        print_json({"corpora": corpora, "overlap": overlaps})
        return
    _print(corpora, overlaps)


def _print(corpora: dict[str, dict[str, Any]], overlaps: dict[str, list[float]]) -> None:
    from pi2.report_page import summary_rows

    print_table(summary_rows(corpora))
    for names, shares in overlaps.items():
        print()
        print(f"{names} share {sum(shares) / len(shares):.1%} of their 20 % most active neurons")


def _labelled(sources: list[str]) -> dict[str, Path]:
    """A short name for each source -> its file of statistics."""
    from pi2.model_choice import MANIFEST, find_model
    from pi2.statistics_file import STATISTICS

    files: dict[str, Path] = {}
    for source in sources:
        path = Path(source).expanduser()
        if path.is_file() and path.name != MANIFEST:
            label = path.name.removesuffix(".safetensors")
        else:
            model = find_model(source, o.installed_plugins())
            path, label = model / STATISTICS, Path(source).name
            if not path.is_file():
                raise FormatError(
                    f"{source} has no statistics", hint=f"count first: pi2 collect {source} TEXT"
                )
        if label in files:
            label = str(path)
        if path in files.values():
            raise OptionError(f"{path} is given twice", hint="give each file once")
        files[label] = path
    return files


def _load(path: Path) -> Statistics:
    from pi2.statistics_file import Statistics

    try:
        return Statistics.load(path)
    except OSError as e:
        raise StorageError(e.strerror or str(e), path=path, hint="check that it may be read") from None


def _counts(label: str, found: Statistics) -> ActivationCounts:
    if found.counts is None:
        hint = "count on a text: pi2 collect MODEL TEXT"
        if found.thresholds is not None:
            hint = "count what its thresholds leave: pi2 collect MODEL TEXT --density 0.6"
        raise FormatError(f"{label} has no activation counts", hint=hint)
    return found.counts


def _make(out: Path) -> None:
    """Now, not after the work."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise StorageError(e.strerror or str(e), path=out, hint="name another directory with --out") from None


def _write(out: Path, corpora: dict[str, dict[str, Any]], overlaps: dict[str, list[float]]) -> None:
    from pi2.report_figures import draw
    from pi2.report_page import page

    pictures = draw(corpora, overlaps)
    try:
        for picture in pictures:
            (out / f"{picture.name}.svg").write_text(picture.svg, encoding="utf-8")
            (out / f"{picture.name}.png").write_bytes(picture.png)
        (out / PAGE).write_text(page(corpora, overlaps, pictures), encoding="utf-8")
    except OSError as e:
        raise StorageError(e.strerror or str(e), path=out, hint="name another directory with --out") from None
    say(f"wrote {out / PAGE}, and {len(pictures)} pictures as SVG and PNG beside it")
