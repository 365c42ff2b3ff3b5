"""Adreno's extensions: recordable queues, a hint for full clock, buffers over dma-buf memory.

The numbers and signatures are those of Qualcomm's ``cl_ext_qcom.h``; nothing here has met a device yet.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyopencl as cl

from pi2_backend_opencl.vendors import Launch, Library, NoExtensionError, Recording, Vendor, check, sizes

_HEAP = Path("/dev/dma_heap/system")
_HEAP_ALLOC = 0xC0184800  # _IOWR('H', 0, {u64 len; u32 fd; u32 fd_flags; u64 heap_flags})
_RECORDABLE = 1 << 30  # CL_QUEUE_RECORDABLE_QCOM
_CONTEXT_PLATFORM, _PERF_HINT, _PERF_HIGH = 0x1084, 0x40C2, 0x40C3
_READ_WRITE, _USE_HOST_PTR, _EXT_HOST_PTR = 1 << 0, 1 << 3, 1 << 29
_DMABUF, _IOCOHERENT, _WRITEBACK = 0x411D, 0x40A9, 0x40A5
_PADDING, _PAGE_SIZE = 0x40A0, 0x40A1  # of clGetDeviceInfo


class DmabufHostPtr(Structure):
    """``cl_mem_dmabuf_host_ptr``."""

    _fields_ = [("type", c_uint32), ("cache", c_uint32), ("fd", c_int32), ("address", c_void_p)]


class Qualcomm(Vendor):
    """What of it the device claims; ``library`` and ``heap`` stand in for the real ones in tests."""

    def __init__(self, device: Any, library: Library | None = None, heap: Path = _HEAP) -> None:
        super().__init__(device)
        self._extensions = set(device.extensions.split())
        self._library, self._heap = library or Library(device.platform), heap
        self._open: list[tuple[mmap.mmap, int]] = []
        if "cl_qcom_recordable_queues" in self._extensions:
            self._find_recording()
            self.launches = "recordable queues"

    def _find_recording(self) -> None:
        find, pointer, words = self._library.function, c_void_p, POINTER(c_size_t)
        code, many = POINTER(c_int32), (c_size_t, c_void_p)
        self._new_queue = find("clCreateCommandQueue", pointer, pointer, pointer, c_uint64, code)
        self._end_queue = find("clReleaseCommandQueue", c_int32, pointer)
        self._new = find("clNewRecordingQCOM", pointer, pointer, code)
        self._end = find("clEndRecordingQCOM", c_int32, pointer)
        self._release = find("clReleaseRecordingQCOM", c_int32, pointer)
        self._launch = find(
            "clEnqueueNDRangeKernel", c_int32, pointer, pointer, c_uint32, words, words, words, c_uint32,
            pointer, pointer,
        )  # fmt: skip
        self._repeat = find(
            "clEnqueueRecordingQCOM", c_int32, pointer, pointer, *many, *many, *many, *many, c_uint32,
            pointer, POINTER(pointer),
        )  # fmt: skip

    def context(self) -> Any:
        """With the hint for full clock, where the driver takes it."""
        if "cl_qcom_perf_hint" not in self._extensions:
            return super().context()
        platform, device = self.device.platform.int_ptr, (c_void_p * 1)(self.device.int_ptr)
        properties = (c_size_t * 5)(_CONTEXT_PLATFORM, platform, _PERF_HINT, _PERF_HIGH, 0)
        code = c_int32()
        create = self._library.function(
            "clCreateContext", c_void_p, POINTER(c_size_t), c_uint32, POINTER(c_void_p), c_void_p, c_void_p,
            POINTER(c_int32),
        )  # fmt: skip
        context = create(properties, 1, device, None, None, byref(code))
        if code.value != 0:
            return super().context()
        return cl.Context.from_int_ptr(context, retain=False)

    def record(self, queue: Any, launches: Sequence[Launch]) -> Recording | None:
        """On a queue of its own, which runs nothing.  Raises NoExtensionError."""
        if "cl_qcom_recordable_queues" not in self._extensions:
            return None
        code = c_int32()
        context = queue.context.int_ptr
        recorder = self._new_queue(context, self.device.int_ptr, _RECORDABLE, byref(code))
        check("clCreateCommandQueue", code.value)
        try:
            recording = self._new(recorder, byref(code))
            check("clNewRecordingQCOM", code.value)
            recorded = _Recorded(self, recording, queue, [launch.kernel for launch in launches])
            try:
                for launch in launches:
                    of = (None, sizes(launch.size), sizes(launch.group))
                    size = len(launch.size)
                    said = self._launch(recorder, launch.kernel.int_ptr, size, *of, 0, None, None)
                    check("clEnqueueNDRangeKernel", said)
                check("clEndRecordingQCOM", self._end(recording))
            except NoExtensionError:
                recorded.release()
                raise
        finally:
            self._end_queue(recorder)
        return recorded

    def enqueue(self, queue: Any, recording: int) -> Any:
        event = c_void_p()
        nothing = (0, None) * 4  # arguments, offsets, sizes and groups stay as they were recorded
        said = self._repeat(queue.int_ptr, recording, *nothing, 0, None, byref(event))
        check("clEnqueueRecordingQCOM", said)
        return cl.Event.from_int_ptr(event.value, retain=False)

    def release(self, recording: int) -> None:
        self._release(recording)

    def shared_memory(self, context: Any, nbytes: int) -> Any | None:
        """Over memory of the system's dma-buf heap, coherent with the CPU's caches where the device is."""
        if "cl_qcom_dmabuf_host_ptr" not in self._extensions:
            return None
        page = max(self._info(_PAGE_SIZE), mmap.PAGESIZE)
        size = -(-(nbytes + self._info(_PADDING)) // page) * page
        try:
            fd = self._allocate(size)
        except OSError:  # not ours to open
            return None
        memory = mmap.mmap(fd, size)
        self._open.append((memory, fd))
        coherent = "cl_qcom_ext_host_ptr_iocoherent" in self._extensions
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        pointer = DmabufHostPtr(_DMABUF, _IOCOHERENT if coherent else _WRITEBACK, fd, address)
        code = c_int32()
        create = self._library.function(
            "clCreateBuffer", c_void_p, c_void_p, c_uint64, c_size_t, c_void_p, POINTER(c_int32)
        )
        flags = _READ_WRITE | _USE_HOST_PTR | _EXT_HOST_PTR
        buffer = create(context.int_ptr, flags, nbytes, ctypes.addressof(pointer), byref(code))
        return cl.Buffer.from_int_ptr(buffer, retain=False) if code.value == 0 else None

    def _allocate(self, size: int) -> int:
        """A file descriptor of ``size`` bytes of the heap.  Raises OSError."""
        heap = os.open(self._heap, os.O_RDONLY | os.O_CLOEXEC)
        try:
            request = bytearray(size.to_bytes(8, "little") + bytes(4))
            request += (os.O_RDWR | os.O_CLOEXEC).to_bytes(4, "little") + bytes(8)
            fcntl.ioctl(heap, _HEAP_ALLOC, request)
        finally:
            os.close(heap)
        return int.from_bytes(request[8:12], "little")

    def _info(self, what: int) -> int:
        value = c_size_t()
        ask = self._library.function(
            "clGetDeviceInfo", c_int32, c_void_p, c_uint32, c_size_t, c_void_p, c_void_p
        )
        ask(self.device.int_ptr, what, ctypes.sizeof(value), byref(value), None)
        return value.value

    def close(self) -> None:
        for _, fd in self._open:
            os.close(fd)
        self._open.clear()


@dataclass(slots=True)
class _Recorded:
    vendor: Qualcomm
    recording: int | None
    queue: Any
    kernels: list[Any]
    """They must live as long as this."""

    def enqueue(self) -> Any:
        assert self.recording is not None
        return self.vendor.enqueue(self.queue, self.recording)

    def release(self) -> None:
        if self.recording is not None:
            self.vendor.release(self.recording)
        self.recording = None
