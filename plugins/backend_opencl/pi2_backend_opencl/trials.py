"""Tries every kernel with known numbers before it is trusted: drivers of phones miscompile."""

import dataclasses
from pathlib import Path

import numpy as np
from pi2.api import FfnSpec
from pi2.bundle import BundleGeometry
from pi2.errors import PluginError
from pi2.tensor import DTYPES, DType, Tensor, encode

from pi2_backend_opencl import matrix, neurons, plans
from pi2_backend_opencl.caps import Variant, load_profile, resolve
from pi2_backend_opencl.device import Device, Found, device_errors
from pi2_backend_opencl.vendors import Vendor
from pi2_backend_opencl.waiting import DEADLINE_S

_ROWS, _COLS = 67, 96  # a cluster and a tail; three groups
_CLOSE = 1e-3


def first_that_works(
    found: Found, variant: Variant, cache: Path | None, deadline: float = DEADLINE_S
) -> tuple[Device, list[str]]:
    """A device with kernels that give right numbers: those of ``variant``, else the plainest; and remarks.

    Raises PluginError if not even those do.
    """
    remarks: list[str] = []
    plain = resolve(found.caps, dataclasses.replace(load_profile("minimal"), name="plain"))
    for candidate in (variant, plain):
        device = Device(found, candidate, cache, deadline)
        wrong = problems(device) or _background_problems(device)
        if not wrong:
            return device, remarks
        device.close()
        remarks.append(f"FELL BACK to plain kernels: {wrong[0]}")
    raise PluginError(
        f"{found.name} computes wrong numbers: {wrong[0]}",
        hint="update the driver, or use --backend cpu",
    )


def problems(device: Device) -> list[str]:
    """What is wrong with the kernels of a device, one sentence each; empty if nothing is."""
    found = []
    for dtype in DTYPES:
        for tokens, integers in ((1, False), (matrix.TOKENS + 1, False), (1, True)):
            try:
                error = _error(device, dtype, tokens, integers)
            except PluginError as e:
                found.append(str(e))
                continue
            if not error < _CLOSE:
                what = "bytes" if integers else f"{tokens} tokens"
                found.append(f"{dtype} rows times {what} are off by {error:.1e}")
    return found


def _error(device: Device, dtype: DType, tokens: int, integers: bool) -> float:
    """Largest error of rows times activations, as a share of the largest sum of magnitudes."""
    rng = np.random.default_rng(7)
    weights = rng.standard_normal((_ROWS, _COLS), dtype=np.float32)
    tensor = Tensor(encode(weights, dtype), dtype, _COLS)
    x = rng.integers(-127, 128, (tokens, _COLS)).astype(np.float32)
    x[:, ::32] = 127  # so that bytes are exact
    placed = matrix.place_matrix(device, tensor)
    y = device.scratch("y", 4 * tokens * _ROWS)
    inputs = matrix.send_inputs(device, x, integers=integers)
    matrix.multiply(device, placed, inputs, None, y, _ROWS)
    got = np.empty((tokens, _ROWS), np.float32)
    device.fetch(y, got)
    exact = tensor.to_f32().astype(np.float64)
    scale = float((np.abs(x) @ np.abs(exact).T).max())
    return float(np.abs(got - x @ exact.T).max()) / scale


def _background_problems(device: Device) -> list[str]:
    """The same of an FFN in the background; if recordings are to blame, the device goes on without them."""
    wrong = background_problem(device)
    if wrong and device.vendor.launches != Vendor.launches:
        device.give_up_recording(wrong)
        wrong = background_problem(device)
    return [wrong] if wrong else []


def background_problem(device: Device) -> str | None:
    """What is wrong with a plan, beside the same FFN computed at once."""
    rng = np.random.default_rng(8)
    g = BundleGeometry(_COLS, "q8_0", "q8_0", "f16")
    bundles = np.zeros((_ROWS, g.stride), np.uint8)
    for name in g.segments():
        g.pack_into(bundles, name, rng.standard_normal((_ROWS, _COLS), dtype=np.float32))
    x = rng.standard_normal((1, _COLS), dtype=np.float32)
    at_once, got = np.empty_like(x), np.empty_like(x)
    try:
        with device_errors(device.name):
            ffn = neurons.place_ffn(device, bundles, FfnSpec(g, "relu"))
            rows = np.arange(_ROWS - 1, dtype=np.int32)
            active = neurons.compute(device, ffn, x, at_once, rows, integers=False)
            plan = plans.Plan(device, ffn, 1, len(rows), integers=False)
            for _ in range(2):
                done = plan.begin(x).finish(got)
            plan.release()
    except PluginError as e:
        return str(e)
    error = float(np.abs(got - at_once).max() / np.abs(at_once).max())
    if done.active != active or not error < _CLOSE:
        return f"an FFN in the background is off by {error:.1e}"
    return None
