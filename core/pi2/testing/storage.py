"""Conformance tests of storage tiers: files are written behind the tier's back, with plain file I/O."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pi2.api import Ranges, StorageTier
from pi2.errors import StorageError
from pi2.powers import SupportsAsyncRead, SupportsStorageAbi, SupportsView
from pi2.tensor import U8
from pi2.testing.plugin import PluginTests, examples
from pi2.testing.storage_abi import read_through
from pi2.testing.strategies import displaced, ranges

SIZE = 3 * 4096 + 123
"""Bytes of the file: some pages, and an end inside of one, as O_DIRECT dislikes."""

_GUARD = 64
_FILL = 0xA5


def _content() -> bytes:
    return np.random.default_rng(7).integers(0, 256, SIZE, dtype=np.uint8).tobytes()


def read_all(tier: StorageTier, file: int, wanted: Ranges, shift: int = 0) -> bytes:
    """``tier.read`` into a buffer between guards that starts at any byte."""
    total = int(wanted[:, 1].sum())
    room = displaced(np.full(total + 2 * _GUARD, _FILL, np.uint8), shift).view(np.uint8)
    tier.read(file, wanted, room[_GUARD : _GUARD + total])
    assert np.all(room[:_GUARD] == _FILL), "wrote before the buffer"
    assert np.all(room[_GUARD + total :] == _FILL), "wrote behind the buffer"
    return room[_GUARD : _GUARD + total].tobytes()


def one(offset: int, nbytes: int) -> Ranges:
    """A single range."""
    return np.array([[offset, nbytes]], np.int64)


class StorageTierTests(PluginTests):
    """Everything that ``pi2.api.StorageTier`` promises.

    class TestMine(StorageTierTests):
        plugin = MyTier
    """

    plugin: ClassVar[type[StorageTier]]

    @pytest.fixture(scope="class")
    @classmethod
    def tier(cls, runnable: type[StorageTier]) -> Iterator[StorageTier]:
        """One opened tier for all tests of the class."""
        opened = runnable.open(cls.options)
        yield opened
        opened.close()

    @pytest.fixture(scope="class")
    @classmethod
    def directory(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Where the files lie; a subclass may name a directory on the device that it is about."""
        return tmp_path_factory.mktemp("tier")

    @pytest.fixture(scope="class")
    @classmethod
    def path(cls, directory: Path) -> Path:
        """A file of SIZE random bytes."""
        path = directory / "content"
        path.write_bytes(_content())
        return path

    @pytest.fixture(scope="class")
    @classmethod
    def file(cls, tier: StorageTier, path: Path) -> int:
        """The file's handle."""
        return tier.open_file(path)

    @examples(150)
    @given(wanted=ranges(SIZE), shift=st.integers(0, 63))
    def test_it_reads_what_was_written_in_the_order_asked(
        self, tier: StorageTier, file: int, wanted: Ranges, shift: int
    ) -> None:
        content = _content()
        expected = b"".join(content[at : at + n] for at, n in wanted.tolist())
        assert read_all(tier, file, wanted, shift) == expected

    @pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, SIZE])
    def test_it_reads_up_to_the_last_byte(self, tier: StorageTier, file: int, nbytes: int) -> None:
        assert read_all(tier, file, one(SIZE - nbytes, nbytes)) == _content()[SIZE - nbytes :]

    @examples(50)
    @given(at=st.integers(0, SIZE), beyond=st.integers(1, 1 << 40), good=ranges(SIZE))
    def test_a_read_past_the_end_is_refused_whole(
        self, tier: StorageTier, file: int, path: Path, at: int, beyond: int, good: Ranges
    ) -> None:
        """However far the range reaches, and whichever sound ones precede it."""
        # a lie about the length must not need its memory, so the buffer holds the sound ranges only
        into = np.empty(int(good[:, 1].sum()) + min(SIZE - at + beyond, 2 * SIZE), np.uint8)
        with pytest.raises(StorageError) as refusal:
            tier.read(file, np.concatenate((good, one(at, SIZE - at + beyond))), into)
        assert refusal.value.path == path
        assert refusal.value.offset is not None

    @pytest.mark.parametrize("offset", [SIZE + 1, SIZE + 4096, 1 << 62, -1, -SIZE])
    def test_a_read_outside_of_the_file_is_refused(
        self, tier: StorageTier, file: int, path: Path, offset: int
    ) -> None:
        with pytest.raises(StorageError) as refusal:
            tier.read(file, one(offset, 1), np.empty(1, np.uint8))
        assert refusal.value.path == path
        assert refusal.value.offset is not None

    def test_a_missing_file_is_refused_by_name(self, tier: StorageTier, directory: Path) -> None:
        with pytest.raises(StorageError) as refusal:
            tier.open_file(directory / "missing")
        assert refusal.value.path == directory / "missing"

    def test_a_directory_is_refused_by_name(self, tier: StorageTier, directory: Path) -> None:
        with pytest.raises(StorageError) as refusal:
            tier.open_file(directory)
        assert refusal.value.path == directory

    def test_an_empty_file_can_be_opened_but_not_read(self, tier: StorageTier, directory: Path) -> None:
        (directory / "empty").touch()
        file = tier.open_file(directory / "empty")
        assert read_all(tier, file, np.empty((0, 2), np.int64)) == b""
        with pytest.raises(StorageError):
            tier.read(file, one(0, 1), np.empty(1, np.uint8))

    def test_a_file_that_shrank_while_it_was_open_is_never_read_short(
        self, tier: StorageTier, directory: Path
    ) -> None:
        path = directory / "shrinking"
        path.write_bytes(_content())
        file = tier.open_file(path)
        with path.open("r+b") as writer:
            writer.truncate(5000)
        with suppress(StorageError):  # what is left may be read, or refused because the file has changed
            assert read_all(tier, file, one(4000, 1000)) == _content()[4000:5000]
        with pytest.raises(StorageError) as refusal:
            tier.read(file, one(4500, 1000), np.empty(1000, np.uint8))
        assert refusal.value.path == path
        assert refusal.value.offset is not None

    def test_files_are_told_apart(self, tier: StorageTier, directory: Path) -> None:
        files = []
        for value in range(5):
            (directory / f"of_{value}").write_bytes(bytes([value]) * 100)
            files.append(tier.open_file(directory / f"of_{value}"))
        for value in (3, 0, 4, 1, 2, 0):
            assert read_all(tier, files[value], one(10, 50)) == bytes([value]) * 50

    def test_reads_from_several_threads_do_not_disturb_each_other(self, tier: StorageTier, file: int) -> None:
        content, rng = _content(), np.random.default_rng(3)
        starts = rng.integers(0, SIZE - 600, (200, 5))
        jobs = [np.stack((at, rng.integers(0, 600, 5)), axis=1) for at in starts]
        usual = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)  # threads take turns every few bytecodes, not every 5 ms
        try:
            with ThreadPoolExecutor(4) as pool:
                got = list(pool.map(lambda wanted: read_all(tier, file, wanted), jobs))
        finally:
            sys.setswitchinterval(usual)
        for wanted, data in zip(jobs, got, strict=True):
            assert data == b"".join(content[at : at + n] for at, n in wanted.tolist())

    @examples(50)
    @given(wanted=ranges(SIZE))
    def test_a_view_agrees_with_a_read_and_cannot_be_written(
        self, tier: StorageTier, file: int, wanted: Ranges
    ) -> None:
        viewer = _viewer(tier)
        for at, n in wanted.tolist():
            view = viewer.view(file, at, n)
            assert view.tobytes() == read_all(tier, file, one(at, n))
            assert not view.flags.writeable

    def test_a_view_past_the_end_is_refused(self, tier: StorageTier, file: int, path: Path) -> None:
        with pytest.raises(StorageError) as refusal:
            _viewer(tier).view(file, SIZE - 1, 2)
        assert refusal.value.path == path
        assert refusal.value.offset is not None

    @examples(60)
    @given(data=st.data())
    def test_reads_in_flight_end_as_plain_reads_do(
        self, tier: StorageTier, file: int, data: st.DataObject
    ) -> None:
        """Submitted, polled, waited for and cancelled in any order, at any priority."""
        reader, flying, given_back = _async(tier), dict[int, tuple[Ranges, U8]](), list[U8]()
        for _ in range(data.draw(st.integers(1, 12))):
            action = data.draw(st.sampled_from(("submit", "submit", "poll", "wait", "cancel")))
            if action == "submit" or not flying:
                wanted = data.draw(ranges(SIZE))
                into = np.full(int(wanted[:, 1].sum()), _FILL, np.uint8)
                ticket = reader.submit(file, wanted, into, data.draw(st.integers(0, 1)))
                assert ticket not in flying
                flying[ticket] = wanted, into
                continue
            ticket = data.draw(st.sampled_from(sorted(flying)))
            if action == "poll":
                reader.poll(ticket)
                continue
            wanted, into = flying.pop(ticket)
            getattr(reader, action)(ticket)
            if action == "wait":
                assert into.tobytes() == read_all(tier, file, wanted)
            into[:] = _FILL
            given_back.append(into)
        for ticket, (wanted, into) in flying.items():
            reader.wait(ticket)
            assert into.tobytes() == read_all(tier, file, wanted)
        assert all(np.all(into == _FILL) for into in given_back), "wrote after the read was over"

    def test_a_read_in_flight_can_be_polled_to_its_end(self, tier: StorageTier, file: int) -> None:
        reader, into = _async(tier), np.empty(SIZE, np.uint8)
        ticket = reader.submit(file, one(0, SIZE), into, 1)
        while not reader.poll(ticket):
            pass
        reader.wait(ticket)
        assert into.tobytes() == _content()

    def test_a_read_in_flight_past_the_end_is_refused(self, tier: StorageTier, file: int, path: Path) -> None:
        reader, into = _async(tier), np.empty(SIZE + 1, np.uint8)
        with pytest.raises(StorageError) as refusal:
            reader.wait(reader.submit(file, one(0, SIZE + 1), into))
        assert refusal.value.path == path
        assert refusal.value.offset is not None

    @examples(50)
    @given(wanted=ranges(SIZE), priority=st.integers(0, 1))
    def test_native_code_reads_the_same_bytes(
        self, tier: StorageTier, file: int, wanted: Ranges, priority: int
    ) -> None:
        if not isinstance(tier, SupportsStorageAbi):
            pytest.skip(f"{tier.name} has no C ABI (an optional power, pi2.powers.SupportsStorageAbi)")
        into = np.full(int(wanted[:, 1].sum()), _FILL, np.uint8)
        assert read_through(tier.abi_address(), file, wanted, into, priority) == 0
        assert into.tobytes() == read_all(tier, file, wanted)

    def test_native_code_is_refused_by_number(self, tier: StorageTier, file: int) -> None:
        if not isinstance(tier, SupportsStorageAbi):
            pytest.skip(f"{tier.name} has no C ABI (an optional power, pi2.powers.SupportsStorageAbi)")
        into, address = np.full(16, _FILL, np.uint8), tier.abi_address()
        assert read_through(address, file, one(SIZE - 15, 16), into, 0) > 0
        assert read_through(address, file, one(-1, 1), into, 0) > 0
        assert read_through(address, 1 << 40, one(0, 1), into, 0) > 0
        assert np.all(into == _FILL)


def _viewer(tier: StorageTier) -> SupportsView:
    if not isinstance(tier, SupportsView):
        pytest.skip(f"{tier.name} has no views (an optional power, pi2.powers.SupportsView)")
    return tier


def _async(tier: StorageTier) -> SupportsAsyncRead:
    if not isinstance(tier, SupportsAsyncRead):
        pytest.skip(f"{tier.name} only reads at once (an optional power, pi2.powers.SupportsAsyncRead)")
    return tier
