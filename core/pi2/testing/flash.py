"""A slow, disorderly and unreliable flash in memory, behind the native interface of storage tiers."""

from __future__ import annotations

import ctypes
import errno
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator

from pi2.tensor import U8
from pi2.testing.storage_abi import Failure, StorageAbi

PENDING = -1


@dataclass(slots=True)
class _Ticket:
    reads: list[tuple[int, int, int]]  # offset, length, address
    looks: int
    """``wait`` says so many times that it is still reading."""
    cancelled: bool = False


class Flash:
    """One file, ``data`` (n,).  Reads take up to ``patience`` looks each, so that they end in any order.

    A read that touches a byte of ``bad`` (a mask like ``data``) fails with EIO.  Memory that belongs to a
    read is overwritten with ones until the read is over, so that nobody uses it before.
    """

    def __init__(self, data: U8, rng: Generator, patience: int = 0) -> None:
        self.data, self.bad = data, np.zeros(len(data), bool)
        self.tickets: dict[int, _Ticket] = {}
        """In flight."""
        self.bytes_read = 0
        self.hangs = False
        """No read ever ends; a wait without limit gives up at once."""
        self._rng, self._patience, self._last = rng, patience, 0
        kinds: list[Any] = [field[1] for field in StorageAbi._fields_[-3:]]
        methods = (self._submit, self._wait, self._cancel)
        self._calls = [kind(method) for kind, method in zip(kinds, methods, strict=True)]  # kept alive
        self._abi = StorageAbi(1, ctypes.sizeof(StorageAbi), None, *self._calls)

    def abi_address(self) -> int:
        """As ``pi2.powers.SupportsStorageAbi``."""
        return ctypes.addressof(self._abi)

    def claim_version(self, version: int) -> None:
        """Pretend to be built for another version of the interface."""
        self._abi.version = version

    def _submit(self, _self: Any, file: int, reads: Any, n: int, priority: int, failure: Any) -> int:
        ranges = [(reads[i].offset, reads[i].nbytes, reads[i].into) for i in range(n)]
        for offset, nbytes, _ in ranges:
            if offset < 0 or offset + nbytes > len(self.data) or file != 0:
                failure[0].code, failure[0].offset = errno.ENODATA, offset
                return 0
        for _, nbytes, into in ranges:
            ctypes.memset(into, 255, nbytes)
        self._last += 1
        self.tickets[self._last] = _Ticket(ranges, int(self._rng.integers(self._patience + 1)))
        return self._last

    def _wait(self, _self: Any, ticket: int, seconds: float, failure: Any) -> int:
        if self.hangs:
            failure[0].code = errno.ETIMEDOUT
            return PENDING if seconds >= 0 else errno.ETIMEDOUT
        flight = self.tickets[ticket]
        flight.looks -= 1
        if flight.looks >= 0 and seconds >= 0 and not flight.cancelled:
            return PENDING
        del self.tickets[ticket]
        result = Failure(*self._read(flight))
        failure[0].code, failure[0].offset = result.code, result.offset
        return int(result.code)

    def _read(self, flight: _Ticket) -> tuple[int, int]:
        if flight.cancelled:
            return errno.ECANCELED, -1
        for offset, nbytes, into in flight.reads:
            if self.bad[offset : offset + nbytes].any():
                return errno.EIO, offset
            ctypes.memmove(into, self.data[offset:].ctypes.data, nbytes)
            self.bytes_read += nbytes
        return 0, -1

    def _cancel(self, _self: Any, ticket: int) -> None:
        self.tickets[ticket].cancelled = True
