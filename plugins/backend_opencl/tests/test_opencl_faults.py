"""Whatever goes wrong is one clear error, or something plainer that is announced."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pyopencl as cl
import pytest
from pi2.api import FfnSpec
from pi2.bundle import BundleGeometry
from pi2.engine import Engine
from pi2.errors import PluginError
from pi2.hybrid import HybridOptions
from pi2.tensor import Tensor, encode
from pi2.testing.models import write_toy_model
from pi2_backend_opencl import device, plans
from pi2_backend_opencl.backend import OpenclBackend


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    if not (probe := OpenclBackend.probe()):
        pytest.skip(probe.reason)
    return str(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module")
def backend(cache):
    opened = OpenclBackend.open({"cache": cache})
    yield opened
    opened.close()


def ffn_of(backend, k=200, d=64):
    rng = np.random.default_rng(k)
    g = BundleGeometry(d, "q8_0", "q8_0", "q8_0")
    bundles = np.zeros((k, g.stride), np.uint8)
    for name in g.segments():
        g.pack_into(bundles, name, rng.standard_normal((k, d), dtype=np.float32))
    return backend.place_ffn(bundles, FfnSpec(g, "relu"))


def in_background(backend, ffn, x, count=100):
    out = np.full_like(x, np.nan)
    done = backend.finish_ffn(backend.begin_ffn(ffn, x, count), out)
    return out, done.active


def inputs(tokens=1, d=64):
    return np.random.default_rng(3).standard_normal((tokens, d), dtype=np.float32)


def no_device(kind=None):
    raise cl.RuntimeError("clGetDeviceIDs failed: DEVICE_NOT_FOUND")


def test_a_driver_without_a_device_is_no_backend(monkeypatch):
    monkeypatch.setattr(cl, "get_platforms", lambda: [SimpleNamespace(get_devices=no_device, name="none")])
    assert OpenclBackend.probe().score == 0
    assert "none has a device" in OpenclBackend.probe().reason
    with pytest.raises(PluginError, match="no OpenCL device") as refusal:
        OpenclBackend.open()
    assert refusal.value.hint


def test_a_driver_that_refuses_every_build_is_one_clear_error(cache, monkeypatch):
    def refuse(*arguments, **options):
        raise cl.RuntimeError("clBuildProgram failed: BUILD_PROGRAM_FAILURE\nerror: no such instruction")

    monkeypatch.setattr(cl.Program, "build", refuse)
    with pytest.raises(PluginError, match=r"refuses .*no such instruction") as refusal:
        OpenclBackend.open({"cache": ""})
    assert "--backend cpu" in refusal.value.hint


def test_more_memory_than_there_is_is_one_clear_error_and_leaves_the_device_usable(backend):
    opened = backend._device
    with pytest.raises(PluginError, match="no memory left") as refusal, device.device_errors(opened.name):
        opened.lasting("huge", 1 << 50)
    assert "smaller model" in refusal.value.hint
    assert np.isfinite(in_background(backend, ffn_of(backend), inputs())[0]).all()


@pytest.mark.parametrize("tokens", [1, plans.MOST_TOKENS + 1])
def test_a_device_that_is_lost_is_one_clear_error_and_the_next_call_is_tried(backend, monkeypatch, tokens):
    """The driver's own error, of an event that never completes."""
    ffn, x = ffn_of(backend), inputs(tokens)
    before = in_background(backend, ffn, x)
    opened = backend._device

    def lost(*arguments):
        event = cl.UserEvent(opened.queue.context)
        event.set_status(-14)
        event.wait()

    ticket = backend.begin_ffn(ffn, x, 100)
    monkeypatch.setattr(opened._waiting, "wait", lost)
    with pytest.raises(PluginError, match="EXEC_STATUS_ERROR_FOR_EVENTS") as refusal:
        backend.finish_ffn(ticket, np.empty_like(x))
    assert "lost" in refusal.value.hint
    monkeypatch.undo()
    after = in_background(backend, ffn, x)
    assert after[0].tobytes() == before[0].tobytes()
    assert after[1] == before[1]


