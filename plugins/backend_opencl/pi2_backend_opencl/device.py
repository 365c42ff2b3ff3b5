"""One OpenCL device: found by name, its context and queue, and buffers that grow and stay."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyopencl as cl
from numpy.typing import NDArray
from pi2.errors import OptionError, PluginError
from pi2.tensor import U8

from pi2_backend_opencl.caps import Caps, Variant, from_device
from pi2_backend_opencl.programs import Programs
from pi2_backend_opencl.vendors import Vendor, vendor_of
from pi2_backend_opencl.waiting import DEADLINE_S, Waiting, never_free

_FLAGS = cl.mem_flags
_WORDS = cl.ImageFormat(cl.channel_order.RGBA, cl.channel_type.UNSIGNED_INT32)
_INPUTS = cl.ImageFormat(cl.channel_order.RGBA, cl.channel_type.FLOAT)


@dataclass(frozen=True, slots=True)
class Found:
    """A device that the drivers offer."""

    device: Any
    caps: Caps
    fault: str | None = None
    """Why its driver compiles nothing, if so."""

    @property
    def name(self) -> str:
        return f"{self.caps.name} ({self.device.platform.name.strip()})"


def find_devices() -> list[Found]:
    """All devices of all drivers, accelerators first, and what compiles before what does not.

    Empty if there is no driver.
    """
    try:
        platforms = cl.get_platforms()
    except cl.Error:
        return []
    found = []
    for platform in platforms:
        try:
            found += [Found(d, caps := from_device(d), _fault(d, caps)) for d in platform.get_devices()]
        except cl.Error:  # a driver without a device
            continue
    return sorted(found, key=lambda f: (f.fault is not None, f.caps.cpu))


def _fault(device: Any, caps: Caps) -> str | None:
    """What the compiler says to an empty kernel.  Asked of CPUs only: they may be newer than it is."""
    if not caps.cpu:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pyopencl's, of caches that are not wanted here
        program = cl.Program(cl.Context([device]), "kernel void nothing() {}")
        try:
            program.compile()
        except cl.Error as e:
            log = str(program.get_build_info(device, cl.program_build_info.LOG)).strip()
            return (log or str(e)).splitlines()[0]
    return None


def choose_device(name: str | None) -> Found:
    """The first device whose name, or whose driver's, contains ``name``.  Raises PluginError, OptionError."""
    devices = find_devices()
    if not devices:
        raise PluginError(
            "there is no OpenCL device: no driver answers",
            hint="install the GPU's OpenCL driver (its .icd file lies in /etc/OpenCL/vendors)",
        )
    for found in devices:
        if name is None or name.lower() in found.name.lower():
            if found.fault is not None:
                raise PluginError(
                    f"the OpenCL driver of {found.name} compiles nothing: {found.fault}",
                    hint="install a newer driver; pi2 plugins lists what can run",
                )
            return found
    raise OptionError(
        f"no OpenCL device is called {name!r}", hint=f"there are: {', '.join(f.name for f in devices)}"
    )


@contextmanager
def device_errors(name: str) -> Iterator[None]:
    """Turns what a driver raises into one error that says what to do."""
    try:
        yield
    except cl.Error as e:
        if isinstance(e, cl.MemoryError) or "INVALID_BUFFER_SIZE" in str(e):
            raise PluginError(
                f"{name} has no memory left",
                hint="use a smaller model, a shorter context, or another backend",
            ) from None
        first = (str(e).splitlines() or [type(e).__name__])[0]
        raise PluginError(
            f"{name} failed: {first[:200]}", hint="the device may be lost; use --backend cpu"
        ) from None


class Kernels(Protocol):
    """Where kernels come from: ``Programs``, or for a plan its own."""

    def kernel(self, file: str, name: str, variant: Variant, **macros: int) -> Any: ...


