"""What the commands print: errors, small tables, JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from pi2.errors import Pi2Error

if TYPE_CHECKING:
    from pi2.engine import Engine
    from pi2.stats import RunStats


def print_error(error: Pi2Error) -> None:
    """``error: what happened`` and ``hint: what to do``, on stderr."""
    say(f"error: {error}")
    if error.hint:
        say(f"hint: {error.hint}")


def say(line: str = "") -> None:
    """A line for the user's eyes, on stderr."""
    print(line, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    import json

    print(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def print_table(rows: Iterable[Sequence[str]], file: TextIO | None = None) -> None:
    """Left-aligned columns; on stdout, unless ``file`` says otherwise."""
    rows = [list(row) for row in rows]
    widths = [max(map(len, column), default=0) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip(), file=file or sys.stdout)


def human_bytes(n: int) -> str:
    """Decimal units, as disks and data sheets have them."""
    size = float(n)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} tokens/s"


def print_notes(engine: Engine, told: int = 0) -> None:
    """What is slower or smaller than it should be, on stderr; but for the first ``told`` notes."""
    for note in engine.notes[told:]:
        say(f"warning: {note}")


def why_cut(stats: RunStats) -> str | None:
    """Why the answer ended before the model meant it to, if so."""
    reasons = {"length": "stopped by --max-tokens", "context": "stopped: the context is full"}
    return reasons.get(stats.stop_reason or "")


def _offload_rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Of weights on flash: where memory went, what was hit, read and waited for."""
    if found["offload"] is None:
        return []
    details, regions = found["offload"], found["config"]["regions"]
    shares = ", ".join(f"{name} {human_bytes(size)}" for name, size in regions.items())
    rows = [("budget", human_bytes(found["budget_bytes"]), f"{shares}, policy {found['policy']}")]
    misses = details["miss_rate"]
    if found["hit_rate"] is not None:
        rows.append(("hit rate", f"{found['hit_rate']:.1%}", f"{misses['p99']:.1%} missed at P99"))
    read = details["bytes_read"]
    said = f"prefill {human_bytes(read['prefill'])}, decoding {human_bytes(read['decode'])}"
    rows.append(("read", human_bytes(found["bytes_read"]), said))
    if found["io_wait_share"] is not None:
        rows.append(("I/O wait", f"{found['io_wait_share']:.1%}", "of decoding, with nothing to compute"))
    return rows


def _hybrid_rows(run: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Of a model that an accelerator shares: what ran where, and how long at the same time."""
    found = run["hybrid"]
    if found is None:
        return []
    where = f"{found['hot_neurons']} of {found['neurons']} neurons on {found['accelerator']}"
    rest = f"attention on {_place(found, 'attention')}, prefill on {_place(found, 'prefill')}"
    seconds = found["decode_s"]
    met = f"{seconds['hot']:.2f} s, {found['cpu']} {seconds['cold']:.2f} s, both {seconds['both']:.2f} s"
    if run["emulated"]:
        return [("hot", where, rest)]
    return [("hot", where, rest), ("halves", f"{found['accelerator']} {met}", "of the FFNs of decoding")]


def _place(hybrid: dict[str, Any], what: str) -> str:
    return str(hybrid[hybrid[what]])  # the names of the backends stand under the places


def print_run(stats: RunStats, setup: dict[str, Any]) -> None:
    """The figures of a generation, on stderr."""
    from pi2.memory import rss_peak_bytes

    decoded = ", ".join(filter(None, (f"{len(stats.tokens)} tokens", why_cut(stats))))
    found = stats.to_json(setup)
    ttft = "-" if found["ttft_s"] is None else f"{found['ttft_s']:.2f} s"
    density = "-" if stats.density is None else f"{stats.density:.1%}"
    others = setup.get("outside_bytes")
    beside = f"other processes have {human_bytes(others)}" if others else ""
    losses = setup["config"].get("losses")
    exactness = f"lossy: {'; '.join(losses)}" if losses else "as the dense model"
    rows = [
        ("TTFT", ttft, f"prompt of {stats.prompt_tokens} tokens, {stats.prefilled_tokens} computed"),
        ("prefill", _rate(found["prefill_tps"]), ""),
        ("decode", _rate(found["decode_tps"]), decoded),
        ("peak memory", human_bytes(rss_peak_bytes()), beside),
        ("density", density, "of the FFN neurons active while decoding"),
        ("parts", setup["backend"], f"storage {setup['storage']}, predictor {setup['predictor']}"),
        ("lossless", "yes" if setup["lossless"] else "no", exactness),
    ]
    rows += _offload_rows(found)
    rows += _hybrid_rows(found)
    if found["emulated"]:
        rows.append(("emulated", "yes", "no figure of speed: an emulator's time says nothing of the device"))
    sampling = setup["config"].get("sampling", {})
    if sampling.get("temperature"):
        rows.append(("seed", str(sampling["seed"]), "repeats this answer with --seed"))
    print_table(rows, sys.stderr)
