"""The native cluster pipeline over the native storage tier: neurons stream from a real file."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pi2.errors import StorageError
from pi2.plugins import Plugins
from pi2.powers import FfnPlace, SlotState, SupportsStorageAbi, SupportsStreaming
from pi2.testing.plugin import examples
from pi2.testing.slab import slab_cases
from pi2.testing.strategies import ffn_specs, paged_specs

PLUGINS = Plugins.installed()
HEAD = 8192  # bytes of the file before the first bundle


@pytest.fixture(scope="module", params=["uring", "threads"])
def tier(request):
    chosen = PLUGINS.pick("storage_tiers", "ufs")
    try:
        opened = chosen.open({"engine": request.param, "block": "512"})
    except Exception as error:
        pytest.skip(str(error))
    assert isinstance(opened, SupportsStorageAbi)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def backend():
    opened = PLUGINS.pick("backends", "cpu").open({"threads": "2"})
    assert isinstance(opened, SupportsStreaming)
    yield opened
    opened.close()


def full(backend, case):
    """What a slab that has everything gives."""
    x, out = case.ffn.x, np.empty_like(case.ffn.x)
    slab = backend.place_slab(case.ffn.bundles, len(case.ffn.bundles), case.ffn.spec)
    backend.slab_ffn(slab, case.rows, case.rows, x, out)
    return out


def write(tmp_path_factory, case, nbytes=None):
    path = tmp_path_factory.mktemp("flash") / "neurons"
    data = bytes(HEAD) + case.ffn.bundles.tobytes()
    path.write_bytes(data[:nbytes])
    return path


@examples(40)
@given(
    case=slab_cases(tokens=(1,), specs=ffn_specs() | paged_specs()),
    cluster=st.sampled_from((1, 8, 64)),
    two_phase=st.booleans(),
    overlap=st.booleans(),
    bundled=st.booleans(),
    guess=st.booleans(),
)
def test_neurons_stream_from_a_file(tmp_path_factory, backend, tier, case, cluster, guess, **how):
    place = FfnPlace(0, path := write(tmp_path_factory, case), tier.open_file(path), HEAD)
    slab = case.empty_slab(0)
    states = np.zeros(len(slab), np.uint8)
    handle = backend.place_slab(slab, len(case.ffn.bundles), case.ffn.spec)
    stream = backend.open_stream(handle, states, tier.abi_address(), cluster=cluster, trace=False, **how)
    if guess:
        half = len(case.rows) // 2
        backend.stream_prefetch(stream, place, case.rows[:half], case.slots[:half].copy())
    for round_ in range(2):
        out = np.empty_like(case.ffn.x)
        count = backend.stream_ffn(stream, place, case.rows, case.slots, case.ffn.x, out)
        assert out.tobytes() == full(backend, case).tobytes()
        assert (count.reads == 0) == (round_ == 1 or len(case.rows) == 0)
    backend.close_stream(stream)


@examples(15)
@given(case=slab_cases(tokens=(1,), specs=paged_specs()), two_phase=st.booleans())
def test_a_file_that_was_cut_short_ends_the_call(tmp_path_factory, backend, tier, case, two_phase):
    path = write(tmp_path_factory, case, nbytes=HEAD)
    place = FfnPlace(0, path, tier.open_file(path), HEAD)
    slab = case.empty_slab(0)
    states = np.zeros(len(slab), np.uint8)
    handle = backend.place_slab(slab, len(case.ffn.bundles), case.ffn.spec)
    options = {"two_phase": two_phase, "cluster": 16, "trace": False}
    stream = backend.open_stream(handle, states, tier.abi_address(), **options)
    out = np.empty_like(case.ffn.x)
    if len(case.rows):
        with pytest.raises(StorageError, match="the file ends before the read does") as raised:
            backend.stream_ffn(stream, place, case.rows, case.slots, case.ffn.x, out)
        assert raised.value.path == path
        assert raised.value.offset >= HEAD
    assert np.all(states == SlotState.EMPTY)
    backend.close_stream(stream)
