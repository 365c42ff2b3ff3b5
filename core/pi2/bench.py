"""Ways to run one model in one engine, for comparison: whole matrices, LLM in a Flash, and each step to pi2.

Each piece of a comparison is a process of its own, in a memory cgroup whose limit counts the page cache too.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE
from typing import Any

from pi2.errors import StorageError
from pi2.memory_cgroup import MemoryCgroup, drop_page_cache

Piece = dict[str, Any]
"""What a process found: the object of ``pi2 run --json`` and more, or {"refused": why, "hint": ...}."""
Repeat = dict[str, Piece]

_COMMAND = (sys.executable, "-m", "pi2.cli.bench_piece")
_KERNEL = 0.01  # of the limit, for what the kernel charges beside the resident set
_PLAIN = {"overlap": False, "prefetch": "off", "two_phase": "off"}
_STATIC = {**_PLAIN, "policy": "window:tokens=0", "hot": 1.0, "keep": "even"}


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to run.  ``offload`` are changes of ``OffloadOptions``; None: no weights are on flash."""

    name: str
    says: str
    offload: dict[str, Any] | None = field(default_factory=dict)
    limited: bool = True
    """Under the limit of memory."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Arguments of ``Engine.open`` that are not the user's to choose."""
    accelerated: bool = False
    """An accelerator computes the hot clusters."""
    paper: float | None = None
    """How many times faster than the step before it was in PowerInfer-2, figure 11."""

    def arguments(self, chosen: dict[str, Any], memory: int) -> dict[str, Any]:
        """Of ``Engine.open``, ready for JSON: ``chosen`` by the user, under ``memory`` bytes."""
        found = {**chosen, **self.engine}
        if self.limited and self.offload is not None:
            budget = int(memory * (1 - _KERNEL))
            found["offload"] = {**chosen.get("offload", {}), "memory": budget, **self.offload}
        else:
            found.pop("offload", None)
        if "storage" not in self.engine and found.get("offload") is None:
            found.pop("storage", None)  # the best for weights in memory
        return found


_ALL = (
    Mode("mmap", "whole matrices: all weights mapped, every gate computed, read by the kernel's page faults",
         None, engine={"storage": "mmap", "predictor": "exact"}),
    Mode("flash", "LLM in a Flash: predictor, window of 5 tokens, row-column bundles, reads before computing",
         {**_PLAIN, "policy": "window:tokens=5", "hot": 0.0}),
    Mode("flash-lru", "the same with the window that fills the memory",
         {**_PLAIN, "policy": "lru", "hot": 0.0}),
    Mode("baseline", "predictor, a fixed part of each matrix in memory, the others' rows read one by one",
         {**_STATIC, "bundled": False}),
    Mode("bundle", "+ one read a neuron", _STATIC, paper=2.7),
    Mode("cache", "+ neuron cache: hot and cold region", _PLAIN, paper=3.83),
    Mode("pipeline", "+ cluster pipeline, and what pi2 does by itself", paper=2.3),
    Mode("accelerator", "+ hot clusters on an accelerator", accelerated=True, paper=1.15),
    Mode("memory", "all weights in memory, no limit", None, limited=False),
)  # fmt: skip
MODES = {mode.name: mode for mode in _ALL}
STEPS = ("baseline", "bundle", "cache", "pipeline", "accelerator")
"""The ablation of PowerInfer-2 §7.4, in its order."""


@dataclass(frozen=True, slots=True)
class Work:
    """What every piece does: a prompt of ``prefill`` tokens, then ``settle`` + ``tokens`` one by one.

    The first ``settle`` fill the caches and do not count.  Tokens are sampled with ``seed``: the same bits
    of logits, the same text.
    """

    text: str
    prefill: int = 64
    settle: int = 64
    tokens: int = 128
    seed: int = 0