@contextmanager
def hanging(opened):
    """Nothing that the queue is given from here on begins, until the end."""
    never, patience = cl.UserEvent(opened.queue.context), opened._waiting._deadline
    cl.enqueue_barrier(opened.queue, wait_for=[never])
    opened._waiting._deadline = 0.1
    try:
        yield
    finally:
        opened._waiting._deadline = patience
        never.set_status(cl.command_execution_status.COMPLETE)
        opened.queue.finish()


def linear(backend, weight):
    backend.linear(weight, inputs(2), np.empty((2, weight.shape.rows), np.float32))


@pytest.mark.parametrize("tokens", [1, plans.MOST_TOKENS + 1])
def test_a_device_that_hangs_is_one_clear_error_and_is_used_again_when_it_answers(backend, tokens):
    ffn, x, opened = ffn_of(backend), inputs(tokens), backend._device
    weight = backend.place(Tensor(encode(inputs(70), "f32"), "f32", 64))
    before = in_background(backend, ffn, x)
    out = np.empty_like(x)
    for wait in (
        lambda: backend.finish_ffn(backend.begin_ffn(ffn, x, 100), out),
        lambda: backend.ffn(ffn, x, out),
        lambda: linear(backend, weight),
        lambda: backend.place(Tensor(encode(inputs(70), "f32"), "f32", 64)),
    ):
        with hanging(opened), pytest.raises(PluginError, match=r"hangs: .* for 0\.1 s") as refusal:
            wait()
        assert "lost=cpu" in refusal.value.hint
        after = in_background(backend, ffn, x)
        assert after[0].tobytes() == before[0].tobytes()
        assert after[1] == before[1]


def test_what_is_begun_on_a_device_that_then_hangs_can_be_cancelled(backend):
    ffn, opened = ffn_of(backend), backend._device
    with hanging(opened):  # a plan waits for the device before it begins, many tokens do not
        backend.cancel_ffn(backend.begin_ffn(ffn, inputs(40), 100))
    assert np.isfinite(in_background(backend, ffn, inputs())[0]).all()


HANG = """
import sys
import numpy as np
import pyopencl as cl
from pi2.errors import PluginError
from pi2.tensor import Tensor
from pi2_backend_opencl.backend import OpenclBackend

backend = OpenclBackend.open({"cache": sys.argv[1], "deadline": "20"})
x = np.ones((2, 64), np.float32)
weight, out = backend.place(Tensor(x.view(np.uint8), "f32", 64)), np.empty((2, 2), np.float32)
backend.linear(weight, x, out)
opened = backend._device
endless = "kernel void endless(global volatile int *a) { while (a[0] == 0) ; }"
kernel = cl.Program(opened.queue.context, endless).build(cache_dir=False).endless
opened.clear(opened.scratch("y", 64), 64)
opened.run(kernel, (1,), (1,), opened.scratch("y", 64))
opened._waiting._deadline = 0.5
try:
    backend.linear(weight, x, out)
except PluginError as e:
    print(e)
backend.close()
"""


