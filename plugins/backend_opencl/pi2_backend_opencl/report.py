"""``python -m pi2_backend_opencl.report``: what an owner of a phone can tell about its OpenCL.

Prints JSON: the device's facts, which kernels give right numbers, and how fast they are.
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
from pi2.errors import Pi2Error
from pi2.tensor import Tensor

from pi2_backend_opencl import matrix
from pi2_backend_opencl.caps import LANES, Variant, load_profile, resolve
from pi2_backend_opencl.device import Device, Found, choose_device
from pi2_backend_opencl.selftest import problems

_REPEATS = 9


def report(found: Found, rows: int, cols: int) -> dict[str, Any]:
    """Facts, and for every way to build the kernels what is wrong with it, or its times."""
    plain = dataclasses.replace(load_profile("minimal"), name="plain")
    images = dataclasses.replace(found.caps, name="images", cpu=False)
    ways = {
        "as detected": resolve(found.caps),
        "plain": resolve(found.caps, plain),
        "images": resolve(images, images),
    }
    return {
        "device": found.name,
        "driver": found.device.driver_version,
        "caps": dataclasses.asdict(found.caps),
        "shape": [rows, cols],
        "variants": {name: _try(found, variant, rows, cols) for name, variant in ways.items()},
    }


def _try(found: Found, variant: Variant, rows: int, cols: int) -> dict[str, Any]:
    try:
        device = Device(found, variant, None)
        wrong = problems(device)
        result: dict[str, Any] = {"flags": variant.flags(), "wrong": wrong}
        if not wrong:
            result |= _times(device, rows, cols)
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


def _median(call: Callable[[], None]) -> float:
    call()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pi2_backend_opencl.report", description=__doc__)
    parser.add_argument("--device", help="part of the device's or driver's name")
    parser.add_argument("--rows", type=int, default=14336)
    parser.add_argument("--cols", type=int, default=4096)
    options = parser.parse_args(arguments)
    if options.rows < LANES or options.cols < 32 or options.cols % 32:
        parser.error(f"at least {LANES} rows, and columns in multiples of 32")
    try:
        found = choose_device(options.device)
        sys.stdout.write(json.dumps(report(found, options.rows, options.cols), indent=1) + "\n")
    except Pi2Error as e:
        sys.exit(f"{e}" + (f"\nhint: {e.hint}" if e.hint else ""))


if __name__ == "__main__":
    main()
