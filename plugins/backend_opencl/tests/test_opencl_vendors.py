"""Recordings, hints and shared memory: on a driver that has them, and on one that only pretends to."""

import fcntl
import os

import fake_qualcomm
import numpy as np
import pyopencl as cl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pi2.api import FfnSpec
from pi2.bundle import BundleGeometry
from pi2.testing import reference
from pi2.testing.plugin import examples
from pi2_backend_opencl import caps, device, neurons, plans, trials, vendors
from pi2_backend_opencl.backend import OpenclBackend
from pi2_backend_opencl.qualcomm import Qualcomm

RECORDABLE = "cl_qcom_recordable_queues"


@pytest.fixture(scope="module")
def found():
    if not (probe := OpenclBackend.probe()):
        pytest.skip(probe.reason)
    return device.choose_device(None)


@pytest.fixture(scope="module")
def opened(found, tmp_path_factory):
    return device.Device(found, caps.resolve(found.caps), tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def with_vendor(opened, monkeypatch):
    def use(vendor):
        monkeypatch.setattr(opened, "vendor", vendor)
        monkeypatch.setattr(opened, "remarks", [])
        return opened

    return use


def some_ffn(opened, k=100, d=64):
    rng = np.random.default_rng(k)
    g = BundleGeometry(d, "q4_0", "q8_0", "f16")
    bundles = np.zeros((k, g.stride), np.uint8)
    for name in g.segments():
        g.pack_into(bundles, name, rng.standard_normal((k, d), dtype=np.float32) / 8)
    spec = FfnSpec(g, "relu")
    return neurons.place_ffn(opened, bundles, spec), g.unpack(bundles), spec


def run(opened, count, tokens=1, times=2):
    """Results of a plan, each for other inputs, and what was to come out."""
    ffn, weights, spec = some_ffn(opened)
    plan = plans.Plan(opened, ffn, tokens, count, integers=False)
    for seed in range(times):
        x = np.random.default_rng(seed).standard_normal((tokens, 64), dtype=np.float32)
        got = np.full_like(x, np.nan)
        done = plan.begin(x).finish(got)
        expected = reference.ffn(weights[:count], spec, x, 1e-5)
        assert expected.output.accepts(got)
        assert expected.accepts_count(done.active)
    plan.release()


@examples(20)
@given(count=st.integers(1, 100), tokens=st.integers(1, plans.MOST_TOKENS))
def test_a_plan_computes_the_first_neurons_however_it_is_launched(opened, count, tokens):
    here = opened.vendor
    for vendor in (here, vendors.Vendor(opened.vendor.device)):
        opened.vendor = vendor
        run(opened, count, tokens)
    opened.vendor = here


def test_a_driver_with_command_buffers_uses_them(found, opened):
    claims = "cl_khr_command_buffer" in found.device.extensions
    assert isinstance(opened.vendor, vendors.CommandBuffers) == claims
    assert opened.remarks == []


def test_launches_are_recorded_once_on_a_queue_of_their_own_and_repeated(found, with_vendor):
    vendor, library = fake_qualcomm.pretend(found.device, RECORDABLE)
    run(with_vendor(vendor), 70)
    recording = ["clCreateCommandQueue", "clNewRecordingQCOM", *["clEnqueueNDRangeKernel"] * 4]
    recording += ["clEndRecordingQCOM", "clReleaseCommandQueue"]
    assert library.names() == [*recording, *["clEnqueueRecordingQCOM"] * 2, "clReleaseRecordingQCOM"]
    assert vendor.launches == "recordable queues"


@pytest.mark.parametrize(
    "refuses", ["clCreateCommandQueue", "clNewRecordingQCOM", "clEnqueueNDRangeKernel", "clEndRecordingQCOM",
                "clEnqueueRecordingQCOM"],
)  # fmt: skip
def test_a_driver_that_refuses_to_record_is_used_without_and_that_is_said(found, with_vendor, refuses):
    vendor, library = fake_qualcomm.pretend(found.device, RECORDABLE, fails=(refuses,))
    opened = with_vendor(vendor)
    run(opened, 70)
    assert opened.remarks == [f"FELL BACK from recordable queues: {refuses} says -2"]
    made = library.names().count("clNewRecordingQCOM") - (refuses == "clNewRecordingQCOM")
    assert library.names().count("clReleaseRecordingQCOM") == max(0, made)


def test_recordings_that_compute_something_else_are_given_up(found, with_vendor):
    vendor, _ = fake_qualcomm.pretend(found.device, RECORDABLE, records=1)
    opened = with_vendor(vendor)
    assert trials._background_problems(opened) == []
    assert len(opened.remarks) == 1
    assert "FELL BACK from recordable queues: an FFN in the background is off by" in opened.remarks[0]


def test_functions_that_are_not_there_leave_plain_opencl(found):
    with pytest.raises(vendors.NoExtensionError):
        fake_qualcomm.pretend(found.device, RECORDABLE, missing=("clNewRecordingQCOM",))
    with pytest.raises(vendors.NoExtensionError):
        Qualcomm(type("D", (), {"extensions": RECORDABLE, "platform": found.device.platform}))
    with pytest.raises(vendors.NoExtensionError):
        vendors.Library(found.device.platform).function("clNoSuchFunctionKHR", None)


@pytest.mark.parametrize("fails", [(), ("clCreateContext",)])
def test_the_context_asks_for_full_clock_or_is_plain(found, fails):
    vendor, library = fake_qualcomm.pretend(found.device, "cl_qcom_perf_hint", fails=fails)
    context = vendor.context()
    assert library.names() == ["clCreateContext"]
    assert context.devices == [found.device]
    assert cl.Buffer(context, cl.mem_flags.READ_WRITE, 64).size == 64


@pytest.mark.parametrize("coherent", [True, False])
def test_shared_memory_lies_over_the_heap_of_the_system(found, opened, tmp_path, monkeypatch, coherent):
    heap, asked = tmp_path / "heap", []
    heap.touch()

    def allocate(fd, request, data):
        asked.append((request, int.from_bytes(data[:8], "little"), bytes(data[8:])))
        memory = os.memfd_create("dma-buf")
        os.ftruncate(memory, asked[-1][1])
        data[8:12] = memory.to_bytes(4, "little")

    monkeypatch.setattr(fcntl, "ioctl", allocate)
    claims = "cl_qcom_dmabuf_host_ptr" + " cl_qcom_ext_host_ptr_iocoherent" * coherent
    vendor, library = fake_qualcomm.pretend(found.device, claims, heap=heap)
    buffer = vendor.shared_memory(opened.queue.context, 5000)
    flags = (os.O_RDWR | os.O_CLOEXEC).to_bytes(4, "little")
    assert asked == [(0xC0184800, 8192, bytes(4) + flags + bytes(8))]
    assert (library.host_ptr.type, library.host_ptr.cache) == (0x411D, 0x40A9 if coherent else 0x40A5)
    data = np.arange(1000, dtype=np.float32)
    cl.enqueue_copy(opened.queue, buffer, data)
    fd = library.host_ptr.fd
    seen, event = opened.look(buffer, 4000)
    event.wait()
    assert seen.tobytes() == data.tobytes() == os.pread(fd, 4000, 0)
    opened.unlook(seen)
    buffer.release()
    vendor.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_without_a_heap_memory_is_opencls_own(found, opened, tmp_path):
    vendor, _ = fake_qualcomm.pretend(found.device, "cl_qcom_dmabuf_host_ptr", heap=tmp_path / "none")
    assert vendor.shared_memory(opened.queue.context, 64) is None
    assert vendors.Vendor(found.device).shared_memory(opened.queue.context, 64) is None
