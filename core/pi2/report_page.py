"""The page of ``pi2 report``: one HTML file that needs no other."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import pi2
from pi2.report_figures import Corpora, Picture

_CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 62rem;
       margin: 0 auto; padding: 1rem; }
figure { margin: 0 0 2.5rem; } figure svg { max-width: 100%; height: auto; }
figcaption { max-width: 45rem; } h2 { margin: 2rem 0 .5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0 1rem; }
th, td { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } .wide { overflow-x: auto; }
"""


def page(corpora: Corpora, overlaps: Mapping[str, Sequence[float]], pictures: Sequence[Picture]) -> str:
    """The HTML text: a table of the main figures, the pictures, the numbers behind each."""
    tables = _tables(corpora, overlaps)
    parts = [
        "<!doctype html>", '<html lang="en">', '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        "<title>Activations</title>", f"<style>{_CSS}</style>", "<main>", "<h1>Activations</h1>",
        f"<p>Counted by pi2 {escape(pi2.__version__)}. Neurons are those of the FFNs; active means"
        " not zero, unless the table says otherwise.</p>",
        _table(summary_rows(corpora)),
    ]  # fmt: skip
    for picture in pictures:
        parts += [
            f"<h2>{escape(picture.title)}</h2>",
            "<figure>", _inline(picture), f"<figcaption>{escape(picture.text)}</figcaption>", "</figure>",
            "<details><summary>Numbers</summary>", *tables[picture.name], "</details>",
        ]  # fmt: skip
    return "\n".join([*parts, "</main>", "</html>", ""])


def summary_rows(corpora: Corpora) -> list[list[str]]:
    """The main figures, one row a corpus, under a row of headings."""
    rows = [["corpus", "tokens", "active is", "density", "most active 20 % make", "hot at batch", "repeated",
             "co-active, hot removed"]]  # fmt: skip
    for label, found in corpora.items():
        filled = [k for k, value in enumerate(found["hot_share"][0]) if value is not None]
        hot = [f"{found['batches'][k]}: {_percent(_mean(row[k] for row in found['hot_share']))}"
               for k in (filled[0], filled[-1])] if filled else []  # fmt: skip
        top = found["cumulative_overall"][found["cumulative_at"].index(0.2)]
        rows.append([
            label, f"{found['tokens']:,}", found["activity"],
            _percent(_mean(row[0] for row in found["density"])), _percent(top), ", ".join(hot),
            _percent(_mean(found["repeated"])),
            _percent(_mean(layer["cold_pair"] for layer in found["coactivation"])),
        ])  # fmt: skip
    return rows


def _tables(corpora: Corpora, overlaps: Mapping[str, Sequence[float]]) -> dict[str, list[str]]:
    """Name of a picture -> its numbers as tables."""
    tables: dict[str, list[str]] = {name: [] for name in ("density", "cumulative", "hot", "coactivation")}
    for label, found in corpora.items():
        batches = [f"batch {b}" for b in found["batches"]]
        tables["density"].append(_by_layer(label, batches, found["density"]))
        tables["hot"].append(_by_layer(label, batches, found["hot_share"]))
        at = [_percent(share, 0) for share in found["cumulative_at"]]
        tables["cumulative"].append(_by_layer(label, at, found["cumulative"]))
        keys = {"pair": "any other", "friend": "closest friend", "cold_pair": "any other, hot removed",
                "cold_friend": "closest friend, hot removed"}  # fmt: skip
        rows = [[layer[key] for key in keys] for layer in found["coactivation"]]
        tables["coactivation"].append(_by_layer(label, list(keys.values()), rows))
    rows = [
        [label, rule, _percent(point["density"], 0), _percent(point["perplexity_loss"], 2)]
        for label, found in corpora.items()
        for rule, points in found.get("thresholds", {}).items()
        for point in points
    ]
    tables["thresholds"] = [_table([["statistics", "rule", "computed", "perplexity lost"], *rows])]
    columns = list(zip(*overlaps.values(), strict=True))
    tables["overlap"] = [_by_layer("", list(overlaps), columns)]
    return tables


def _by_layer(label: str, columns: Sequence[str], rows: Sequence[Sequence[float | None]]) -> str:
    cells = [[str(layer), *map(_percent, row)] for layer, row in enumerate(rows)]
    heading = f"<h3>{escape(label)}</h3>" if label else ""
    return heading + _table([["layer", *columns], *cells])


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = ["<tr>" + "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    return '<div class="wide"><table>' + "\n".join(lines) + "</table></div>"


def _inline(picture: Picture) -> str:
    """The SVG element alone, with a role, a label, and ids that no other picture has."""
    svg = picture.svg[picture.svg.index("<svg") :]
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{picture.name}-", svg)
    return svg.replace(
        "<svg", f'<svg role="img" aria-label="{escape(picture.title)}: {escape(picture.text)}"', 1
    )


def _mean(values: Any) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}%}"
