"""FFNs in the background: what a call needs is made ready once, and a token is three enqueued commands.

A plan is the device's side of one FFN for so many tokens and neurons: kernels with their arguments set,
recorded as one where the driver can, and buffers that the host writes and reads in place.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyopencl as cl
from numpy.typing import NDArray
from pi2.accelerator import FfnDone
from pi2.errors import PluginError
from pi2.tensor import F32, U8

from pi2_backend_opencl import neurons
from pi2_backend_opencl.caps import Variant
from pi2_backend_opencl.device import Device
from pi2_backend_opencl.layout import GROUP
from pi2_backend_opencl.matrix import Inputs, padded, quantise, send_inputs
from pi2_backend_opencl.vendors import Launch, NoExtensionError

MOST_TOKENS = 8
"""More are launched kernel by kernel: there the launches are not what takes time."""
_KEPT = 4  # plans of an FFN: shares between which a plan goes back and forth


class Ticket(ABC):
    """A computation under way: what it ends with, and between which commands it happened."""

    def __init__(self, first: Any, begun: float) -> None:
        self.first, self.begun = first, begun

    def span(self, last: Any) -> tuple[float, float]:
        """Start and end by the host's clock.  The device's own says when, counted from the first command."""
        try:
            clock = self.begun - self.first.profile.queued * 1e-9
            return clock + self.first.profile.end * 1e-9, clock + last.profile.end * 1e-9
        except cl.Error:  # a driver that keeps no times
            return self.begun, time.perf_counter()

    @abstractmethod
    def finish(self, out: F32) -> FfnDone:
        """Wait, and bring the result to ``out`` (tokens, d_model)."""

    @abstractmethod
    def cancel(self) -> None:
        """Wait until nothing of it runs any more, or the device counts as lost."""


@dataclass(slots=True)
class _OwnKernels:
    """``Programs`` whose kernels nobody else sets arguments of."""

    own: Callable[..., Any]

    def kernel(self, file: str, name: str, variant: Variant, **macros: int) -> Any:
        return self.own(file, name, variant, **macros)


class Plan:
    """``neurons.enqueue``, noted down: for ``tokens`` and the first ``count`` neurons of ``ffn``."""

    def __init__(self, device: Device, ffn: neurons.Ffn, tokens: int, count: int, *, integers: bool) -> None:
        self.variant, self.nothing = device.variant, device.nothing
        self.programs = _OwnKernels(device.programs.own_kernel)
        self._device = device
        self._launches: list[Launch] = []
        self._constants: list[Any] = []
        width = -(-ffn.d_model // GROUP) * GROUP
        self._x = device.lasting("x", 4 * tokens * width)
        quantised = None
        if integers and tokens == 1:
            sizes = {"xq": width, "xs": width // 8, "xsum": width // 8}
            quantised = tuple(device.lasting(name, nbytes) for name, nbytes in sizes.items())
        self._quantised = quantised
        inputs = Inputs(tokens, self._x, device.as_inputs(self._x), quantised)
        self._output = neurons.enqueue(self, ffn, inputs, None, count)
        self._recording = None
        try:
            self._recording = device.vendor.record(device.queue, self._launches)
        except NoExtensionError as e:
            device.give_up_recording(str(e))

    def scratch(self, name: str, nbytes: int) -> Any:
        return self._device.lasting(name, nbytes)

    def send(self, name: str, data: NDArray[Any]) -> Any:
        self._constants.append(self._device.fixed(data))
        return self._constants[-1]

    def run(self, kernel: Any, size: tuple[int, ...], group: tuple[int, ...], *arguments: Any) -> None:
        assert all(launch.kernel is not kernel for launch in self._launches), "its arguments would be lost"
        kernel.set_args(*(np.int32(a) if type(a) is int else a for a in arguments))
        self._launches.append(Launch(kernel, size, group))

    def begin(self, x: F32) -> PlannedTicket:
        """Start for ``x`` (tokens, d_model), which is copied."""
        device, begun = self._device, time.perf_counter()
        x = padded(x)
        first = device.put(self._x, x)
        if self._quantised is not None:
            parts: tuple[NDArray[Any], ...] = quantise(x[0])
            for buffer, part in zip(self._quantised, parts, strict=True):
                device.put(buffer, part)
        last = self._play()
        seen, event = device.look(self._output.buffer, self._output.nbytes)
        return PlannedTicket(self, first, begun, last, seen, event)

    def _play(self) -> Any:
        if self._recording is not None:
            try:
                return self._recording.enqueue()
            except NoExtensionError as e:
                self.release()
                self._device.give_up_recording(str(e))
        for launch in self._launches:
            last = cl.enqueue_nd_range_kernel(self._device.queue, launch.kernel, launch.size, launch.group)
        return last

    def release(self) -> None:
        if self._recording is not None:
            self._recording.release()
        self._recording = None


class PlannedTicket(Ticket):
    """Of a plan."""

    def __init__(self, plan: Plan, first: Any, begun: float, last: Any, seen: U8, event: Any) -> None:
        super().__init__(first, begun)
        self._plan, self._last, self._seen, self._event = plan, last, seen, event

    def finish(self, out: F32) -> FfnDone:
        """Wait, and bring the result to ``out`` (tokens, d_model)."""
        try:
            self._plan._device.wait(self._event)
            active = self._plan._output.take(self._seen, out)
        finally:
            self._give_back()
        return FfnDone(active, *self.span(self._last))

    def cancel(self) -> None:
        with suppress(cl.Error, PluginError):
            self._plan._device.wait(self._event)
        self._give_back()

    def _give_back(self) -> None:
        with suppress(cl.Error):
            self._plan._device.unlook(self._seen)


class ManyTokens(Ticket):
    """Of any number of tokens, launched kernel by kernel, some at a time."""

    def __init__(self, device: Device, ffn: neurons.Ffn, x: F32, count: int, *, integers: bool) -> None:
        begun = time.perf_counter()
        self._device = device
        self._parts: list[tuple[slice, neurons.Output, U8]] = []
        for some in neurons.pieces(x):
            inputs = send_inputs(device, x[some], integers=integers)
            first = device.sent[0]
            output = neurons.enqueue(device, ffn, inputs, None, count)
            raw = np.empty(output.nbytes, np.uint8)
            self._last = device.fetch_later(output.buffer, raw)
            self._parts.append((some, output, raw))
        super().__init__(first, begun)

    def finish(self, out: F32) -> FfnDone:
        self._device.settle()
        active = sum(output.take(raw, out[some]) for some, output, raw in self._parts)
        return FfnDone(active, *self.span(self._last))

    def cancel(self) -> None:
        with suppress(cl.Error, PluginError):
            self._device.settle()


def plan_for(device: Device, ffn: neurons.Ffn, tokens: int, count: int, *, integers: bool) -> Plan:
    """The plan of this shape, made now if it is a new one; the oldest goes."""
    key = tokens, count
    if key not in ffn.plans:
        while len(ffn.plans) >= _KEPT:
            ffn.plans.pop(next(iter(ffn.plans))).release()
        ffn.plans[key] = Plan(device, ffn, tokens, count, integers=integers)
    return ffn.plans[key]  # type: ignore[no-any-return]