class Bench:
    """Runs pieces, each in a process, and keeps what they found."""

    def __init__(
        self, model: Path, modes: Iterable[Mode], work: Work, chosen: dict[str, Any], memory: int
    ) -> None:
        self.modes = list(modes)
        self.work, self.memory = work, memory
        self.repeats: list[Repeat] = []
        self.notes: list[str] = []
        self._model, self._chosen = model, chosen

    def repeat(self, said: Callable[[str], None] = lambda name: None) -> None:
        """Every mode once, in turns; ``said`` hears the name of each before it runs."""
        done: Repeat = {}
        self.repeats.append(done)
        for mode in self.modes:
            said(mode.name)
            done[mode.name] = self._piece(mode)

    def _piece(self, mode: Mode) -> Piece:
        request = {
            "model": str(self._model), "engine": mode.arguments(self._chosen, self.memory),
            "work": dataclasses.asdict(self.work), "accelerated": mode.accelerated,
        }  # fmt: skip
        drop_page_cache(*(path for path in self._model.iterdir() if path.is_file()))
        with ExitStack() as stack:
            group = self._cgroup(stack) if mode.limited else None
            process = stack.enter_context(subprocess.Popen(_COMMAND, stdin=PIPE, stdout=PIPE, text=True))
            stack.callback(process.kill)
            if group is not None:
                group.take(process.pid)  # before it knows what to do
            out, _ = process.communicate(json.dumps(request))
            charged = None if group is None else group.figures()
        if process.returncode != 0:
            killed = process.returncode == -signal.SIGKILL and group is not None
            why = "too small a limit: the system killed it" if killed else "ended"
            return {"refused": f"{why} (status {process.returncode})", "hint": None}
        found: Piece = json.loads(out)
        return found | {"cgroup": charged}

    def _cgroup(self, stack: ExitStack) -> MemoryCgroup | None:
        try:
            return stack.enter_context(MemoryCgroup(self.memory))
        except StorageError as e:
            note = f"{e}: mapped weights have all the page cache that they like"
            if note not in self.notes:
                self.notes.append(note)
            return None


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(modes: Sequence[Mode], repeats: Sequence[Repeat]) -> dict[str, Any]:
    """By mode: medians and extremes; ratios are taken within a repeat.

    ``over``: times as fast as each other mode; ``step``: as the step before it, ``paper`` beside it.
    """
    names = [mode.name for mode in modes]
    report: dict[str, Any] = {}
    for mode in modes:
        found = [r[mode.name] for r in repeats if "refused" not in r.get(mode.name, {"refused": ""})]
        if not found:
            reasons = [r[mode.name]["refused"] for r in repeats if mode.name in r]
            report[mode.name] = {"says": mode.says, "refused": reasons[0] if reasons else "not run"}
            continue
        report[mode.name] = {"says": mode.says, **_figures(found)}
        over = {name: _ratios(repeats, mode.name, name) for name in names if name != mode.name}
        report[mode.name]["over"] = {name: spread(ratios) for name, ratios in over.items() if ratios}
        if mode.paper is not None:
            before = STEPS[STEPS.index(mode.name) - 1]
            report[mode.name] |= {"step": report[mode.name]["over"].get(before), "paper": mode.paper}
    return report


def _figures(found: Sequence[Piece]) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "decode_tps": spread([p["decode_tps"] for p in found]),
        "prefill_s": spread([p["prefill_s"] for p in found]),
        "p99_to_mean": spread([p["token_latency_s"]["p99"] / p["token_latency_s"]["mean"] for p in found]),
        "rss_peak_bytes": max(p["rss_peak_bytes"] for p in found),
        "storage_mb_per_token": spread([p["storage_bytes_per_token"] / 1e6 for p in found]),
        "tokens": found[0]["tokens"],
    }
    for name in ("hit_rate", "io_wait_share"):
        values = [p[name] for p in found if p[name] is not None]
        figures[name] = spread(values) if values else None
    return figures


def _ratios(repeats: Sequence[Repeat], over: str, under: str) -> list[float]:
    pairs = [(r.get(over, {}).get("decode_tps"), r.get(under, {}).get("decode_tps")) for r in repeats]
    return [a / b for a, b in pairs if a and b]
