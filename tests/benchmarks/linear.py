"""GB/s of weights that one token's matrix products read, beside the speed of memory in the same run.

python tests/benchmarks/linear.py [--shapes 4096x4096 576x576 ...] [--threads 1 2] [--isa avx2] [--repeats 5]

Every product reads weights that no cache holds any more: matrices of a shape take turns until --megabytes
have been read.  Prints one JSON object: every repeat, medians, extremes, and shares of the memory's speed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

import numpy as np
from decode import READ_BYTES, machine, read_speed, summary
from pi2.stats import versions
from pi2.tensor import Tensor, row_bytes
from pi2_backend_cpu.backend import CpuBackend

SHAPES = ["4096x4096", "14336x4096", "4096x14336", "49152x576", "576x576", "1536x576"]


def matrices(rows: int, cols: int, dtype: str, total: int) -> list[Tensor]:
    """As many of random weights as together fill ``total`` bytes, at least one."""
    size = rows * row_bytes(dtype, cols)
    rng = np.random.default_rng(0)
    one = Tensor.from_f32(rng.standard_normal((rows, cols), np.float32), dtype)
    return [Tensor(one.data.copy(), one.dtype, one.cols) for _ in range(max(1, total // size))]


class Products:
    """One token through every matrix of a shape, again and again."""

    def __init__(self, backend: CpuBackend, weights: list[Tensor]) -> None:
        rows, cols = weights[0].rows, weights[0].cols
        self._backend, self._placed = backend, [backend.place(w) for w in weights]
        self._x = np.random.default_rng(1).standard_normal((1, cols), np.float32)
        self._out = np.empty((1, rows), np.float32)
        self._bytes = sum(w.data.nbytes for w in weights)

    def speed(self) -> float:
        """GB/s of one pass over all of them."""
        linear, x, out = self._backend.linear, self._x, self._out
        start = time.perf_counter()
        for placed in self._placed:
            linear(placed, x, out)
        return self._bytes / (time.perf_counter() - start) / 1e9


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Each dtype and shape on each number of threads, alternating with a read of memory."""
    buffers = [np.ones(READ_BYTES, np.uint8) for _ in range(max(options.threads))]
    backends = {
        n: CpuBackend(threads=n, activations=options.activations, isa=options.isa) for n in options.threads
    }
    table: dict[str, object] = {}
    for dtype in options.dtypes:
        for shape in options.shapes:
            rows, cols = map(int, shape.split("x"))
            weights = matrices(rows, cols, dtype, options.megabytes << 20)
            runs = {n: Products(backend, weights) for n, backend in backends.items()}
            repeats = []
            for repeat in range(options.repeats + 1):  # the first touches pages and wakes clocks
                found = {}
                for n, run in runs.items():
                    found[f"memory_{n}"] = read_speed(buffers[:n])
                    found[f"linear_{n}"] = run.speed()
                if repeat:
                    repeats.append(found)
            share = {n: statistics.median(r[f"linear_{n}"] / r[f"memory_{n}"] for r in repeats) for n in runs}
            table[f"{dtype} {shape}"] = {
                "gb_s": summary(repeats),
                "share_of_memory": share,
                "repeats": repeats,
            }
    return {"isa": {n: b.describe() for n, b in backends.items()}, "products": table}


def main(options: argparse.Namespace) -> None:
    before = machine()
    found = measure(options)
    report = {
        "what": "weights read by one token's matrix products, GB/s",
        "machine": before,
        "load_average_after": os.getloadavg(),
        "versions": versions(),
        "options": vars(options),
        **found,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=["q4_0", "q8_0", "f16"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--isa")
    parser.add_argument("--activations", default="int8")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=256)
    main(parser.parse_args())
