"""Decode in memory from mappings in huge pages and in small ones, in turns in one process.

PYTHONPATH=tests python tests/benchmarks/huge_pages.py MODEL COPY [--predictor exact] [--repeats 9]

MODEL is mapped as the mmap tier does it, its COPY without asking for huge pages, both with an empty page
cache.  Where a disk's read-ahead is megabytes (/sys/block/*/queue/read_ahead_kb), small ones become huge by
themselves; usual are 128 KB.  Prints one JSON object: tokens/s of every repeat, ratios, bytes mapped huge.
"""

from __future__ import annotations

import argparse
import json
import mmap
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from decode import machine
from pi2.builtin import mmap_tier
from pi2.engine import Engine
from pi2.memory_cgroup import drop_page_cache
from pi2.stats import versions

PROMPT = 32


def mapped_huge() -> int:
    """Bytes of files that this process has mapped in huge pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("FilePmdMapped"))


def small_pages(descriptor: int) -> mmap.mmap:
    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)


def opened(path: Path, options: argparse.Namespace, tokens: int) -> Engine:
    drop_page_cache(*path.iterdir())
    backend = f"cpu:threads={options.threads}"
    return Engine.open(
        path, backend=backend, predictor=options.predictor, storage="mmap", context=tokens, verify=False
    )


def tokens_s(engine: Engine, ids: list[int]) -> float:
    session = engine.session()
    session.forward(ids[:PROMPT])
    start = time.perf_counter()
    for token in ids[PROMPT:]:
        session.forward([token])
    return (len(ids) - PROMPT) / (time.perf_counter() - start)


def main(options: argparse.Namespace) -> None:
    tokens = PROMPT + options.decode
    rows: dict[str, list[float]] = {"huge": [], "small": []}
    with ExitStack() as stack:
        engines = {"huge": stack.enter_context(opened(options.model, options, tokens))}
        mmap_tier._map = small_pages
        engines["small"] = stack.enter_context(opened(options.copy, options, tokens))
        vocab = engines["huge"].model.architecture.vocab_size
        ids = np.random.default_rng(0).integers(0, vocab, tokens).tolist()
        huge: dict[str, Any] = {}
        for name, engine in engines.items():  # everything is read
            before = mapped_huge()
            tokens_s(engine, ids)
            huge[name] = mapped_huge() - before
        for _ in range(options.repeats):
            for name, engine in engines.items():
                rows[name].append(tokens_s(engine, ids))
        weights = engines["huge"].model.nbytes
    ratios = [a / b for a, b in zip(rows["huge"], rows["small"], strict=True)]
    report = {
        "machine": machine(), "versions": versions(), "weights_bytes": weights, "mapped_huge_bytes": huge,
        "config": {"predictor": options.predictor, "threads": options.threads, "decode": options.decode},
        "tokens_s": {name: {"median": statistics.median(r), "repeats": r} for name, r in rows.items()},
        "huge_over_small": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }  # fmt: skip
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("copy", type=Path)
    parser.add_argument("--predictor", default="exact")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--decode", type=int, default=24)
    main(parser.parse_args())
