"""What native code relies on: reads scattered into many places, pinned threads, and waits that end."""

import ctypes
import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pi2.errors import OptionError, StorageError
from pi2_storage_ufs import native
from pi2_storage_ufs.tier import UfsTier, uring_error

ENGINES = [name for name in native.ENGINES if name != "uring" or uring_error() == 0]
BLOCK = 4096
BLOCKS = 64
FOREVER = -1.0
TASKS = Path("/proc/self/task")
DESCRIPTORS = Path("/proc/self/fd")


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("native") / "weights"
    data = np.random.default_rng(0).integers(0, 256, BLOCKS * BLOCK, np.uint8)
    path.write_bytes(data.tobytes())
    return path, data


def aligned(nbytes: int) -> np.ndarray:
    room = np.zeros(nbytes + BLOCK, np.uint8)
    skip = -room.ctypes.data % BLOCK
    return room[skip : skip + nbytes]


def submit(tier, file, places, priority=0):
    """Reads of (offset, bytes, array) through the C interface; the ticket, or the failure."""
    reads = (native.Read * len(places))(*((at, n, into.ctypes.data) for at, n, into in places))
    failure = native.Failure()
    ticket = tier._abi.submit(tier._abi.self, file, ctypes.addressof(reads), len(places), priority, failure)
    return ticket, failure


def wait(tier, ticket, seconds=FOREVER):
    failure = native.Failure()
    code = tier._abi.wait(tier._abi.self, ticket, seconds, failure)
    return code, failure


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(blocks=st.lists(st.integers(0, BLOCKS - 1), unique=True, min_size=1), seed=st.integers(0, 99))
def test_neighbouring_blocks_are_one_read_into_many_places(engine, content, blocks, seed):
    path, data = content
    tier = UfsTier.open({"engine": engine, "gap": "0"})
    file = tier.open_file(path)
    slots = aligned(BLOCKS * BLOCK).reshape(BLOCKS, BLOCK)
    order = np.random.default_rng(seed).permutation(BLOCKS)[: len(blocks)]
    ticket, _ = submit(tier, file, [(b * BLOCK, BLOCK, slots[s]) for b, s in zip(blocks, order, strict=True)])
    assert wait(tier, ticket)[0] == 0
    for b, s in zip(blocks, order, strict=True):
        assert np.array_equal(slots[s], data[b * BLOCK : (b + 1) * BLOCK])
    runs = 1 + np.count_nonzero(np.diff(np.sort(blocks)) > 1)
    assert tier.counts()["reads"] == runs
    assert np.count_nonzero(slots.any(axis=1)) == len(blocks), "wrote where nobody asked"
    tier.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_its_threads_are_pinned_where_they_are_told_to_be(engine):
    cpu = max(os.sched_getaffinity(0))
    before = set(TASKS.iterdir())
    tier = UfsTier.open({"engine": engine, "cpu": str(cpu)})
    threads = set(TASKS.iterdir()) - before
    tier.read(tier.open_file(Path(__file__)), np.array([[0, 1]]), np.empty(1, np.uint8))  # all have begun
    assert f"pinned to core {cpu}" in tier.describe()
    pinned = [os.sched_getaffinity(int(thread.name)) == {cpu} for thread in threads]
    assert any(pinned)
    assert all(pinned) or engine != "uring"  # of a pool, some may not have run yet
    tier.close()


@pytest.mark.parametrize("cpu", ["-1", "100000"])
def test_a_core_that_is_not_ours_is_refused(cpu):
    with pytest.raises(OptionError, match="not ours") as refusal:
        UfsTier.open({"cpu": cpu})
    assert refusal.value.hint


def test_a_native_wait_for_ever_ends_with_the_deadline(content, tmp_path):
    slow = tmp_path / "slow.yaml"
    slow.write_text("random_small: 1\nrandom_large: 1\nsequential_small: 1\nsequential_large: 1\n")
    tier = UfsTier.open({"throttle": str(slow), "deadline": "0.05"})
    ticket, _ = submit(tier, tier.open_file(content[0]), [(0, BLOCK, aligned(BLOCK))])
    assert wait(tier, ticket, 0.0)[0] == native.PENDING
    code, failure = wait(tier, ticket)
    assert code == failure.code == errno.ETIMEDOUT
    tier.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_guess_is_not_among_what_somebody_waits_for(engine, content, tmp_path):
    """A device serves what it has in any order."""
    slow = tmp_path / "slow.yaml"
    rates = ("random_small", "random_large", "sequential_small", "sequential_large")
    slow.write_text("".join(f"{rate}: 100000\n" for rate in rates))
    tier = UfsTier.open({"throttle": str(slow), "engine": engine})
    file, into = tier.open_file(content[0]), aligned(4 * BLOCK).reshape(4, BLOCK)
    wanted, _ = submit(tier, file, [(0, BLOCK, into[0]), (9 * BLOCK, BLOCK, into[1])])
    guess, _ = submit(tier, file, [(20 * BLOCK, BLOCK, into[2]), (30 * BLOCK, BLOCK, into[3])], priority=1)
    assert wait(tier, wanted, 0.0)[0] == native.PENDING
    assert tier.counts()["reads"] <= 2, "the guess has begun"
    assert wait(tier, wanted)[0] == wait(tier, guess)[0] == 0
    assert tier.counts()["reads"] == 4
    tier.close()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("follow", [0, 1, 5])
def test_reads_that_others_should_have_followed_are_made(engine, content, follow):
    path, data = content
    tier = UfsTier.open({"engine": engine})
    file, into = tier.open_file(path), aligned(8 * BLOCK).reshape(8, BLOCK)
    tickets = [submit(tier, file, [(i * BLOCK, BLOCK, into[i])], native.MORE)[0] for i in range(1 + follow)]
    while (code := wait(tier, tickets[0], 0.0)[0]) == native.PENDING:
        pass
    assert [code, *(wait(tier, ticket)[0] for ticket in tickets[1:])] == [0] * (1 + follow)
    assert np.array_equal(into[: 1 + follow].reshape(-1), data[: (1 + follow) * BLOCK])
    tier.close()


def rings() -> set[int]:
    """Descriptors of this process's io_urings."""
    links = {int(fd.name): fd.is_symlink() and str(fd.readlink()) for fd in DESCRIPTORS.iterdir()}
    return {fd for fd, link in links.items() if link == "anon_inode:[io_uring]"}


@pytest.mark.skipif(uring_error() != 0, reason="this kernel refuses io_uring")
def test_nobody_waits_for_a_broken_ring(content):
    before = rings()
    tier = UfsTier.open({"engine": "uring"})
    (ring,) = rings() - before
    file = tier.open_file(content[0])
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, ring)  # the ring is gone, its number is not
    os.close(null)
    for _ in range(3):
        with pytest.raises(StorageError):
            tier.read(file, np.array([[0, BLOCK]]), aligned(BLOCK))
    tier.close()