class Work(Protocol):
    """What computing an FFN asks of a device, or of a plan that notes it down for later."""

    variant: Variant
    nothing: Any

    @property
    def programs(self) -> Kernels: ...

    def scratch(self, name: str, nbytes: int) -> Any: ...

    def send(self, name: str, data: NDArray[Any]) -> Any: ...

    def run(self, kernel: Any, size: tuple[int, ...], group: tuple[int, ...], *arguments: Any) -> None: ...


class Device:
    """Context, queue, programs and scratch of one device.  Serves one call at a time."""

    def __init__(
        self, found: Found, variant: Variant, cache: Path | None, deadline: float = DEADLINE_S
    ) -> None:
        """``cache``: where kernels are kept; ``deadline``: seconds after which the device counts as lost."""
        self.name, self.caps, self.variant = found.name, found.caps, variant
        self._cl_device = found.device
        self.vendor = self._memory = vendor_of(found.device)
        self.remarks: list[str] = []
        """What runs in a plainer way than it should."""
        with device_errors(self.name):
            self._context = self.vendor.context()
            self.queue = cl.CommandQueue(
                self._context, properties=cl.command_queue_properties.PROFILING_ENABLE
            )
        self._waiting = Waiting(self.name, deadline)
        self.programs = Programs(self._context, found.device, cache)
        self._scratch: dict[str, Any] = {}
        self._lasting: dict[tuple[str, int], Any] = {}
        self.sent: list[Any] = []
        """Events of what is on its way since the last ``settle``; they hold the arrays."""
        self._images: dict[int, Any] = {}
        self.nothing = cl.Buffer(self._context, _FLAGS.READ_WRITE, 64)
        """Stands for a buffer that a kernel does not look at."""

    def errors(self) -> AbstractContextManager[None]:
        """``device_errors`` of this one."""
        return device_errors(self.name)

    def fixed(self, data: NDArray[Any]) -> Any:
        """A read-only buffer with a copy of ``data``, in memory that the device shares if it can."""
        flat = np.ascontiguousarray(data).view(np.uint8).ravel()
        buffer = cl.Buffer(self._context, _FLAGS.READ_ONLY | _FLAGS.ALLOC_HOST_PTR, max(flat.nbytes, 4))
        if flat.nbytes:
            self.put(buffer, flat)
        return buffer

    def shared(self, data: U8) -> Any:
        """A read-only buffer over the caller's own bytes, which must stay: nothing is copied."""
        flags = _FLAGS.READ_ONLY | _FLAGS.USE_HOST_PTR
        return cl.Buffer(self._context, flags, hostbuf=data)

    def words(self, data: U8, kind: int, texels: tuple[int, int]) -> Any:
        """Weights as a buffer (kind 0), or as an image over one: 1 dimension, or ``texels`` (2)."""
        if kind == 2:
            flags = _FLAGS.READ_ONLY | _FLAGS.COPY_HOST_PTR
            return cl.create_image(self._context, flags, _WORDS, shape=texels, hostbuf=data)
        buffer = self.fixed(data)
        if kind == 0:
            return buffer
        return cl.create_image(
            self._context, _FLAGS.READ_ONLY, _WORDS, shape=(data.nbytes // 16,), buffer=buffer
        )

    def scratch(self, name: str, nbytes: int) -> Any:
        """A buffer of at least ``nbytes``, the same at every call until it has to grow."""
        buffer = self._scratch.get(name)
        if buffer is None or buffer.size < nbytes:
            if buffer is not None:
                self._images.pop(buffer.int_ptr, None)
                buffer.release()
            buffer = cl.Buffer(self._context, _FLAGS.READ_WRITE, max(nbytes, 64))
            self._scratch[name] = buffer
        return buffer

    def send(self, name: str, data: NDArray[Any]) -> Any:
        """Scratch that will have ``data`` in it, which must stay as it is until something is fetched."""
        buffer = self.scratch(name, data.nbytes)
        if data.nbytes:
            sent = cl.enqueue_copy(self.queue, buffer, np.ascontiguousarray(data), is_blocking=False)
            self.sent.append(sent)  # holds the array
        return buffer

    def clear(self, buffer: Any, nbytes: int) -> None:
        """Zeros into the buffer's start."""
        cl.enqueue_fill_buffer(self.queue, buffer, np.zeros(1, np.float32), 0, nbytes)

    def fetch(self, buffer: Any, into: NDArray[Any]) -> None:
        """Wait for all that was enqueued, and copy the buffer's start."""
        self.fetch_later(buffer, into)
        self.settle()

    def fetch_later(self, buffer: Any, into: NDArray[Any]) -> Any:
        """The same, without waiting: an event."""
        event = cl.enqueue_copy(self.queue, into, buffer, is_blocking=False)
        self.sent.append(event)
        self.queue.flush()
        return event

    def settle(self) -> None:
        """Wait until what was sent and is fetched has arrived."""
        for event in self.sent:
            self.wait(event)
        self.sent.clear()

    def wait(self, event: Any) -> None:
        """Until a command that was flushed has ended.  Raises PluginError if the device hangs."""
        try:
            self._waiting.wait(event)
        except PluginError:
            never_free(self.sent)
            self.sent.clear()
            raise

    def give_up_recording(self, reason: str) -> None:
        """From now on every kernel is launched by itself."""
        self.remarks.append(f"FELL BACK from {self.vendor.launches}: {reason}")
        self.vendor = Vendor(self._cl_device)

    def lasting(self, name: str, nbytes: int) -> Any:
        """A buffer in memory that the host shares if it can; it stays for whoever asks for the same."""
        key = name, max(nbytes, 64)
        if key not in self._lasting:
            flags = _FLAGS.READ_WRITE | _FLAGS.ALLOC_HOST_PTR
            own = self._memory.shared_memory(self._context, key[1])
            self._lasting[key] = own or cl.Buffer(self._context, flags, key[1])
        return self._lasting[key]

    def put(self, buffer: Any, data: NDArray[Any]) -> Any:
        """Write ``data`` to the start of a buffer that the host shares; the event of its handing over."""
        mapped, event = cl.enqueue_map_buffer(
            self.queue, buffer, cl.map_flags.WRITE, 0, data.shape, data.dtype, is_blocking=False
        )
        self.queue.flush()
        self.wait(event)
        mapped[...] = data
        return mapped.base.release(self.queue)

    def look(self, buffer: Any, nbytes: int) -> tuple[U8, Any]:
        """The start of a ``lasting`` buffer, in place, from the event on until ``unlook``."""
        mapped, event = cl.enqueue_map_buffer(
            self.queue, buffer, cl.map_flags.READ, 0, (nbytes,), np.uint8, is_blocking=False
        )
        self.queue.flush()
        return mapped, event

    def unlook(self, mapped: Any) -> None:
        """Give back what ``look`` gave."""
        mapped.base.release(self.queue)

    def as_inputs(self, buffer: Any) -> Any | None:
        """The buffer as an image of four floats a texel, or None where that cannot be."""
        texels = buffer.size // 16
        if not self.variant.limits.images or texels > self.variant.limits.image_buffer_texels:
            return None
        if buffer.int_ptr not in self._images:
            self._images[buffer.int_ptr] = cl.create_image(
                self._context, _FLAGS.READ_ONLY, _INPUTS, shape=(texels,), buffer=buffer
            )
        return self._images[buffer.int_ptr]

    def run(self, kernel: Any, size: tuple[int, ...], group: tuple[int, ...], *arguments: Any) -> None:
        """Enqueue a kernel; ints are passed as 32 bits."""
        kernel.set_args(*(np.int32(a) if type(a) is int else a for a in arguments))
        cl.enqueue_nd_range_kernel(self.queue, kernel, size, group)

    def close(self) -> None:
        self._images.clear()
        for buffer in self._scratch.values():
            buffer.release()
        self._scratch.clear()
        self._lasting.clear()
        self._memory.close()
        self._waiting.close()
