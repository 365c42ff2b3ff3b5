"""The backend ``opencl``: checks its options, picks a device and the kernels that fit it.

What needs pyopencl is imported when it is used: who computes elsewhere has better use for the memory.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pi2.accelerator import FfnDone
from pi2.api import Backend, FfnSpec, Probe
from pi2.attention import AttentionSpec
from pi2.errors import OptionError, PluginError
from pi2.kv_cache import Kv, KvDType
from pi2.tensor import F32, U8, Ids, Tensor

from pi2_backend_opencl.caps import load_profile, resolve
from pi2_backend_opencl.waiting import DEADLINE_S

if TYPE_CHECKING:
    from pi2_backend_opencl import attention, matrix, neurons, plans

_ACCELERATOR, _ON_CPU = 200, 5  # a CPU's OpenCL stays below its native kernels, and below NumPy
_EXACT, _ROUNDED = 1e-5, 0.012
_CACHE = ".cache/pi2/opencl"


class OpenclBackend(Backend):
    """Kernels for Adreno and other GPUs; weights are copied once, down is read in place where it can be.

    ``device``: part of a device's or driver's name.  ``profile``: build the kernels as for another device
    (adreno730, adreno830, minimal, or a JSON file) and emulate what this one lacks.  ``activations``
    "int8": one token meets quantised weights as bytes, by dot products of bytes; "f32": exact.
    ``cache``: where compiled kernels are kept ("" keeps none).  ``deadline``: seconds that the device has
    for one answer, at most an FFN of 256 tokens or an attention block; then it counts as lost.
    """

    name = "opencl"
    tolerance = _EXACT

    @classmethod
    def probe(cls) -> Probe:
        from pi2_backend_opencl.device import find_devices

        devices = find_devices()
        if not devices:
            return Probe(0, "no OpenCL driver answers, or none has a device")
        best = devices[0]
        if best.fault is not None:
            return Probe(0, f"the driver of {best.name} compiles nothing: {best.fault}")
        return Probe(_ON_CPU if best.caps.cpu else _ACCELERATOR, best.name)

    def __init__(
        self,
        device: str | None = None,
        profile: str | None = None,
        activations: str = "f32",
        cache: str | None = None,
        deadline: float = DEADLINE_S,
    ) -> None:
        from pi2_backend_opencl import trials
        from pi2_backend_opencl.device import choose_device

        if activations not in ("int8", "f32"):
            raise OptionError(f"activations are int8 or f32, not {activations!r}")
        if not deadline > 0:
            raise OptionError(f"a deadline of {deadline:g} s cannot be kept", hint="use deadline=60")
        wanted = load_profile(profile) if profile else None
        found = choose_device(device)
        folder = Path.home() / _CACHE if cache is None else Path(cache) if cache else None
        variant = resolve(found.caps, wanted)
        self._integers = activations == "int8"
        self.kv_dtype: KvDType = np.float16 if self._integers else np.float32
        if self._integers:
            self.tolerance = _ROUNDED  # type: ignore[misc]  # of this one
        self._device, self._remarks = trials.first_that_works(found, variant, folder, deadline)
        self._profile, self._activations = profile, activations

    def describe(self) -> str:
        variant = self._device.variant
        parts = [self._device.name, f"{self._activations} activations"]
        if self._profile:
            parts.append(f"kernels for {self._profile}")
        if variant.emulated:
            parts.append(f"EMULATED: {', '.join(variant.emulated)}")
        return ", ".join([*parts, self._device.vendor.launches, *self._remarks, *self._device.remarks])

    def close(self) -> None:
        self._device.close()

    def place(self, weight: Tensor) -> matrix.Matrix:
        from pi2_backend_opencl import matrix

        with self._device.errors():
            return matrix.place_matrix(self._device, weight)

    def linear(self, weight: matrix.Matrix, x: F32, out: F32, rows: Ids | None = None) -> None:
        from pi2_backend_opencl import matrix

        n = weight.shape.rows if rows is None else len(rows)
        if n == 0 or len(x) == 0:
            return
        device = self._device
        with device.errors():
            inputs = matrix.send_inputs(device, x, integers=self._integers)
            y = device.scratch("y", 4 * len(x) * n)
            matrix.multiply(device, weight, inputs, rows, y, n)
            result = np.empty((len(x), n), np.float32)
            device.fetch(y, result)
        out[:] = result

    def place_ffn(self, bundles: U8, spec: FfnSpec) -> neurons.Ffn:
        from pi2_backend_opencl import neurons

        if spec.activation not in neurons.ACTIVATIONS:
            raise PluginError(f"opencl has no kernel for {spec.activation}", hint="use another backend")
        with self._device.errors():
            return neurons.place_ffn(self._device, bundles, spec)

    def prepare_ffn(self, ffn: neurons.Ffn, tokens: int, count: int) -> bool:
        """Records the launches of this shape, which is done at once."""
        from pi2_backend_opencl import plans

        if tokens <= plans.MOST_TOKENS:
            with suppress(PluginError), self._device.errors():
                plans.plan_for(self._device, ffn, tokens, count, integers=self._integers)
        return True

    def begin_ffn(self, ffn: neurons.Ffn, x: F32, count: int) -> plans.Ticket:
        from pi2_backend_opencl import plans

        device, tokens = self._device, len(x)
        with device.errors():
            if tokens > plans.MOST_TOKENS:
                return plans.ManyTokens(device, ffn, x, count, integers=self._integers)
            return plans.plan_for(device, ffn, tokens, count, integers=self._integers).begin(x)

    def finish_ffn(self, ticket: plans.Ticket, out: F32) -> FfnDone:
        with self._device.errors():
            return ticket.finish(out)

    def cancel_ffn(self, ticket: plans.Ticket) -> None:
        ticket.cancel()

    def place_attention(self, spec: AttentionSpec) -> attention.Block:
        from pi2_backend_opencl import attention

        with self._device.errors():
            return attention.place_attention(self._device, spec)

    def attention(self, block: attention.Block, x: F32, keys: Kv, values: Kv, start: int, out: F32) -> None:
        """Scores of many tokens on the device, of a single one on the host (pi2.powers.SupportsAttention)."""
        from pi2_backend_opencl.attention import attention

        with self._device.errors():
            attention(self._device, block, x, keys, values, start, out, integers=self._integers)

    def release(self, handle: object) -> None:
        from pi2_backend_opencl import neurons

        if isinstance(handle, neurons.Ffn):
            for plan in handle.plans.values():
                plan.release()
            handle.plans.clear()

    def ffn(self, ffn: neurons.Ffn, x: F32, out: F32, rows: Ids | None = None) -> int:
        from pi2_backend_opencl import neurons

        with self._device.errors():
            return neurons.compute(self._device, ffn, x, out, rows, integers=self._integers)
