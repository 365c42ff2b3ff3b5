"""Tries the NPU of this machine, for owners of one: ``python -m pi2_backend_qnn.selftest --json``.

Known numbers through every kind of graph, the law that graphs give the same bits, contexts saved and
loaded, and, on a device only, how long things take.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pi2.accelerator import ToPlace
from pi2.api import FfnSpec
from pi2.bundle import BundleGeometry
from pi2.engine import parse_choice
from pi2.errors import Pi2Error
from pi2.tensor import F32, U8, DType, Tensor, encode

from pi2_backend_qnn import host
from pi2_backend_qnn.backend import QnnBackend
from pi2_backend_qnn.ffn import begin
from pi2_backend_qnn.placed import ROWS, Ffn
from pi2_backend_qnn.probe import describe_npu, find_npu
from pi2_backend_qnn.requantise import BITS
from pi2_backend_qnn.targets import installed

_REPEATS = 20


def examine(options: dict[str, str], d: int, neurons: int) -> dict[str, Any]:
    """Everything, as one object for JSON.  A check that fails has its error in it; the rest goes on."""
    found: dict[str, Any] = {"npu": describe_npu(find_npu()), "packages": installed()}
    backend = QnnBackend.open(options)
    try:
        found |= {"backend": backend.describe(), "kind": backend.kind, **backend.about}
        found["checks"] = checks = {
            "matrices": _try(lambda: _matrices(backend, d)),
            "ffns": _try(lambda: _ffns(backend, d, neurons)),
            "same_bits_in_every_graph": _try(lambda: _same_bits(backend, d, neurons)),
            "contexts": _try(lambda: _contexts(options, d, neurons)),
            **{
                weights: _try(partial(_rounded, {**options, "weights": weights}, d, neurons))
                for weights in BITS
            },
        }
        if not backend.emulated:  # an emulator's time says nothing
            found["seconds"] = _try(lambda: _seconds(backend, d, neurons))
        found["ok"] = all(check["ok"] for check in checks.values())
    finally:
        backend.close()
    return found


def _try(check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return check()
    except Pi2Error as e:
        return {"ok": False, "error": str(e), "hint": e.hint}


def _random(rows: int, cols: int, seed: int = 0) -> F32:
    return np.random.default_rng(seed).standard_normal((rows, cols), dtype=np.float32)


def _bundles(d: int, neurons: int, dtype: DType, activation: Any) -> tuple[U8, FfnSpec]:
    geometry = BundleGeometry(d, dtype, dtype, dtype)
    bundles = np.zeros((neurons, geometry.stride), np.uint8)
    for seed, part in enumerate(("gate", "up", "down")):
        geometry.pack_into(bundles, part, _random(neurons, d, seed) * np.float32(d**-0.5))
    return bundles, FfnSpec(geometry, activation)


def _far(got: F32, want: F32) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def _judged(errors: dict[str, float]) -> dict[str, Any]:
    return {"ok": all(error < QnnBackend.tolerance for error in errors.values()), "relative_errors": errors}


def _matrices(backend: QnnBackend, d: int) -> dict[str, Any]:
    errors: dict[str, float] = {}
    kinds: tuple[DType, ...] = ("q4_0", "q8_0", "f16", "f32")
    for dtype in kinds:
        weight = backend.place(Tensor(encode(_random(d, d), dtype), dtype, d))
        for tokens in (1, 32):
            x, out = _random(tokens, d, tokens), np.empty((tokens, d), np.float32)
            backend.linear(weight, x, out)
            errors[f"{dtype}, {tokens} tokens"] = _far(out, host.linear(weight, x, None))
    return _judged(errors)


def _ffns(backend: QnnBackend, d: int, neurons: int) -> dict[str, Any]:
    errors: dict[str, float] = {}
    for dtype, activation in (("q4_0", "relu"), ("q8_0", "silu"), ("f16", "gelu_tanh")):
        ffn = backend.place_ffn(*_bundles(d, neurons, dtype, activation))  # type: ignore[arg-type]
        for tokens in ROWS:
            x = _random(tokens, d, tokens)
            out = np.empty_like(x)
            backend.ffn(ffn, x, out)
            errors[f"{dtype} {activation}, {tokens} tokens"] = _far(out, host.ffn(ffn, x, None)[0])
        backend.release(ffn)
    return _judged(errors)


def _hot(backend: QnnBackend, ffn: Ffn, x: F32, count: int, hot: int) -> F32:
    mask, out = (np.arange(ffn.neurons) < hot).astype(np.float32), np.empty_like(x)
    begin(backend._programs, ffn, x, mask, count).finish(out)
    return out


def _same_bits(backend: QnnBackend, d: int, neurons: int) -> dict[str, Any]:
    """What pi2 relies on when one graph stands in for another; on a device nobody has seen it yet."""
    ffn = backend.place_ffn(*_bundles(d, neurons, "q4_0", "relu"))
    hot, x = min(neurons, ffn.cluster), _random(1, d)
    want = _hot(backend, ffn, x, hot, hot)
    same = {
        "more clusters, masked": np.array_equal(_hot(backend, ffn, x, neurons, hot), want),
        "repeated": np.array_equal(_hot(backend, ffn, x, hot, hot), want),
    }
    for rows in ROWS[1:]:
        padded = np.zeros((rows, d), np.float32)
        padded[:1] = x
        same[f"{rows} rows"] = np.array_equal(_hot(backend, ffn, padded, hot, hot)[:1], want)
    return {"ok": all(same.values()), "same": same}


def _contexts(options: dict[str, str], d: int, neurons: int) -> dict[str, Any]:
    """Compiled into a folder, loaded by another worker: the bits of graphs compiled on the spot."""
    bundles, spec = _bundles(d, neurons, "q4_0", "relu")
    x, outs = _random(1, d), [np.empty((1, d), np.float32) for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "contexts"
        QnnBackend.compile(ToPlace([], [lambda: bundles], spec, {}), made, options, lambda *_: None)
        for more, out in zip(({}, {"contexts": str(made)}), outs, strict=True):
            backend = QnnBackend.open({**options, **more})
            try:
                backend.ffn(backend.place_ffn(bundles, spec), x, out)
            finally:
                backend.close()
        size = sum(file.stat().st_size for file in made.rglob("*.bin"))
    return {"ok": np.array_equal(outs[0], outs[1]), "bytes": size}


def _rounded(options: dict[str, str], d: int, neurons: int) -> dict[str, Any]:
    """Weights that are rounded: errors beside products with rounded ones, and what rounding itself loses."""
    errors: dict[str, float] = {}
    losses: dict[str, float] = {}
    backend = QnnBackend.open(options)
    try:
        for activation in ("relu", "silu"):
            ffn = backend.place_ffn(*_bundles(d, neurons, "q8_0", activation))
            meant = host.rounded_ffn(ffn)
            for tokens in (1, 32):
                x = _random(tokens, d, tokens)
                out, name = np.empty_like(x), f"{activation}, {tokens} tokens"
                backend.ffn(ffn, x, out)
                errors[name] = _far(out, host.ffn(meant, x, None)[0])
                losses[name] = _far(out, host.ffn(ffn, x, None)[0])
        same = _same_bits(backend, d, neurons)
    finally:
        backend.close()
    found = _judged(errors) | {"lost": losses, "same": same["same"]}
    return found | {"ok": found["ok"] and same["ok"]}


def _seconds(backend: QnnBackend, d: int, neurons: int) -> dict[str, Any]:
    """Medians of whole calls, FastRPC and all, and how long each graph took to be made."""
    ffn = backend.place_ffn(*_bundles(d, neurons, "q4_0", "relu"))
    calls: dict[str, float] = {}
    made: dict[str, float] = {}
    for tokens in ROWS:
        x, times = _random(tokens, d), []
        out = np.empty_like(x)
        for _ in range(_REPEATS + 1):
            start = time.perf_counter()
            done = backend.finish_ffn(backend.begin_ffn(ffn, x, neurons), out)
            times.append(time.perf_counter() - start)
            made |= {str(tokens): swap.end - swap.start for swap in done.swaps}
        calls[str(tokens)] = statistics.median(times[1:])
    return {"ok": True, "neurons": neurons, "d_model": d, "ffn_by_tokens": calls, "graph_made": made}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pi2_backend_qnn.selftest", description=__doc__)
    parser.add_argument("--backend", default="qnn", help="options as for pi2: qnn:emulator=on,soc=SM8650")
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--neurons", type=int, default=1024)
    parser.add_argument("--json", action="store_true", help="everything, not only what failed")
    given = parser.parse_args(arguments)
    if given.d_model < 32 or given.d_model % 32 or given.neurons < 1:
        parser.error("the model's width is a multiple of 32, and there is a neuron at least")
    try:
        options = parse_choice(given.backend)[1]
        if "weights" in options:
            parser.error("every kind of weights is tried: leave weights= out")
        found = examine(options, given.d_model, given.neurons)
    except Pi2Error as e:
        sys.exit(f"{e}" + (f"\nhint: {e.hint}" if e.hint else ""))
    lines = [f"{'ok' if check['ok'] else 'FAILED':8}{name}" for name, check in found["checks"].items()]
    text = json.dumps(found, indent=1) if given.json else "\n".join([found["backend"], *lines])
    sys.stdout.write(text + "\n")
    sys.exit(0 if found["ok"] else 1)


if __name__ == "__main__":
    main()
