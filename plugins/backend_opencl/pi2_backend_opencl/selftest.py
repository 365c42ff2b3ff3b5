"""``python -m pi2_backend_opencl.selftest``: what an owner of a phone can tell about its OpenCL.

The device's facts, which ways to build the kernels give right numbers, how fast rows pass by, what a launch
costs, and what is best.  ``--json`` prints all of it as one object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from pi2.api import FfnSpec
from pi2.bundle import BundleGeometry
from pi2.errors import Pi2Error
from pi2.tensor import Tensor

from pi2_backend_opencl import matrix, neurons, plans
from pi2_backend_opencl.caps import LANES, Variant, load_profile, resolve
from pi2_backend_opencl.device import Device, Found, choose_device
from pi2_backend_opencl.trials import background_problem, problems
from pi2_backend_opencl.vendors import Vendor

_REPEATS = 9


def selftest(found: Found, rows: int, cols: int) -> dict[str, Any]:
    """Facts, and for every way to build the kernels what is wrong with it, or its times; the best of them."""
    plain = dataclasses.replace(load_profile("minimal"), name="plain")
    images = dataclasses.replace(found.caps, name="images", cpu=False)
    ways = {
        "as detected": resolve(found.caps),
        "plain": resolve(found.caps, plain),
        "images": resolve(images, images),
    }
    variants = {name: _try(found, variant, rows, cols) for name, variant in ways.items()}
    right = {name: found for name, found in variants.items() if not found["wrong"]}
    best = {
        kind: max(right, key=lambda name: right[name][kind]["gb_s"], default=None) for kind in ("f32", "int8")
    }
    return {
        "ok": bool(right),
        "device": found.name,
        "driver": found.device.driver_version,
        "caps": dataclasses.asdict(found.caps),
        "shape": [rows, cols],
        "variants": variants,
        "best": best,
    }


def _try(found: Found, variant: Variant, rows: int, cols: int) -> dict[str, Any]:
    try:
        device = Device(found, variant, None)
        wrong = problems(device)
        result: dict[str, Any] = {"flags": variant.flags(), "wrong": wrong}
        if not wrong:
            result |= _times(device, rows, cols)
            result["background"] = _background(device, cols)
        device.close()
    except Pi2Error as e:
        return {"flags": variant.flags(), "wrong": [str(e)]}
    return result


def _times(device: Device, rows: int, cols: int) -> dict[str, Any]:
    """Seconds of an almost empty launch, and GB/s at which q4_0 rows pass by, as floats and as bytes."""
    rng = np.random.default_rng(0)
    nbytes = cols // 2 + cols // 16
    data = rng.integers(0, 60, (rows, nbytes), np.uint8)  # any bytes below 0x7c00 are finite scales
    x = rng.standard_normal((1, cols), dtype=np.float32)
    result: dict[str, Any] = {}
    for name, n, integers in (("launch_s", LANES, False), ("f32", rows, False), ("int8", rows, True)):
        placed = matrix.place_matrix(device, Tensor(data[:n], "q4_0", cols))
        inputs = matrix.send_inputs(device, x, integers=integers)
        y, got = device.scratch("y", 4 * n), np.empty((1, n), np.float32)

        def once(placed: Any = placed, inputs: Any = inputs, y: Any = y, got: Any = got) -> None:
            matrix.multiply(device, placed, inputs, None, y, len(got[0]))
            device.fetch(y, got)

        seconds = _median(once)
        result[name] = seconds if name == "launch_s" else {"gb_s": n * nbytes / seconds / 1e9}
    return result


def _background(device: Device, cols: int) -> dict[str, Any]:
    """Of an FFN of one cluster, whose four launches are nearly nothing: recorded, and one by one."""
    recorded = device.vendor.launches
    wrong = background_problem(device)
    if wrong:
        return {"launches": recorded, "wrong": wrong}
    g = BundleGeometry(cols, "q4_0", "q4_0", "q4_0")
    ffn = neurons.place_ffn(device, np.zeros((LANES, g.stride), np.uint8), FfnSpec(g, "relu"))
    x, out = np.zeros((2, 1, cols), np.float32)
    times = {}
    for name in (recorded, Vendor.launches):
        plan = plans.Plan(device, ffn, 1, LANES, integers=False)
        times[name] = _median(lambda plan=plan: plan.begin(x).finish(out))  # type: ignore[misc]
        plan.release()
        device.vendor = Vendor(device.vendor.device)
    return {"launches": recorded, "wrong": None, "ffn_s": times}


def _median(call: Callable[[], None]) -> float:
    call()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _summary(told: dict[str, Any]) -> str:
    lines = [f"{told['device']}, driver {told['driver']}: {'ok' if told['ok'] else 'NO KERNEL IS RIGHT'}"]
    for name, way in told["variants"].items():
        if way["wrong"]:
            lines.append(f"{name}: WRONG: {way['wrong'][0]}")
            continue
        speeds = ", ".join(f"{kind} {way[kind]['gb_s']:.1f} GB/s" for kind in ("f32", "int8"))
        back = way["background"]
        each = back["wrong"] or ", ".join(f"{k} {s * 1e6:.0f} us" for k, s in back["ffn_s"].items())
        lines.append(f"{name}: {speeds}, launch {way['launch_s'] * 1e6:.0f} us, FFN by {each}")
    return "\n".join([*lines, f"best: {told['best']}"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pi2_backend_opencl.selftest", description=__doc__)
    parser.add_argument("--device", help="part of the device's or driver's name")
    parser.add_argument("--rows", type=int, default=14336)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if options.rows < LANES or options.cols < 32 or options.cols % 32:
        parser.error(f"at least {LANES} rows, and columns in multiples of 32")
    try:
        found = choose_device(options.device)
        told = selftest(found, options.rows, options.cols)
        sys.stdout.write((json.dumps(told, indent=1) if options.json else _summary(told)) + "\n")
    except Pi2Error as e:
        sys.exit(f"{e}" + (f"\nhint: {e.hint}" if e.hint else ""))


if __name__ == "__main__":
    main()
