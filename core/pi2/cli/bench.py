"""``pi2 bench``: this engine's ways to run a model, one after the other, in turns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pi2.cli import options as o
from pi2.cli.output import human_bytes, print_json, print_table, say
from pi2.errors import OptionError

if TYPE_CHECKING:
    from pi2.bench import Bench, Mode

_DEFAULT = ("mmap", "flash", "pipeline")
_TEXT = (
    "The lamp had been lit for an hour when the old man came down from the hill. He carried a basket of"
    " apples, a letter that nobody had opened, and the news that the bridge was gone. We sat him by the fire"
    " and asked him what the river had done to the mill, to the road, and to the three boats below the weir."
)

Modes = Annotated[
    list[str] | None,
    typer.Option("--mode", metavar="NAME", help="A way to run, repeatable; --list names them."),
]
Ablation = Annotated[
    bool, typer.Option("--ablation", help="The steps of PowerInfer-2, each on top of the last.")
]
List = Annotated[bool, typer.Option("--list", help="Name the modes and end.")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Times that each mode runs, in turns.")]
Prefill = Annotated[int, typer.Option("--prefill", min=1, help="Tokens of the prompt.")]
Settle = Annotated[int, typer.Option("--settle", min=0, help="Tokens that fill the caches and do not count.")]
Count = Annotated[int, typer.Option("--tokens", min=1, help="Tokens that count.")]
Text = Annotated[Path | None, typer.Option("--file", help="A text whose first tokens are the prompt.")]


def command(
    mode: Modes = None,
    ablation: Ablation = False,
    list_modes: List = False,
    model: o.Model = None,
    memory: o.Memory = None,
    backend: o.Backend = None,
    storage: o.Storage = None,
    predictor: o.Predictor = None,
    policy: o.Policy = None,
    hot: o.Hot = None,
    offload: o.OffloadDetails = None,
    file: Text = None,
    prefill: Prefill = 64,
    settle: Settle = 64,
    tokens: Count = 128,
    repeats: Repeats = 3,
    seed: o.Seed = None,
    json: o.Json = False,
) -> None:
    """Compare ways to run a model that does not fit: whole matrices, LLM in a Flash, pi2, step by step.

    Each mode runs in a process of its own under the same limit of memory, page cache counted (a memory
    cgroup, where one can be made), and all do the same tokens. --memory is that limit: without it, room for
    half of the FFN weights.
    """
    from pi2.bench import MODES, STEPS, Bench, Work, summary

    if list_modes:
        print_table((name, found.says) for name, found in MODES.items())
        return
    names = list(dict.fromkeys([*(mode or []), *(STEPS if ablation else [])])) or list(_DEFAULT)
    if unknown := [name for name in names if name not in MODES]:
        raise OptionError(f"there is no mode {unknown[0]!r}", hint=f"one of {', '.join(MODES)}")
    path = _model(model)
    limit = _limit(path, memory)
    text = _TEXT if file is None else _read(file)
    work = Work(text, prefill, settle, tokens, 0 if seed is None else seed)
    chosen = {"backend": backend, "storage": storage, "predictor": predictor}
    bench = Bench(path, [MODES[n] for n in names], work, chosen | _offload(policy, hot, offload), limit)
    for number in range(repeats):
        # mypy infers no type for a lambda with a default
        # mypy infers no type for a lambda with a default
        bench.repeat(lambda name, n=number: say(f"{n + 1} of {repeats}: {name}"))  # type: ignore[misc]
    report = summary(bench.modes, bench.repeats)
    for note in bench.notes:
        say(f"warning: {note}")
    print_comparison(report, limit)
    if json:
        print_json(_everything(bench, report, path))


def _model(model: str | None) -> Path:
    from pi2.config import Settings
    from pi2.model_choice import find_model

    return find_model(model or Settings.from_environment().model, o.installed_plugins())


def _limit(model: Path, memory: str | None) -> int:
    """Bytes for the process: as asked, or half of the FFN weights and all else."""
    from pi2.container import read_manifest
    from pi2.container.layout import NEURONS

    if memory is not None:
        parsed = o.parse_offload(memory, None, None, None)
        assert parsed is not None
        assert parsed.memory is not None
        return parsed.memory
    files = read_manifest(model).files
    rest = sum(file.nbytes for name, file in files.items() if name != NEURONS)
    return rest + files[NEURONS].nbytes // 2 + _PROCESS


_PROCESS = 288 << 20  # bytes: interpreter, libraries, buffers, tables of the cache


def _read(file: Path) -> str:
    from pi2.cli.run import read_prompt

    return read_prompt(None, file)


def _offload(policy: str | None, hot: float | None, details: str | None) -> dict[str, Any]:
    """Changes of OffloadOptions for modes that do not say otherwise, checked."""
    from pi2.engine import parse_choice
    from pi2.offload_options import OffloadOptions
    from pi2.options import parse_options

    chosen: dict[str, Any] = parse_options(OffloadOptions, parse_choice(f":{details or ''}")[1])
    chosen |= {name: value for name, value in (("policy", policy), ("hot", hot)) if value is not None}
    OffloadOptions(**chosen)
    return {"offload": chosen}


_COLUMNS = ("mode", "tokens/s", "", "ratio", "step", "paper", "hits", "I/O wait", "read/token", "P99/mean",
            "peak memory")  # fmt: skip


def print_comparison(report: dict[str, Any], limit: int) -> None:
    """One table on stderr."""
    import sys

    def figure(found: dict[str, float] | None, form: str) -> str:
        return "-" if found is None else f"{found['median']:{form}}"

    rows: list[tuple[str, ...]] = [_COLUMNS]
    names = list(report)
    for name, found in report.items():
        if "refused" in found:
            rows.append((name, *["-"] * 10))
            continue
        speed, ratio = found["decode_tps"], found["over"].get(names[0])
        rows.append((
            name, f"{speed['median']:.2f}", f"{speed['min']:.2f} to {speed['max']:.2f}",
            "1x" if ratio is None else f"{ratio['median']:.2f}x",
            figure(found.get("step"), ".2f") + ("x" if found.get("step") else ""),
            f"{found['paper']}x" if found.get("paper") else "-",
            figure(found["hit_rate"], ".1%"), figure(found["io_wait_share"], ".1%"),
            f"{found['storage_mb_per_token']['median']:.1f} MB", figure(found["p99_to_mean"], ".2f"),
            human_bytes(found["rss_peak_bytes"]),
        ))  # fmt: skip
    print_table(rows, sys.stderr)
    for name, found in report.items():
        if "refused" in found:
            say(f"{name}: {found['refused']}")
    say(f"limit {human_bytes(limit)}; ratio: times as fast as {names[0]}; medians of ratios within a repeat")
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, found in report.items():
        if "tokens" in found:
            groups.setdefault(tuple(found["tokens"]), []).append(name)
    if len(groups) > 1:
        say(f"other tokens than {names[0]}: " + "; ".join(", ".join(g) for g in list(groups.values())[1:]))


def _everything(bench: Bench, report: dict[str, Any], model: Path) -> dict[str, Any]:
    import dataclasses

    from pi2.cli.machine import Machine
    from pi2.stats import versions

    modes: list[Mode] = bench.modes
    return {
        "model": str(model), "limit_bytes": bench.memory, "work": dataclasses.asdict(bench.work),
        "modes": {m.name: dataclasses.asdict(m) for m in modes}, "summary": report,
        "repeats": bench.repeats, "notes": bench.notes,
        "machine": dataclasses.asdict(Machine.here()), "versions": versions(),
    }  # fmt: skip
