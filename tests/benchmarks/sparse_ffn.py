"""GB/s of one token's FFN in memory at set densities, beside the speed at which memory is read, in turns.

python tests/benchmarks/sparse_ffn.py [--threads 2] [--repeats 5] [--shapes 7b small_q4_0 small_q8_0]

"given": the active set is known, and only it is passed as rows.  "exact": every gate is computed, and gates
were made so that the density is met.  Bytes are those that must be read: whole bundles of the active
neurons, or all gates and the rest of the active ones.  Prints one JSON object: every repeat, and medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from decode import READ_BYTES, machine, read_speed, summary
from pi2.api import FfnSpec
from pi2.bundle import BundleGeometry
from pi2.plugins import Plugins
from pi2.stats import versions
from pi2.tensor import DType, Tensor

DENSITIES = (0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Shape:
    """As many FFNs (``layers``) of one kind as no cache holds; each is visited in turn."""

    d: int
    neurons: int
    dtype: DType
    layers: int
    densities: tuple[float, ...] = DENSITIES


SHAPES = {
    "7b": Shape(4096, 14336, "q4_0", 4),
    "small_q4_0": Shape(576, 1536, "q4_0", 90, (0.1, 0.36, 1.0)),
    "small_q8_0": Shape(576, 1536, "q8_0", 60, (0.1, 0.36, 1.0)),
}


def random_bundles(geometry: BundleGeometry, k: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """(k, stride): random quants, scales of either sign and near one size."""
    bundles = rng.integers(0, 256, (k, geometry.stride), dtype=np.uint8)
    for name, (offset, size) in geometry.segments().items():
        scales = geometry.d_model // 32
        values = (rng.choice((-1, 1), (k, scales)) * rng.uniform(0.5, 1, (k, scales))).astype(np.float16)
        values *= np.float16(0.01 if getattr(geometry, name) == "q4_0" else 0.001)
        bundles[:, offset + size - 2 * scales : offset + size] = values.view(np.uint8)
    return bundles


class Ffns:
    """The FFNs of one shape: the same active neurons are on in all, other ones for every density."""

    def __init__(self, backend: Any, shape: Shape, seed: int = 0) -> None:
        self.shape, self._backend = shape, backend
        rng = np.random.default_rng(seed)
        self.geometry = BundleGeometry(shape.d, shape.dtype, shape.dtype, shape.dtype)
        self.spec = FfnSpec(self.geometry, "relu")
        self.x = rng.standard_normal((1, shape.d), np.float32)
        self.out = np.empty_like(self.x)
        self.bundles = [random_bundles(self.geometry, shape.neurons, rng) for _ in range(shape.layers)]
        self.handles = [backend.place_ffn(b, self.spec) for b in self.bundles]
        self.order = rng.permutation(shape.neurons)

    def turn_on(self, density: float) -> np.ndarray[Any, Any]:
        """Negate gates until just these neurons fire; returns them, ascending."""
        on = np.zeros(self.shape.neurons, bool)
        on[self.order[: round(density * self.shape.neurons)]] = True
        offset, size = self.geometry.segments()["gate"]
        first = offset + size - self.shape.d // 16  # of the scales: their sign is that of the row
        for bundles in self.bundles:
            gates = np.ascontiguousarray(bundles[:, offset : offset + size])
            weight = self._backend.place(Tensor(gates, self.shape.dtype, self.shape.d))
            gate = np.empty((1, len(on)), np.float32)
            self._backend.linear(weight, self.x, gate)
            bundles[(gate[0] > 0) != on, first + 1 : offset + size : 2] ^= 0x80
        return np.flatnonzero(on).astype(np.int32)

    def must_read(self, active: int, exact: bool) -> int:
        """Bytes of one FFN."""
        parts = {name: size for name, (_, size) in self.geometry.segments().items()}
        if not exact:
            return active * sum(parts.values())
        return self.shape.neurons * parts["gate"] + active * (parts["up"] + parts["down"])

    def seconds(self, rows: np.ndarray[Any, Any] | None, active: int, passes: int = 1) -> float:
        """Of one FFN, the mean over all layers."""
        start = time.perf_counter()
        for _ in range(passes):
            for handle in self.handles:
                count = self._backend.ffn(handle, self.x, self.out, rows)
                assert abs(count - active) <= 0.002 * active + 2, f"{count} neurons fired, not {active}"
        return (time.perf_counter() - start) / passes / len(self.handles)


def measure(ffns: Ffns, buffers: list[Any], repeats: int) -> dict[str, Any]:
    memory: list[dict[str, float]] = []
    found: dict[str, dict[str, Any]] = {}
    for density in ffns.shape.densities:
        rows = ffns.turn_on(density)
        ways: dict[str, Any] = {"exact": None, "given": rows}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for way in ways:
            ffns.seconds(ways[way], len(rows))
        for _ in range(repeats):
            memory.append({"1_thread": read_speed(buffers[:1]), "all_threads": read_speed(buffers)})
            for way, chosen in ways.items():
                times[way].append(ffns.seconds(chosen, len(rows), 2))
        for way in ways:
            median = statistics.median(times[way])
            bytes_ = ffns.must_read(len(rows), way == "exact")
            found[f"{way} {density:.0%}"] = {
                "ffn_us": 1e6 * median,
                "gb_s": bytes_ / median / 1e9,
                "megabytes": bytes_ / 1e6,
                "repeats_us": [1e6 * t for t in times[way]],
            }
    roof = statistics.median(row["all_threads"] for row in memory)
    dense = found["exact 100%"]["ffn_us"]
    for row in found.values():
        row["share_of_roofline"] = row["gb_s"] / roof
        row["speed_up_over_dense"] = dense / row["ffn_us"]
    return {"memory_read_gb_s": summary(memory), "points": found}


def main(options: argparse.Namespace) -> None:
    backend: Any = (
        Plugins.installed().pick("backends", options.backend).open({"threads": str(options.threads)})
    )
    buffers = [np.ones(READ_BYTES, np.uint8) for _ in range(options.threads)]
    report: dict[str, Any] = {
        "what": f"one token's FFN, {options.threads} threads, {options.repeats} repeats",
        "machine": machine(),
        "versions": versions(),
        "backend": backend.describe(),
        "shapes": {},
    }
    for name in options.shapes:
        ffns = Ffns(backend, SHAPES[name])
        report["shapes"][name] = measure(ffns, buffers, options.repeats)
    report["load_average_after"] = os.getloadavg()
    print(json.dumps(report, indent=1))
    backend.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    main(parser.parse_args())
