"""How ranges become reads: alignment, merging, order, cancelling; and the page cache stays empty."""

import ctypes
import mmap
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pi2.errors import StorageError
from pi2.testing.plugin import examples
from pi2.testing.storage import one
from pi2_storage_ufs import native
from pi2_storage_ufs.tier import UfsTier, uring_error

ENGINES = [name for name in native.ENGINES if name != "uring" or uring_error() == 0]
SIZE = (1 << 22) + 777


@pytest.fixture(scope="module")
def content():
    return np.random.default_rng(5).integers(0, 256, SIZE, dtype=np.uint8)


@pytest.fixture(scope="module")
def path(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("reads") / "weights"
    with path.open("wb") as f:
        f.write(content.tobytes())
        f.flush()
        os.fsync(f.fileno())  # dirty pages cannot leave the page cache
    return path


def aligned(nbytes):
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)


def pages_in_cache(path):
    """How many pages of the file are in the page cache, by mincore."""
    with path.open("rb") as f:
        mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    view = np.frombuffer(mapped, np.uint8)
    resident = np.zeros(-(-SIZE // mmap.PAGESIZE), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (
        ctypes.c_void_p(view.ctypes.data),
        ctypes.c_size_t(SIZE),
        ctypes.c_void_p(resident.ctypes.data),
    )
    assert libc.mincore(*arguments) == 0
    return int((resident & 1).sum())


def forget(path):
    with path.open("rb") as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_page_cache_stays_empty(engine, path, content):
    forget(path)
    if pages_in_cache(path):
        pytest.skip(f"{path.parent} lies in memory: name another place with --basetemp")
    tier = UfsTier.open({"engine": engine})
    into = aligned(SIZE)
    file = tier.open_file(path)
    tier.read(file, one(0, SIZE), into)
    assert np.array_equal(into, content)
    scattered = np.stack((np.arange(0, SIZE - 5000, 50_001), np.full(84, 4999)), axis=1)[:80]
    tier.read(file, scattered, np.empty(80 * 4999, np.uint8))
    tier.close()
    assert pages_in_cache(path) <= 2


def test_the_instrument_sees_the_page_cache(path):
    path.read_bytes()
    assert pages_in_cache(path) == -(-SIZE // mmap.PAGESIZE)


@pytest.mark.parametrize("engine", ENGINES)
@examples(40)
@given(
    starts=st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=30),
    lengths=st.lists(st.integers(0, 300_000), min_size=30, max_size=30),
    merge=st.sampled_from((4096, 65536, 1 << 20)),
    block=st.sampled_from((512, 4096)),
    gap=st.sampled_from((0, 5000, 100_000)),
)
def test_any_ranges_give_the_bytes_of_the_file(engine, path, content, starts, lengths, merge, block, gap):
    options = {"engine": engine, "merge": merge, "block": block, "gap": gap, "depth": 4}
    tier = UfsTier.open({name: str(value) for name, value in options.items()})
    file = tier.open_file(path)
    ranges = np.array([(at, min(n, SIZE - at)) for at, n in zip(starts, lengths, strict=False)], np.int64)
    into = aligned(max(int(ranges[:, 1].sum()), 1))[: ranges[:, 1].sum()]
    tier.read(file, ranges, into)
    assert np.array_equal(into, np.concatenate([content[at : at + n] for at, n in ranges]))
    tier.close()


def counted(options, path, ranges):
    tier = UfsTier.open(options)
    tier.read(
        tier.open_file(path), np.array(ranges, np.int64), np.empty(int(np.sum(ranges, axis=0)[1]), np.uint8)
    )
    counts = tier.counts()
    tier.close()
    return counts


@pytest.mark.parametrize("engine", ENGINES)
def test_reads_that_touch_or_overlap_become_one(engine, path):
    neighbours = [(at, 4096) for at in (8192, 0, 4096, 100, 12288)]
    counts = counted({"engine": engine}, path, neighbours)
    assert (counts["ranges"], counts["reads"], counts["merged"], counts["bytes"]) == (5, 1, 4, 16384)
    counts = counted({"engine": engine, "gap": "4095"}, path, [(0, 4096), (8192, 4096)])
    assert (counts["reads"], counts["merged"]) == (2, 0)
    counts = counted({"engine": engine, "merge": "8192"}, path, neighbours)
    assert (counts["reads"], counts["bytes"]) == (2, 16384)


@pytest.mark.parametrize("engine", ENGINES)
def test_short_reads_that_are_near_become_one_with_what_lies_between(engine, path):
    counts = counted({"engine": engine, "gap": "4096"}, path, [(8192, 100), (0, 4096), (16384, 4096)])
    assert (counts["reads"], counts["merged"], counts["bytes"]) == (2, 1, 8192 + 512 + 4096)
    counts = counted({"engine": engine, "gap": "65536"}, path, [(at, 4096) for at in (0, 8192, 28672, 65536)])
    assert (counts["reads"], counts["bytes"]) == (2, 32768 + 4096)  # no longer than 32 KiB


def test_a_long_read_is_cut_and_a_short_one_widened_to_the_block(path):
    assert counted({"merge": "65536"}, path, [(0, 1 << 20)])["reads"] == 16
    for block in (512, 4096, 16384):
        counts = counted({"block": str(block)}, path, [(70_000, 10)])
        assert counts["bytes"] == max(block, counts["bytes"])
        assert counts["bytes"] % block == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_what_somebody_waits_for_is_read_before_a_guess(engine, path, tmp_path):
    """A modelled device serves one read after the other; the order shows when the guess is not over yet."""
    slow = tmp_path / "slow.yaml"
    slow.write_text(
        "random_small: 100000\nrandom_large: 100000\nsequential_small: 100000\nsequential_large: 100000\n"
    )
    tier = UfsTier.open({"engine": engine, "throttle": str(slow), "depth": "1", "threads": "1"})
    file, room = tier.open_file(path), np.empty((20, 10), np.uint8)
    guesses = [tier.submit(file, one(8192 * i, 10), room[i], 1) for i in range(18)]
    miss = tier.submit(file, one(1 << 20, 10), room[19], 0)
    tier.wait(miss)
    assert not tier.poll(guesses[-1])
    for ticket in reversed(guesses):  # those that have not begun never do
        tier.cancel(ticket)
    assert tier.counts()["reads"] < 10
    tier.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_spent_ticket_is_refused(engine, path):
    tier = UfsTier.open({"engine": engine})
    ticket = tier.submit(tier.open_file(path), one(0, 10), np.empty(10, np.uint8))
    tier.wait(ticket)
    with pytest.raises(StorageError, match="spent"):
        tier.wait(ticket)
    with pytest.raises(StorageError, match="spent"):
        tier.poll(ticket)
    with pytest.raises(StorageError, match="spent"):
        tier.cancel(ticket)
    tier.close()
