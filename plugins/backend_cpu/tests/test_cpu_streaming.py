"""Streams of the backend cpu: any number of threads, and what the kit cannot know."""

from pathlib import Path

import numpy as np
import pi2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pi2.api import FfnSpec
from pi2.bundle import BundleGeometry
from pi2.errors import PluginError, StorageError
from pi2.powers import SPANS, FfnPlace
from pi2.testing.flash import Flash
from pi2.testing.plugin import examples
from pi2.testing.streaming import Running, stream_cases
from pi2_backend_cpu.backend import CpuBackend

PLUGIN = Path(__file__).parents[1]


def test_the_native_interface_is_a_copy_of_the_core_s():
    core = Path(pi2.__file__).parent / "include" / "pi2_abi.h"
    assert (PLUGIN / "src" / "pi2_abi.h").read_text() == core.read_text()


def test_a_span_is_the_c_structure():
    assert SPANS.itemsize == 32
    assert [SPANS.fields[name][1] for name in ("neurons", "start", "end")] == [12, 16, 24]


@pytest.fixture(scope="module")
def backends():
    opened = [CpuBackend(threads=n) for n in (1, 2, 3, 8)]
    yield opened
    for backend in opened:
        backend.close()


@examples(60)
@given(case=stream_cases(), fails=st.booleans())
def test_a_stream_is_the_same_with_any_number_of_threads(backends, case, fails):
    for backend in backends:
        running = Running(backend, case)
        running.prefetch()
        running.flash.bad[:] = fails
        out, error = running.attempt()
        assert not running.flash.tickets
        if error is None:
            expected, _ = Running(backends[0], case).expected()
            assert out.tobytes() == expected.tobytes()
        else:
            assert fails
        running.check_bytes()
        running.close()


@examples(5)
@given(case=stream_cases())
def test_a_closed_stream_says_so(backends, case):
    running = Running(backends[0], case)
    running.close()
    running.backend.close_stream(running.stream)
    with pytest.raises(PluginError, match="the stream is closed"):
        running.ffn()


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_device_that_hangs_ends_the_stream(backends, prefetch):
    """It may still write somewhere, so that no slot can be used again."""
    geometry = BundleGeometry(64, "f32", "f32", "f32")
    flash = Flash(np.zeros(9 * geometry.stride, np.uint8), np.random.default_rng(0))
    flash.hangs = True
    slab, states = np.zeros((9, geometry.stride), np.uint8), np.zeros(9, np.uint8)
    handle = backends[1].place_slab(slab, 9, FfnSpec(geometry, "relu"))
    options = {"two_phase": False, "cluster": 2, "trace": False}
    stream = backends[1].open_stream(handle, states, flash.abi_address(), **options)
    place, ids, x = (
        FfnPlace(0, Path("neurons"), 0, 0),
        np.arange(9, dtype=np.int32),
        np.ones((1, 64), np.float32),
    )
    if prefetch:
        backends[1].stream_prefetch(stream, place, ids, ids)
        assert backends[1].stream_settle(stream) == 0
    for _ in range(2):
        with pytest.raises(StorageError, match="did not answer in time"):
            backends[1].stream_ffn(stream, place, ids, ids, x, np.empty_like(x))
    with pytest.raises(StorageError, match="did not answer in time"):
        backends[1].stream_prefetch(stream, place, ids, ids)
    assert not states.any()
    backends[1].close_stream(stream)