def test_a_process_whose_kernel_never_ends_says_so_and_ends(cache):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HANG, cache], capture_output=True, text=True, timeout=300,
        check=False, env=os.environ | {"PYOPENCL_NO_CACHE": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "hangs: it has not answered for 0.5 s" in done.stdout


@pytest.mark.parametrize("prompt", [[5], [5, 6, 7]])
@pytest.mark.parametrize("attention", ["cpu", "accelerator"])
def test_the_engine_goes_on_without_a_device_that_hangs(cache, tmp_path, attention, prompt):
    model = write_toy_model(tmp_path / "toy")
    options = {"backend": f"opencl:cache={cache}", "storage": "mmap", "cold": "numpy"}
    shared = {"attention": attention, "prefill": "accelerator", "most": 1.0}
    with Engine.open(model, **options, hybrid=HybridOptions(**shared, lost="cpu")) as engine:
        expected = engine.logits([3, 4, *prompt, 8])
        session, opened = engine.session(), engine._parts["backend"]._device
        got = [session.logits([3]), session.logits([4])]
        with hanging(opened):
            got += [session.logits(prompt), session.logits([8])]
        assert np.abs(np.concatenate(got) - expected).max() < 1e-3
        assert sum("hangs" in note and "CPU computes everything" in note for note in engine.notes) == 1


def test_the_engine_goes_on_without_a_lost_device_if_that_was_asked_for(cache, tmp_path, monkeypatch):
    def failing(self, ticket, out):
        ticket.cancel()
        with device.device_errors("the GPU"):
            raise cl.RuntimeError("clWaitForEvents failed: OUT_OF_RESOURCES")

    model = write_toy_model(tmp_path / "toy")
    options = {"backend": f"opencl:cache={cache}", "storage": "mmap", "cold": "numpy"}
    with Engine.open(model, **options, hybrid=HybridOptions(lost="cpu")) as engine:
        expected = engine.logits([3, 4, 5])
        session = engine.session()
        session.forward([3])
        monkeypatch.setattr(OpenclBackend, "finish_ffn", failing)
        assert np.abs(session.logits([4]) - expected[1]).max() < 1e-3
        assert any(note.startswith("the GPU failed") for note in engine.notes)
    with (
        Engine.open(model, **options, hybrid=HybridOptions()) as engine,
        pytest.raises(PluginError, match="the GPU failed"),
    ):
        engine.session().forward([3])


@pytest.mark.parametrize("limit", [4096, 20000])
@pytest.mark.parametrize("aligned", [False, True])
def test_an_ffn_is_cut_into_shards_that_the_device_can_allocate(backend, cache, tmp_path, limit, aligned):
    """A profile with a tiny limit; aligned bytes are read in place, in shards that begin at a page."""
    profile = tmp_path / "tiny.json"
    profile.write_text(json.dumps({"name": "tiny", "max_allocation": limit, "max_group": 64}))
    tiny = OpenclBackend.open({"cache": cache, "profile": str(profile)})
    rng = np.random.default_rng(5)
    g = BundleGeometry(128, "q4_0", "f16", "q8_0", True)
    assert g.stride == 512
    raw = np.zeros(300 * g.stride + 8192, np.uint8)
    start = -raw.ctypes.data % 4096 + (0 if aligned else 16)
    bundles = raw[start : start + 300 * g.stride].reshape(300, g.stride)
    for name in ("gate", "up", "down"):
        g.pack_into(bundles, name, rng.standard_normal((300, 128), dtype=np.float32))
    spec = FfnSpec(g, "relu")
    ffn, whole = tiny.place_ffn(bundles, spec), backend.place_ffn(bundles, spec)
    assert min(len(ffn.up.shards), len(ffn.down)) > 1
    assert len(whole.up.shards) == 1
    assert (ffn.kept is not None) == aligned
    assert "FELL BACK" not in tiny.describe()
    for shard in ffn.down:
        assert shard.rows * shard.stride <= limit
    for tokens in (1, 5, 40):
        x = inputs(tokens, 128)
        results = [np.empty_like(x) for _ in range(2)]
        for rows in (None, np.arange(0, 300, 7, dtype=np.int32)):
            counts = [b.ffn(f, x, out, rows) for b, f, out in
                      zip((tiny, backend), (ffn, whole), results, strict=True)]  # fmt: skip
            np.testing.assert_allclose(results[0], results[1], rtol=1e-4, atol=1e-3)
            assert counts[0] == counts[1]
        for count in (1, 64, 200, 300):
            hot = [in_background(b, f, x, count) for b, f in ((tiny, ffn), (backend, whole))]
            np.testing.assert_allclose(hot[0][0], hot[1][0], rtol=1e-4, atol=1e-3)
            assert hot[0][1] == hot[1][1]
    tiny.close()
