"""Dense weights of the FFNs in the order that prefill needs them, read ahead in long sequential reads."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np

from pi2.api import StorageTier
from pi2.errors import StorageError
from pi2.memory import aligned_bytes
from pi2.powers import FfnPlace, StreamCount, SupportsAsyncRead
from pi2.tensor import U8

BUFFERS = 3  # one is computed on, two are being read: the device never waits for the next request
_PIECE = 1 << 20  # bytes of one read: long enough for every device, several in flight

_Range = tuple[int, int, int]  # FFN, first neuron, last + 1


class DenseReader:
    """Ranges of bundles one after the other, over all FFNs (PowerInfer-2 §4.1.1: prefill reads in sequence).

    With ``SupportsAsyncRead`` the next ranges are read while the caller computes.
    """

    def __init__(
        self, tier: StorageTier, places: Sequence[FfnPlace], ranges: Sequence[tuple[int, int]], stride: int
    ) -> None:
        self._count = StreamCount()
        self._tier, self._places, self._stride = tier, places, stride
        self._ranges = [(ffn, *ends) for ffn in range(len(places)) for ends in ranges]
        self._per_ffn = len(ranges)
        self._largest = max(last - first for first, last in ranges) * stride
        self._free: list[U8] = []
        self._made = 0
        self._ahead: deque[tuple[_Range, int, U8]] = deque()  # range, ticket, buffer

    @property
    def nbytes(self) -> int:
        """Memory of the buffers, once there are all."""
        return BUFFERS * self._largest

    def bundles(self, ffn: int) -> Iterator[tuple[int, U8]]:
        """(first neuron, bundles (k, stride)) of every range of an FFN; good until the next is asked for.

        Raises StorageError; then, as after any interruption, nothing is being read.
        """
        for at in range(ffn * self._per_ffn, (ffn + 1) * self._per_ffn):
            try:
                buffer = self._take(at)
                yield self._ranges[at][1], self._view(self._ranges[at], buffer)
            except BaseException:
                self.stop()
                raise
            self._free.append(buffer)

    def take_count(self) -> StreamCount:
        """What was read and waited for since the last call."""
        taken, self._count = self._count, StreamCount()
        return taken

    def stop(self) -> None:
        """Cancel what is read ahead, and free the buffers."""
        while self._ahead:
            _, ticket, _ = self._ahead.popleft()
            assert isinstance(self._tier, SupportsAsyncRead)
            with suppress(StorageError):
                self._tier.cancel(ticket)
        self._free.clear()
        self._made = 0

    def _take(self, at: int) -> U8:
        """The buffer that holds range ``at``, after starting the reads that follow."""
        begin = time.perf_counter()
        wanted = self._ranges[at]
        if isinstance(self._tier, SupportsAsyncRead):
            if self._ahead and self._ahead[0][0] != wanted:
                self.stop()
            self._read_ahead(at)
            _, ticket, buffer = self._ahead[0]
            try:
                self._tier.wait(ticket)
            except StorageError:
                self._ahead.popleft()  # its ticket is spent
                raise
            self._ahead.popleft()
        else:
            buffer = self._buffer()
            self._tier.read(self._places[wanted[0]].file, self._pieces(wanted), self._bytes(wanted, buffer))
        self._count.wait_s += time.perf_counter() - begin
        self._count.bytes_read += (wanted[2] - wanted[1]) * self._stride
        self._count.reads += len(self._pieces(wanted))
        return buffer

    def _read_ahead(self, at: int) -> None:
        assert isinstance(self._tier, SupportsAsyncRead)
        for which in self._ranges[at + len(self._ahead) : at + BUFFERS]:
            if not self._free and self._made == BUFFERS:
                return
            buffer = self._buffer()
            file = self._places[which[0]].file
            ticket = self._tier.submit(file, self._pieces(which), self._bytes(which, buffer))
            self._ahead.append((which, ticket, buffer))

    def _buffer(self) -> U8:
        if self._free:
            return self._free.pop()
        self._made += 1
        return aligned_bytes(self._largest)

    def _pieces(self, which: _Range) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        ffn, first, last = which
        starts = np.arange(first * self._stride, last * self._stride, _PIECE, dtype=np.int64)
        ends = np.append(starts[1:], last * self._stride)
        return np.stack((starts + self._places[ffn].offset, ends - starts), axis=1)

    def _bytes(self, which: _Range, buffer: U8) -> U8:
        return buffer[: (which[2] - which[1]) * self._stride]

    def _view(self, which: _Range, buffer: U8) -> U8:
        return self._bytes(which, buffer).reshape(which[2] - which[1], self._stride)
