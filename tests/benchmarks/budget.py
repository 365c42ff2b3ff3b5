"""Whether ``pi2 run --memory`` keeps its budget, seen from outside of the process.

python tests/benchmarks/budget.py MODEL [--budgets 37 50 75 100] [--tokens 1024] [--predictor NAME]

Budgets are percent of the model's weights on top of what a process needs beside them (the smallest budget
that is accepted is tried, too).  The resident set is sampled every 20 ms; of the model's files, what the page
cache holds is counted before and after.  Prints one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from pi2.stats import versions

EVERY = 0.02  # seconds
ALLOWED = 1.03


def cached_bytes(path: Path) -> int:
    """Of a file, what is in the page cache (mincore)."""
    with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        pages = np.zeros(-(-len(view) // mmap.PAGESIZE), np.uint8)
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(view)), ctypes.c_void_p(pages.ctypes.data)
        )
        del view
    assert not failed
    return int((pages & 1).sum()) * mmap.PAGESIZE


def watched(command: list[str]) -> tuple[dict[str, Any], list[int], str]:
    """What ``command`` prints as JSON, its resident set over time, and its errors."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    samples = []
    statm = Path(f"/proc/{process.pid}/statm")
    while process.poll() is None:
        resident = statm.read_text().split()
        samples.append(int(resident[1]) * mmap.PAGESIZE if len(resident) > 1 else 0)
        time.sleep(EVERY)
    out, err = process.communicate()
    return json.loads(out) if process.returncode == 0 else {}, samples, err


def minimum(command: list[str]) -> int:
    """The smallest budget that pi2 says it would take, in bytes."""
    _, _, err = watched([*command, "--memory", "1M"])
    found = re.search(r"needs at least (\d+) MB", err)
    assert found, err
    return int(found[1]) * 10**6


def run(command: list[str], budget: int, files: list[Path]) -> dict[str, Any]:
    """One answer under a budget."""
    before = sum(map(cached_bytes, files))
    found, samples, err = watched([*command, "--memory", str(budget)])
    if not found:
        return {"budget": budget, "error": err}
    peak = max(samples)
    keys = ("hit_rate", "decode_tps", "io_wait_share", "ttft_s")
    return {
        "budget": budget,
        "rss_peak": peak,
        "share": peak / budget,
        "kept": peak <= budget * ALLOWED,
        "tokens": len(found["tokens"]),
        "text_head": found["text"][:60],
        "page_cache_growth": sum(map(cached_bytes, files)) - before,
        "regions": found["config"]["regions"],
        "notes": found["config"]["notes"],
        **{key: found[key] for key in keys},
    }


def main(options: argparse.Namespace) -> None:
    """Run every budget, print the figures."""
    files = [options.model / name for name in ("dense.safetensors", "neurons.safetensors")]
    weights = sum(path.stat().st_size for path in files)
    command = [sys.executable, "-m", "pi2", "run", "--json", "--model", str(options.model), "--raw"]
    command += ["--context", str(options.tokens + 64), "--max-tokens", str(options.tokens)]
    for token in options.never:
        command += ["--logit-bias", f"{token}=-inf"]
    if options.predictor:
        command += ["--predictor", options.predictor]
    command.append("Once upon a time")
    least = minimum(command)
    budgets = [int(least * 1.02)]
    budgets += [b for share in options.budgets if (b := int(weights * share / 100)) > least]
    if budgets[-1] < weights:
        budgets.append(int(least + weights * 0.8))
    runs = [run(command, budget, files) for budget in budgets]
    machine = {"machine": platform.machine(), "system": platform.platform()}
    result = {
        "model": options.model.name, "weights": weights, "minimum": least, "runs": runs,
        "all_kept": all(r.get("kept") for r in runs), "machine": machine, "versions": versions(),
    }  # fmt: skip
    print(json.dumps(result, indent=2))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--budgets", type=float, nargs="*", default=[37, 50, 75, 100])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--predictor")
    parser.add_argument("--never", type=int, nargs="*", default=[], help="tokens that end an answer")
    return parser.parse_args()


if __name__ == "__main__":
    main(_options())
