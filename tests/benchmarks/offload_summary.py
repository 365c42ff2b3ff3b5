"""What the pieces of ``offload.py`` say together: ratios within a repeat, medians and extremes."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

PAPER = {
    "decode_over_llama.cpp": "up to 29.2 (v1), 27.8 (v3), 24.6 on average",
    "decode_over_flash": "3.94 (v1), 3.84 (v3) on average",
    "steps": "bundle 2.7, cache 3.83, pipeline 2.30",
    "io_wait_share": 0.137,
    "p99_to_mean": "1.79 for Bamboo-7B, 1.41 for Mixtral-47B",
    "hit_rate": 0.95,
    "prefill_over_llama.cpp": 44.23,
}
Piece = dict[str, Any]
Repeat = dict[str, Piece]


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(state: dict[str, Any]) -> dict[str, Any]:
    """By piece, and ratios of pieces of the same repeat."""
    repeats: list[Repeat] = [
        {name: piece for name, piece in repeat.items() if "refused" not in piece}
        for repeat in state["repeats"]
    ]
    settle, prompt = state["settle"], state["prefill"]
    names = list(dict.fromkeys(name for repeat in repeats for name in repeat))
    report: dict[str, Any] = {
        "limit_bytes": state["limit_bytes"],
        "repeats": len(repeats),
        "refused": sorted({n for r in state["repeats"] for n, piece in r.items() if "refused" in piece}),
        "pieces": {
            name: _piece(name, [r[name] for r in repeats if name in r], settle, prompt) for name in names
        },
        "paper": PAPER,
    }

    def ratio(label: str, over: str, under: str, figure: Callable[[Piece], float]) -> None:
        pairs = [(r[over], r[under]) for r in repeats if over in r and under in r]
        if pairs:
            report[label] = spread([figure(a) / figure(b) for a, b in pairs])

    def speed(piece: Piece) -> float:
        return 1 / float(np.mean(steady(piece, settle)))

    for name in ("pi2", "pi2 exact"):
        ratio(f"{name}: decode_over_llama.cpp", name, "llama.cpp", speed)
        ratio(f"{name}: decode_over_in_memory", name, f"{name} in memory", speed)
        ratio(f"{name}: decode_over_llama.cpp_in_memory", name, "llama.cpp in memory", speed)
        ratio(f"{name}: peak_memory_over_llama.cpp_in_memory", name, "llama.cpp in memory", _memory)
    ratio("pi2: decode_over_flash", "pi2", "flash", speed)
    ratio("pi2: decode_over_flash-lru", "pi2", "flash-lru", speed)
    steps = ("baseline", "bundle", "cache", "pi2")
    for before, after in pairwise(steps):
        ratio(f"step to {after}: decode_over_{before}", after, before, speed)
    ratio("prefill_over_llama.cpp", "prefill", "llama.cpp prefill", lambda p: 1 / p["prefill_s"])
    report["prefill_wall_over_larger_of_io_and_compute"] = _prefill_bound(repeats)
    return report


def steady(piece: Piece, settle: int) -> list[float]:
    """Seconds of the tokens that count; all but the first of a piece too short to settle."""
    seconds: list[float] = piece["token_s"]
    return seconds[settle:] if len(seconds) > settle else seconds[1:] or seconds


def _memory(piece: Piece) -> float:
    return float(piece["rss"]["VmHWM"])


def _piece(name: str, found: list[Piece], settle: int, prompt: int) -> dict[str, Any]:
    if name == "disk":
        keys = [key for key in found[0] if key != "load_average_before"]
        return {key: spread([piece[key] for piece in found]) for key in keys}
    tokens = [steady(piece, settle) for piece in found]
    report: dict[str, Any] = {
        "decode_tokens_s": spread([1 / float(np.mean(t)) for t in tokens]),
        "p99_to_mean": spread([float(np.percentile(t, 99) / np.mean(t)) for t in tokens]),
        "prefill_s": spread([piece["prefill_s"] for piece in found]),
        "peak_rss_bytes": max(piece["rss"]["VmHWM"] for piece in found),
        "load_average_before": [piece["load_average_before"] for piece in found],
    }
    if "density" in found[0]:
        report["density"] = float(np.mean([piece["density"] for piece in found]))
    if found[0]["cgroup"]:
        report["cgroup"] = found[-1]["cgroup"]
    if found[0].get("reads", [None])[0]:
        report |= _reads(found, settle)
    return report


def _reads(found: list[Piece], settle: int) -> dict[str, Any]:
    """Of weights on flash, over the tokens that count: entry 0 of ``reads`` is the prefill's."""
    counted = [piece["reads"][1:][settle:] or piece["reads"][1:] for piece in found]
    seconds = [sum(steady(piece, settle)) for piece in found]

    def total(tokens: list[Piece], *keys: str) -> float:
        return float(sum(t["stream"][k] if k in t["stream"] else t[k] for t in tokens for k in keys))

    return {
        "hit_rate": spread([total(t, "present") / max(total(t, "wanted"), 1) for t in counted]),
        "io_wait_share": spread([total(t, "wait_s") / s for t, s in zip(counted, seconds, strict=True)]),
        "ffn_share": spread([total(t, "wall_s") / s for t, s in zip(counted, seconds, strict=True)]),
        "mb_read_per_token": spread([total(t, "bytes_read", "wasted_bytes") / len(t) / 1e6 for t in counted]),
        "reads_per_token": spread([total(t, "reads") / len(t) for t in counted]),
        "prefetch_useful_share": spread([total(t, "useful") / max(total(t, "guessed"), 1) for t in counted]),
    }


def _prefill_bound(repeats: list[Repeat]) -> dict[str, Any] | None:
    """Wall clock of an offloaded prefill over max(I/O, compute): what was read at the disk's sequential
    speed, and the same prefill in memory."""
    rows = [r for r in repeats if all(name in r for name in ("disk", "prefill", "prefill in memory"))]
    if not rows:
        return None
    reading = [
        r["prefill"]["reads"][0]["stream"]["bytes_read"] / 1e9 / r["disk"]["sequential_gb_s"] for r in rows
    ]
    computing = [r["prefill in memory"]["prefill_s"] for r in rows]
    walls = [r["prefill"]["prefill_s"] for r in rows]
    bound = [max(pair) for pair in zip(reading, computing, strict=True)]
    return {
        "ratio": spread([wall / b for wall, b in zip(walls, bound, strict=True)]),
        "wall_s": spread(walls), "io_s": spread(reading), "compute_s": spread(computing),
    }  # fmt: skip
