"""What OpenCL leaves to extensions, behind one small interface: recordings, hints, shared memory.

``Vendor`` is a device without any of it.  Everything else goes through ctypes: pyopencl knows none of it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_char_p, c_int32, c_size_t, c_uint32, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyopencl as cl

_MAPS = Path("/proc/self/maps")
Function = Callable[..., Any]


class NoExtensionError(Exception):
    """A function is missing, or a driver refuses what its extension promises."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with its arguments set, and how many work-items there are."""

    kernel: Any
    size: tuple[int, ...]
    group: tuple[int, ...]


class Recording(Protocol):
    """Launches that a driver has seen once and repeats as one."""

    def enqueue(self) -> Any:
        """The event of the last of them."""
        ...

    def release(self) -> None: ...


class Library:
    """Functions of the OpenCL loader that this process has in memory, and of a platform's extensions."""

    def __init__(self, platform: Any) -> None:
        maps = _MAPS.read_text().splitlines() if _MAPS.exists() else []
        found = [line.split()[-1] for line in maps if "libOpenCL" in line]
        self._loader = ctypes.CDLL(found[0] if found else None)
        self._platform = c_void_p(platform.int_ptr)

    def function(self, name: str, result: Any, *arguments: Any) -> Function:
        """Raises NoExtensionError."""
        find = self._loader.clGetExtensionFunctionAddressForPlatform
        find.restype, find.argtypes = c_void_p, (c_void_p, c_char_p)
        address = None if not name.endswith(("KHR", "QCOM")) else find(self._platform, name.encode())
        if address is None:
            try:
                address = ctypes.cast(getattr(self._loader, name), c_void_p).value
            except AttributeError:
                raise NoExtensionError(f"there is no {name}") from None
        return ctypes.CFUNCTYPE(result, *arguments)(address)  # type: ignore[arg-type]


class Vendor:
    """Plain OpenCL: every launch is a call, and memory is the driver's."""

    launches = "single launches"
    """How a token's kernels come to the device."""

    def __init__(self, device: Any) -> None:
        self.device = device

    def context(self) -> Any:
        """A context of the device alone."""
        return cl.Context([self.device])

    def record(self, queue: Any, launches: Sequence[Launch]) -> Recording | None:
        """Have the launches repeated as one from now on; None: they have to be made one by one."""
        return None

    def shared_memory(self, context: Any, nbytes: int) -> Any | None:
        """A buffer that the host can map without copying; None: OpenCL's own is as good."""
        return None

    def close(self) -> None:
        """Give back what belongs to nobody else."""


class CommandBuffers(Vendor):
    """``cl_khr_command_buffer``."""

    launches = "command buffers"

    def __init__(self, device: Any, library: Library | None = None) -> None:
        super().__init__(device)
        find = (library or Library(device.platform)).function
        pointer, words = c_void_p, POINTER(c_size_t)
        self._create = find(
            "clCreateCommandBufferKHR", pointer, c_uint32, POINTER(pointer), pointer, POINTER(c_int32)
        )
        self._launch = find(
            "clCommandNDRangeKernelKHR", c_int32, pointer, pointer, pointer, pointer, c_uint32, words, words,
            words, c_uint32, POINTER(c_uint32), POINTER(c_uint32), pointer,
        )  # fmt: skip
        self._finalize = find("clFinalizeCommandBufferKHR", c_int32, pointer)
        self._enqueue = find(
            "clEnqueueCommandBufferKHR", c_int32, c_uint32, POINTER(pointer), pointer, c_uint32, pointer,
            POINTER(pointer),
        )  # fmt: skip
        self._release = find("clReleaseCommandBufferKHR", c_int32, pointer)

    def record(self, queue: Any, launches: Sequence[Launch]) -> Recording:
        """Each waits for the one before it, by its sync point.  Raises NoExtensionError."""
        queues, code = (c_void_p * 1)(queue.int_ptr), c_int32()
        buffer = self._create(1, queues, None, byref(code))
        check("clCreateCommandBufferKHR", code.value)
        recording = _KhrRecording(self, buffer, queues, [launch.kernel for launch in launches])
        try:
            before = c_uint32()
            for number, launch in enumerate(launches):
                last = c_uint32()
                waits, list_ = (1, byref(before)) if number else (0, None)
                code.value = self._launch(
                    buffer, None, None, launch.kernel.int_ptr, len(launch.size), None, sizes(launch.size),
                    sizes(launch.group), waits, list_, byref(last), None,
                )  # fmt: skip
                check("clCommandNDRangeKernelKHR", code.value)
                before = last
            check("clFinalizeCommandBufferKHR", self._finalize(buffer))
        except NoExtensionError:
            recording.release()
            raise
        return recording

    def enqueue(self, buffer: int, queues: Any) -> Any:
        event = c_void_p()
        check("clEnqueueCommandBufferKHR", self._enqueue(1, queues, buffer, 0, None, byref(event)))
        return cl.Event.from_int_ptr(event.value, retain=False)

    def release(self, buffer: int) -> None:
        self._release(buffer)


@dataclass(slots=True)
class _KhrRecording:
    vendor: CommandBuffers
    buffer: int | None
    queues: Any
    kernels: list[Any]
    """They must live as long as this."""

    def enqueue(self) -> Any:
        assert self.buffer is not None
        return self.vendor.enqueue(self.buffer, self.queues)

    def release(self) -> None:
        if self.buffer is not None:
            self.vendor.release(self.buffer)
        self.buffer = None


def sizes(size: tuple[int, ...]) -> Any:
    """As an array of ``size_t``."""
    return (c_size_t * len(size))(*size)


def check(call: str, code: int) -> None:
    """Raises NoExtensionError unless ``code`` is CL_SUCCESS."""
    if code != 0:
        raise NoExtensionError(f"{call} says {code}")


def vendor_of(device: Any) -> Vendor:
    """The best that the device's extensions claim and its driver has functions for."""
    from pi2_backend_opencl.qualcomm import Qualcomm

    extensions = device.extensions
    candidates: dict[str, type[Vendor]] = {"cl_qcom_": Qualcomm, "cl_khr_command_buffer": CommandBuffers}
    for claim, vendor in candidates.items():
        if claim in extensions:
            try:
                return vendor(device)
            except NoExtensionError:
                continue
    return Vendor(device)
