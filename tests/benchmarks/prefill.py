"""Arithmetic speed of products of many tokens: how near to what the machine can do.

python tests/benchmarks/prefill.py [--tokens 512] [--threads 2] [--repeats 5] [--d-model 4096 --neurons 14336]

Matrices d x d and d x neurons, and whole FFNs (gated), in every storage format, with random weights.  One
multiplication with its addition counts as two operations.  In every repeat NumPy's BLAS multiplies float32
matrices of the same shape: what good code makes of the machine's floating point units (two 8-bit products
per float's would be twice that).  Prints one JSON object: every repeat, medians and extremes in GOPS.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from decode import machine, summary
from pi2.api import FfnSpec
from pi2.architecture import Activation
from pi2.bundle import BundleGeometry
from pi2.plugins import Plugins
from pi2.stats import versions
from pi2.tensor import DTYPES, DType, Tensor

ROWS = 256  # that differ: quantising millions of weights would take longer than measuring them


def random_rows(rng: np.random.Generator, rows: int, cols: int, dtype: DType) -> Tensor:
    few = Tensor.from_f32(rng.standard_normal((min(rows, ROWS), cols), np.float32) / cols**0.5, dtype)
    return Tensor(np.resize(few.data, (rows, few.data.shape[1])), dtype, cols)


def measure(backends: dict[str, Any], options: argparse.Namespace) -> dict[str, Callable[[], float]]:
    """What to run: each returns its billions of operations per second."""
    rng = np.random.default_rng(0)
    n, d, k = options.tokens, options.d_model, options.neurons
    x = rng.standard_normal((n, d), np.float32)
    runs: dict[str, Callable[[], float]] = {}

    def add(name: str, macs: int, call: Callable[[], object]) -> None:
        def run() -> float:
            start = time.perf_counter()
            call()
            return 2e-9 * macs / (time.perf_counter() - start)

        runs[name] = run

    blas = rng.standard_normal((d, k), np.float32)
    y = np.empty((n, k), np.float32)
    add("BLAS f32", n * d * k, lambda: np.matmul(x, blas, out=y))
    for label, backend in backends.items():
        for dtype in options.formats:
            for rows in (d, k):
                weight, out = backend.place(random_rows(rng, rows, d, dtype)), np.empty((n, rows), np.float32)
                add(
                    f"{label} {dtype} {d}x{rows}",
                    n * d * rows,
                    lambda b=backend, w=weight, o=out: b.linear(w, x, o),
                )
            geometry = BundleGeometry(d, dtype, dtype, dtype)
            bundles = np.zeros((k, geometry.stride), np.uint8)
            for part in ("gate", "up", "down"):
                offset, size = geometry.segments()[part]
                bundles[:, offset : offset + size] = random_rows(rng, k, d, dtype).data
            for activation in options.activations:
                ffn = backend.place_ffn(bundles, FfnSpec(geometry, activation))
                out = np.empty((n, d), np.float32)
                add(
                    f"{label} {dtype} FFN {activation}",
                    3 * n * d * k,
                    lambda b=backend, f=ffn, o=out: b.ffn(f, x, o),
                )
    return runs


def main(options: argparse.Namespace) -> None:
    plugins, before = Plugins.installed(), machine()
    names = [text.replace("THREADS", str(options.threads)) for text in options.backends]
    backends = {}
    for name in names:
        kind, _, rest = name.partition(":")
        chosen = dict(item.split("=") for item in rest.split(",") if item)
        backends[name] = plugins.pick("backends", kind).open(chosen)
    runs = measure(backends, options)
    for run in runs.values():
        run()  # warm: pages, scratch
    rows = [{name: run() for name, run in runs.items()} for _ in range(options.repeats)]
    report = {
        "what": f"GOPS, {options.tokens} tokens, d {options.d_model}, {options.neurons} neurons",
        "machine": before,
        "load_average_after": os.getloadavg(),
        "versions": versions(),
        "backends": {name: backend.describe() for name, backend in backends.items()},
        "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS", "as many as cores"),
        "medians": summary(rows),
        "repeats": rows,
    }
    print(json.dumps(report, indent=1))
    for backend in backends.values():
        backend.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--d-model", type=int, default=4096)
    parser.add_argument("--neurons", type=int, default=14336)
    parser.add_argument("--formats", nargs="+", choices=DTYPES, default=["q4_0", "q8_0"])
    activations: list[Activation] = ["relu", "silu"]
    parser.add_argument("--activations", nargs="+", choices=activations, default=activations)
    parser.add_argument("--backends", nargs="+", default=["cpu:threads=THREADS"])
    main(parser.parse_args())
