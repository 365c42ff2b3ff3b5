"""What goes wrong for real: one StorageError with file and offset, and no hang."""

import os
from pathlib import Path

import numpy as np
import pytest
from pi2.errors import StorageError
from pi2.testing.storage import one, read_all
from pi2_storage_ufs import native
from pi2_storage_ufs.tier import UfsTier, uring_error

ENGINES = [name for name in native.ENGINES if name != "uring" or uring_error() == 0]


@pytest.fixture(params=ENGINES)
def tier(request):
    opened = UfsTier.open({"engine": request.param})
    yield opened
    opened.close()


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 64)
    return path


def test_a_device_that_cannot_read_is_an_error_at_its_place(tier):
    """Unmapped memory of this process: the kernel answers with EIO."""
    memory = Path("/proc/self/mem")
    file = tier.open_descriptor(os.open(memory, os.O_RDONLY), 1 << 20, memory)
    with pytest.raises(StorageError, match="the device could not read") as refusal:
        tier.read(file, np.array([[5000, 100], [300, 8]]), np.empty(108, np.uint8))
    assert refusal.value.path == memory
    assert refusal.value.offset == 300
    assert refusal.value.hint


def test_good_memory_is_read_where_the_rest_fails(tier):
    memory, there = Path("/proc/self/mem"), np.arange(8192, dtype=np.uint8)
    file = tier.open_descriptor(os.open(memory, os.O_RDONLY), 1 << 62, memory)
    assert read_all(tier, file, one(there.ctypes.data, 8192)) == there.tobytes()


def test_a_file_shorter_than_it_was_said_to_be_is_never_read_short(tier, path):
    file = tier.open_descriptor(os.open(path, os.O_RDONLY), 1 << 30, path)
    assert read_all(tier, file, one(16000, 384)) == path.read_bytes()[16000:]
    for at, n in ((16000, 385), (16384, 1), (4096, 1 << 20)):
        with pytest.raises(StorageError, match="ends before the read does") as refusal:
            tier.read(file, one(at, n), np.empty(n, np.uint8))
        assert refusal.value.offset >= at


def test_a_closed_descriptor_is_refused(tier, path):
    with pytest.raises(StorageError, match="Bad file descriptor"):
        tier.open_descriptor(1 << 20, 10, path)


def change_in_place(path):
    os.utime(path, ns=(1, 1))


def replace(path):
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.rename(path)


@pytest.mark.parametrize("harm", [change_in_place, replace, Path.unlink, lambda p: os.truncate(p, 5000)])
def test_a_file_that_changed_under_us_is_refused(tier, path, harm):
    file = tier.open_file(path)
    read_all(tier, file, one(0, 100))
    harm(path)
    with pytest.raises(StorageError, match="changed, cut or replaced") as refusal:
        tier.read(file, one(32, 100), np.empty(100, np.uint8))
    assert refusal.value.path == path
    assert refusal.value.offset == 32


def test_what_is_no_file_is_refused_and_never_waited_for(tier, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "missing", Path("/dev/null")):
        with pytest.raises(StorageError) as refusal:
            tier.open_file(path)
        assert refusal.value.path == path


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_system_without_o_direct_is_read_through_the_page_cache_or_refused(engine):
    """procfs has no O_DIRECT; its files say that they have no bytes."""
    mounts = Path("/proc/self/mounts")
    forced = UfsTier.open({"engine": engine})
    if engine == "buffered":
        forced.open_file(mounts)
    else:
        with pytest.raises(StorageError, match="Invalid argument"):
            forced.open_file(mounts)
    forced.close()
    free = UfsTier.open()
    assert "O_DIRECT" not in free.describe()
    free.open_file(mounts)
    assert "buffered for 1 files, whose file system refuses O_DIRECT" in free.describe()
    assert free.counts()["buffered_files"] == 1
    free.close()


def test_a_buffer_too_small_or_read_only_is_refused(tier, path):
    file = tier.open_file(path)
    frozen = np.empty(100, np.uint8)
    frozen.flags.writeable = False
    for into in (np.empty(99, np.uint8), frozen, np.empty(200, np.uint8)[::2]):
        with pytest.raises(StorageError, match="writable") as refusal:
            tier.read(file, one(7, 100), into)
        assert refusal.value.offset == 7


def test_a_read_that_never_ends_meets_its_deadline(path, tmp_path):
    """A modelled device of one byte per second; the memory stays with the tier, and closing does not hang."""
    slow = tmp_path / "slow.yaml"
    slow.write_text("".join(f"{a}_{b}: 1\n" for a in ("random", "sequential") for b in ("small", "large")))
    tier = UfsTier.open({"throttle": str(slow), "deadline": "0.02"})
    file = tier.open_file(path)
    with pytest.raises(StorageError, match=r"no answer within 0\.02 s") as refusal:
        tier.read(file, one(0, 100), np.empty(100, np.uint8))
    assert refusal.value.path == path
    assert refusal.value.hint
    tier.close()
