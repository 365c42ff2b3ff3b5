"""A driver with Qualcomm's extensions: calls are noted, and carried out by the real OpenCL underneath."""

from __future__ import annotations

from ctypes import c_int32, c_size_t, c_uint32, c_uint64, c_void_p, sizeof, string_at
from types import SimpleNamespace

from pi2_backend_opencl.qualcomm import DmabufHostPtr, Qualcomm
from pi2_backend_opencl.vendors import Library, NoExtensionError

RECORDABLE = 1 << 30
DEVICE_NOT_AVAILABLE, INVALID_PROPERTY = -2, -64


class FakeLibrary:  # its functions have OpenCL's names
    """What ``Qualcomm`` asks a ``Library`` for.  ``fails``: functions that answer with an error;
    ``records``: launches that a recording does not forget."""

    def __init__(self, device, *, fails=(), missing=(), records=100):
        self.real = Library(device.platform)
        self.calls: list[tuple] = []
        self.fails, self.missing, self.records = fails, missing, records
        self.recorded: list[tuple] = []
        self.host_ptr: DmabufHostPtr | None = None

    def function(self, name, result, *arguments):
        if name in self.missing:
            raise NoExtensionError(f"there is no {name}")
        own = getattr(self, name, None) or self.real.function(name, result, *arguments)

        def call(*given):
            self.calls.append((name, *given))
            if name in self.fails:
                if result is c_int32:
                    return DEVICE_NOT_AVAILABLE
                given[-1]._obj.value = DEVICE_NOT_AVAILABLE
                return None
            return own(*given)

        return call

    def names(self):
        return [call[0] for call in self.calls]

    def clCreateCommandQueue(self, context, device, properties, code):
        assert properties == RECORDABLE, "recordable, and nothing else"
        return 0xBEEF

    def clReleaseCommandQueue(self, queue):
        assert queue == 0xBEEF
        return 0

    def clNewRecordingQCOM(self, queue, code):
        assert queue == 0xBEEF
        self.recorded = []
        return 0xF00D

    def clEnqueueNDRangeKernel(self, queue, kernel, dimensions, offset, size, group, waits, events, event):
        assert (queue, waits) == (0xBEEF, 0), "a kernel that was not recorded"
        if len(self.recorded) < self.records:
            self.recorded.append((kernel, dimensions, size, group))
        return 0

    def clEndRecordingQCOM(self, recording):
        return 0 if recording == 0xF00D else INVALID_PROPERTY

    def clReleaseRecordingQCOM(self, recording):
        return 0 if recording == 0xF00D else INVALID_PROPERTY

    def clEnqueueRecordingQCOM(self, queue, recording, *rest):
        *changes, _, _, event = rest
        assert recording == 0xF00D
        assert changes == [0, None] * 4
        launch = self.real.function(
            "clEnqueueNDRangeKernel", c_int32, c_void_p, c_void_p, c_uint32, c_void_p, c_void_p, c_void_p,
            c_uint32, c_void_p, c_void_p,
        )  # fmt: skip
        for number, (kernel, dimensions, size, group) in enumerate(self.recorded):
            last = event if number == len(self.recorded) - 1 else None
            code = launch(queue, kernel, dimensions, None, size, group, 0, None, last)
            if code != 0:
                return code
        return 0

    def clGetDeviceInfo(self, device, what, size, value, _):
        value._obj.value = {0x40A0: 64, 0x40A1: 4096}[what]
        return 0

    def clCreateContext(self, properties, count, devices, *rest):
        assert list(properties)[2:] == [0x40C2, 0x40C3, 0]
        real = self.real.function(
            "clCreateContext", c_void_p, c_void_p, c_uint32, c_void_p, c_void_p, c_void_p, c_void_p
        )
        return real(None, count, devices, *rest)

    def clCreateBuffer(self, context, flags, nbytes, pointer, code):
        assert flags == 1 << 0 | 1 << 3 | 1 << 29
        self.host_ptr = DmabufHostPtr.from_buffer_copy(string_at(pointer, sizeof(DmabufHostPtr)))
        real = self.real.function(
            "clCreateBuffer", c_void_p, c_void_p, c_uint64, c_size_t, c_void_p, c_void_p
        )
        return real(context, 1 << 0 | 1 << 3, nbytes, self.host_ptr.address, code)


def pretend(device, claims, **how):
    """``Qualcomm`` on a device that claims these extensions, and the library that it talks to."""
    heap = how.pop("heap", None)
    library = FakeLibrary(device, **how)
    stand_in = SimpleNamespace(extensions=claims, platform=device.platform, int_ptr=device.int_ptr)
    options = {} if heap is None else {"heap": heap}
    vendor = Qualcomm(stand_in, library, **options)
    vendor.device = device
    return vendor, library
