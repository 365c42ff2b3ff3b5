"""Does a budget bound the process?  Resident memory and page cache, seen from outside, over many tokens.

PYTHONPATH=tests python tests/benchmarks/rss.py MODEL [--shares 0.37 0.5 0.75 1.0] [--tokens 1024]

MODEL is a pi2 model; a budget is a share of the bytes of its weight files.  pi2 runs in a process and a
memory cgroup of its own, whose limit does not bind; /proc/PID/status is read every 20 ms from another
process.  Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
from contenders import Contender
from decode import machine
from in_memory import architecture
from pi2.container import read_manifest
from pi2.memory_cgroup import MemoryCgroup, drop_page_cache
from pi2.stats import versions

EVERY_S = 0.02


class Watch:
    """Samples the resident set of a process until it is left."""

    def __init__(self, pid: int) -> None:
        self.samples: list[int] = []
        self._status = Path(f"/proc/{pid}/status")
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def _sample(self) -> None:
        while not self._end.wait(EVERY_S):
            text = self._status.read_text()
            self.samples.append(int(text.partition("VmRSS:")[2].split()[0]) << 10)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._thread.join()


def run(model: Path, budget: int, options: argparse.Namespace) -> dict[str, Any]:
    arch = architecture(model)
    total = options.prompt + options.tokens
    ids = np.random.default_rng(0).integers(0, arch.vocab_size, total).tolist()
    drop_page_cache(*model.iterdir())
    more = {"backend": f"cpu:threads={options.threads}", "predictor": options.predictor, "context": total + 8}
    with MemoryCgroup(1 << 40) as group:
        try:
            contender = Contender("pi2", model, cgroup=group.path, offload={"memory": budget}, **more)
        except RuntimeError as e:
            return {"budget_bytes": budget, "refused": str(e)}
        with contender, Watch(contender.pid) as watch:
            before = group.figures()
            answer = contender.run(ids, options.prompt)
            after = group.figures()
        peak = max(watch.samples)
    return {
        "budget_bytes": budget,
        "peak_rss_bytes": peak,
        "peak_over_budget": peak / budget,
        "median_rss_bytes": float(np.median(watch.samples)),
        "samples": len(watch.samples),
        "page_cache_growth_bytes": after["page_cache"] - before["page_cache"],
        "cgroup_after": after,
        "decode_tokens_s": options.tokens / sum(answer["token_s"]),
    }


def main(options: argparse.Namespace) -> None:
    manifest = read_manifest(options.model)
    weights = sum(manifest.files[name].nbytes for name in ("dense.safetensors", "neurons.safetensors"))
    report = {
        "machine": machine(),
        "versions": versions(),
        "weights_bytes": weights,
        "prompt": options.prompt,
        "tokens": options.tokens,
        "predictor": options.predictor,
        "runs": {
            f"{share:.0%}": run(options.model, int(share * weights), options) for share in options.shares
        },
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.37, 0.5, 0.75, 1.0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--predictor", default="exact")
    main(parser.parse_args())
