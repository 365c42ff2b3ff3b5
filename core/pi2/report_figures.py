"""The pictures of ``pi2 report``, drawn with matplotlib (an extra: ``pi2[report]``)."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from pi2.errors import PluginError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Corpora = Mapping[str, Mapping[str, Any]]
"""Label -> what ``activity_report.describe`` found."""

# Okabe and Ito's colours, told apart by colour-blind people too; lines also differ in marks and dashes.
_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKS: Final = ("o", "s", "^", "D", "v", "P", "X")
_PALE: Final = "#B0B0B0"
_STYLE: Final[dict[Any, Any]] = {
    "font.size": 10.0, "axes.grid": True, "grid.color": "#E4E4E4", "axes.spines.top": False,
    "axes.spines.right": False, "svg.hashsalt": "pi2", "svg.fonttype": "none", "legend.frameon": False,
    "axes.axisbelow": True,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawn figure with its words."""

    name: str
    title: str
    text: str
    """What is seen, for those who see it and for those who do not."""
    svg: str
    png: bytes


def draw(corpora: Corpora, overlaps: Mapping[str, Sequence[float]]) -> list[Picture]:
    """All pictures; that of ``overlaps`` (names of two corpora -> share per layer) only if there are any.

    Raises PluginError if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise PluginError(
            "pi2 report draws with matplotlib, which is not installed",
            hint='pip install "pi2[report]", or print the numbers with --json and without --out',
        ) from None
    jobs: dict[str, tuple[Callable[[Any], None], int]] = {
        "density": (lambda f: _density(f, corpora), len(corpora)),
        "cumulative": (lambda f: _cumulative(f, corpora), len(corpora)),
        "hot": (lambda f: _hot(f, corpora), 1),
        "coactivation": (lambda f: _coactivation(f, corpora), len(corpora)),
    }
    if overlaps:
        jobs["overlap"] = (lambda f: _overlap(f, overlaps), 1)
    if any("thresholds" in found for found in corpora.values()):
        jobs["thresholds"] = (lambda f: _thresholds(f, corpora), 1)
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
        return [_picture(name, paint, panels) for name, (paint, panels) in jobs.items()]


_WORDS: Final = {
    "density": (
        "Density per layer",
        "Share of the neurons of each layer that are active in a step. A line is a batch size: a neuron"
        " counts if any sequence of the batch activates it, so lines rise with the batch.",
    ),
    "cumulative": (
        "Cumulative activation",
        "Share of all activations that the most active neurons make. The further the thick line (all layers"
        " together) bows away from the dashed diagonal, the more a small hot set is worth. Thin: layers.",
    ),
    "hot": (
        "Hot share against batch size",
        "Share of the neurons that are active in at least half of the steps. The paper's Bamboo-7B has less"
        " than 1 % at batch 1 and 75 % at batch 32. Thick: all layers; the band spans the layers.",
    ),
    "coactivation": (
        "Co-activation before and after removing hot neurons",
        "How often a neuron's closest friend, and how often any other neuron of its layer, is active when it"
        " is. If little is left without the hot neurons, bundling neurons by co-activation does not pay.",
    ),
    "overlap": (
        "Overlap of the hot sets of two corpora",
        "Share of the 20 % most active neurons of a layer on one corpus that are among the 20 % most active"
        " on the other. By chance it would be 20 % (dashed).",
    ),
    "thresholds": (
        "What thresholds cost",
        "By how much the perplexity rises if only a share of the neurons is computed: those whose score is"
        " above the calibrated cuts. The dashed line is the 1 % that --predictor threshold allows itself.",
    ),
}  # fmt: skip


def _picture(name: str, paint: Callable[[Figure], None], panels: int) -> Picture:
    from matplotlib.figure import Figure

    columns = min(panels, 2)
    rows = -(-panels // 2)
    figure = Figure(figsize=(4.8 * columns + (2.4 if panels == 1 else 0), 3.6 * rows), layout="constrained")
    paint(figure)
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    figure.savefig(png, format="png", dpi=150)
    return Picture(name, *_WORDS[name], svg.getvalue(), png.getvalue())


def _panels(figure: Figure, corpora: Corpora) -> list[tuple[Axes, Mapping[str, Any]]]:
    """One panel a corpus, all on the same scale, under its name."""
    n = len(corpora)
    grid = figure.subplots(-(-n // 2), min(n, 2), sharex=True, sharey=True, squeeze=False).flat
    axes = list(grid)
    for spare in axes[n:]:
        spare.remove()
    for ax, (label, found) in zip(axes, corpora.items(), strict=False):
        ax.set_title(f"{label} ({found['tokens']:,} tokens)", fontsize=10)
    return list(zip(axes, corpora.values(), strict=False))


def _percent(ax: Axes, label: str) -> None:
    from matplotlib.ticker import PercentFormatter

    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_ylim(0, 1.02)  # room for the marks at 100 %
    if ax.get_subplotspec() is None or ax.get_subplotspec().is_first_col():  # type: ignore[union-attr]
        ax.set_ylabel(label)


def _array(values: Any) -> Any:
    return np.array(values, np.float64)  # None becomes NaN


def _density(figure: Figure, corpora: Corpora) -> None:
    from matplotlib import colormaps

    for ax, found in _panels(figure, corpora):
        density = _array(found["density"])  # (layers, batches)
        shades = colormaps["viridis"](np.linspace(0, 0.85, density.shape[1]))
        for k, batch in enumerate(found["batches"]):
            if np.isnan(density[0, k]):
                continue
            ax.plot(density[:, k], color=shades[k], marker=_MARKS[k % len(_MARKS)], ms=3.5, label=str(batch))
        ax.set_xlabel("layer")
        _percent(ax, "active neurons")
    figure.legend(*ax.get_legend_handles_labels(), title="batch size", loc="outside right center")


def _cumulative(figure: Figure, corpora: Corpora) -> None:
    from matplotlib.ticker import PercentFormatter

    for ax, found in _panels(figure, corpora):
        x = found["cumulative_at"]
        ax.plot(x, _array(found["cumulative"]).T, color=_PALE, lw=0.7)
        ax.plot(x, _array(found["cumulative_overall"]), color=_COLOURS[0], lw=2.5)
        ax.plot([0, 1], [0, 1], color="#404040", ls="--", lw=1)
        ax.set_xlim(0, 1)
        ax.xaxis.set_major_formatter(PercentFormatter(1.0))
        ax.set_xlabel("most active neurons")
        _percent(ax, "of all activations")


def _hot(figure: Figure, corpora: Corpora) -> None:
    ax = figure.subplots()
    for i, (label, found) in enumerate(corpora.items()):
        hot = _array(found["hot_share"])  # (layers, batches)
        batches = np.array(found["batches"])[~np.isnan(hot[0])]
        hot = hot[:, ~np.isnan(hot[0])]
        colour = _COLOURS[i % len(_COLOURS)]
        ax.fill_between(batches, hot.min(axis=0), hot.max(axis=0), color=colour, alpha=0.12, lw=0)
        ax.plot(batches, hot.mean(axis=0), color=colour, marker=_MARKS[i % len(_MARKS)], lw=2.5, label=label)
        ax.set_xscale("log", base=2)
        ax.set_xticks(batches, [str(b) for b in batches])
    ax.minorticks_off()
    ax.set_xlabel("batch size")
    _percent(ax, "hot neurons")
    ax.legend()


def _coactivation(figure: Figure, corpora: Corpora) -> None:
    lines = (
        ("friend", "closest friend, all neurons", "-"), ("cold_friend", "closest friend, hot removed", "--"),
        ("pair", "any other, all neurons", "-"), ("cold_pair", "any other, hot removed", "--"),
    )  # fmt: skip
    for ax, found in _panels(figure, corpora):
        for i, (key, label, dashes) in enumerate(lines):
            values = _array([layer[key] for layer in found["coactivation"]])
            colour = _COLOURS[i // 2]
            ax.plot(
                values,
                dashes,
                color=colour,
                marker=_MARKS[i],
                ms=4,
                mfc="white" if i % 2 else colour,
                label=label,
            )
        ax.set_xlabel("layer")
        _percent(ax, "active together")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)


def _overlap(figure: Figure, overlaps: Mapping[str, Sequence[float]]) -> None:
    from pi2.activity_report import TOP

    ax = figure.subplots()
    for i, (names, shares) in enumerate(overlaps.items()):
        ax.plot(shares, color=_COLOURS[i % len(_COLOURS)], marker=_MARKS[i % len(_MARKS)], label=names)
    ax.axhline(TOP, color="#404040", ls="--", lw=1)
    ax.set_xlabel("layer")
    _percent(ax, "shared")
    ax.legend()


def _thresholds(figure: Figure, corpora: Corpora) -> None:
    from matplotlib.ticker import PercentFormatter

    ax = figure.subplots()
    curves = [
        (f"{label}, rule {rule}", points)
        for label, found in corpora.items()
        for rule, points in found.get("thresholds", {}).items()
    ]
    for i, (name, points) in enumerate(curves):
        x = [1.0, *(point["density"] for point in points)]
        y = [0.0, *(point["perplexity_loss"] for point in points)]
        ax.plot(x, y, color=_COLOURS[i % len(_COLOURS)], marker=_MARKS[i % len(_MARKS)], label=name)
    ax.axhline(0.01, color="#404040", ls="--", lw=1)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.invert_xaxis()
    ax.set_xlabel("computed neurons")
    ax.set_ylabel("perplexity lost")
    ax.legend()
