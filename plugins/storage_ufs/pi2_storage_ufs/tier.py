"""The storage tier ``ufs``: checks what it is asked, and passes addresses to the native reader."""

from __future__ import annotations

import ctypes
import errno
import math
import os
from contextlib import suppress
from ctypes import byref
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray
from pi2.api import Probe, Ranges, StorageTier
from pi2.errors import OptionError, PluginError, StorageError
from pi2.tensor import U8

from pi2_storage_ufs import native
from pi2_storage_ufs.device import load_device

_MISSING = "the reader is missing: this wheel was built without a C++ compiler"
_HINT = "install g++ or clang, then: python3 -m pip install --force-reinstall --no-deps ./plugins/storage_ufs"
_READ = np.dtype([("offset", np.int64), ("nbytes", np.int64), ("into", np.uint64)])  # pi2_storage_read
_SAYS = {
    errno.ENODATA: ("the file ends before the read does", "the file was cut short; convert the model again"),
    errno.ESTALE: ("the file was changed, cut or replaced while it was open", "run again"),
    errno.EINVAL: ("this is no place in a file", None),
    errno.ECANCELED: ("the read was cancelled", None),
    errno.EIO: ("the device could not read", "look into the system's log: the device may be failing"),
}
_SCORE = 5  # below the mmap tier: while a whole model is resident, the page cache is the better place for it


class UfsTier(StorageTier):
    """Reads past the page cache, many at a time; has ``SupportsAsyncRead`` and ``SupportsStorageAbi``.

    ``engine`` "uring" (one thread submits and reaps), "threads" or "buffered" forces a way to read; the
    default is the first that there is.  ``depth`` reads are in flight, or ``threads`` of a pool read.
    ``block``: least read in bytes, or what the device needs; ``merge``: reads that touch become one of up
    to so many bytes; ``gap``: short ones become one if no more than so many bytes lie between them.
    ``deadline``: seconds after which a read counts as lost.  ``throttle``: a flash device to pretend.
    ``cpu``: the core that the reading threads are pinned to.
    """

    name = "ufs"

    @classmethod
    def probe(cls) -> Probe:
        if native.library() is None:
            return Probe(0, _MISSING)
        return Probe(_SCORE, f"direct asynchronous reads; {_engine_here()[1]}")

    def __init__(
        self,
        engine: str | None = None,
        depth: int = 128,
        threads: int = 4,
        block: int = 512,
        merge: int = 1 << 20,
        gap: int = 1 << 14,
        deadline: float = 30.0,
        throttle: str | None = None,
        cpu: int | None = None,
    ) -> None:
        lib = native.library()
        if lib is None:
            raise PluginError(_MISSING, hint=_HINT)
        if engine is not None and engine not in native.ENGINES:
            raise OptionError(f"there is no engine {engine!r}", hint=f"one of {', '.join(native.ENGINES)}")
        _check_options(depth, threads, block, merge, deadline)
        if not 0 <= gap <= 1 << 30:
            raise OptionError(f"a gap of {gap} bytes cannot be", hint="0 to 1073741824")
        if cpu is not None and cpu not in (ours := os.sched_getaffinity(0)):
            raise OptionError(f"core {cpu} is not ours", hint=f"ours: {', '.join(map(str, sorted(ours)))}")
        self._throttle = throttle
        device = load_device(throttle).native() if throttle else None
        self._engine, self._why = (engine, "as asked") if engine else _engine_here()
        self._lib, self._deadline = lib, deadline
        self._depth, self._threads, self._block, self._cpu = depth, threads, block, cpu
        must_be_direct = engine is not None and engine != "buffered"
        options = native.Options(
            native.ENGINES[self._engine], depth, threads, must_be_direct,
            -1 if cpu is None else cpu, block, merge, gap, deadline,
            ctypes.pointer(device) if device else None,
        )  # fmt: skip
        error = ctypes.c_int32()
        self._ufs: int | None = lib.pi2_ufs_open(byref(options), byref(error))
        if self._ufs is None:
            raise PluginError(
                f"the kernel refuses io_uring: {os.strerror(error.value)}",
                hint="leave engine= away, or use engine=threads",
            )
        self._abi = lib.pi2_ufs_abi(self._ufs).contents
        self._paths: dict[int, Path] = {}
        self._results: dict[int, native.Failure] = {}  # of tickets that are over, and not waited for yet
        self._tickets: dict[int, tuple[int, U8]] = {}  # file, and the memory that is written to

    def describe(self) -> str:
        """Engine, why it, what the file systems allowed, and what is pretended."""
        shape = f"depth {self._depth}" if self._engine == "uring" else f"{self._threads} threads"
        parts = [f"{self._engine} ({self._why})", shape, f"blocks of {self._block} bytes"]
        if self._cpu is not None:
            parts.append(f"pinned to core {self._cpu}")
        if self._ufs is not None:
            counts = self.counts()
            if counts["registered_buffers"]:
                parts.append("registered buffers")
            if counts["buffered_files"] and self._engine != "buffered":
                parts.append(
                    f"buffered for {counts['buffered_files']} files, whose file system refuses O_DIRECT"
                )
        if self._throttle:
            parts.append(f"SIMULATION: throttled to the flash model {self._throttle}")
        return ", ".join(parts)

    def counts(self) -> dict[str, int]:
        """Since the tier was opened: ranges asked, reads sent, reads saved by merging, bytes read, files."""
        counts = native.Counts()
        self._lib.pi2_ufs_count(self._open(), byref(counts))
        return {field[0]: int(getattr(counts, field[0])) for field in native.Counts._fields_}

    def open_file(self, path: Path) -> int:
        if "\0" in str(path):
            raise StorageError("no file has such a name", path=path)
        return self._opened(path, self._lib.pi2_ufs_open_file(self._open(), os.fsencode(path)))

    def open_descriptor(self, descriptor: int, size: int, path: Path) -> int:
        """Take over a descriptor of something with ``size`` bytes; ``path`` names it in errors."""
        return self._opened(path, self._lib.pi2_ufs_open_descriptor(self._open(), descriptor, size))

    def _opened(self, path: Path, file: int) -> int:
        if file < 0:
            raise StorageError(os.strerror(-file), path=path)
        self._paths[file] = path
        return file

    def read(self, file: int, ranges: Ranges, into: U8) -> None:
        self.wait(self.submit(file, ranges, into))

    def submit(self, file: int, ranges: Ranges, into: U8, priority: int = 0) -> int:
        """Start reading and return a ticket (api.SupportsAsyncRead)."""
        self._open()
        failure = native.Failure()
        reads = _addressed(ranges, into, self._paths[file])
        ticket: int = self._abi.submit(
            self._abi.self, file, reads.ctypes.data, len(reads), priority, byref(failure)
        )
        if ticket == 0:
            self._fail(file, failure)
        self._tickets[ticket] = file, into
        return ticket

    def poll(self, ticket: int) -> bool:
        """Whether ``wait`` would not wait (api.SupportsAsyncRead)."""
        self._owner(ticket)
        return ticket in self._results or self._settle(ticket, 0.0)

    def wait(self, ticket: int) -> None:
        """Until every byte is there (api.SupportsAsyncRead)."""
        file = self._owner(ticket)
        if ticket not in self._results and not self._settle(ticket, self._deadline):
            self._abi.cancel(
                self._abi.self, ticket
            )  # its memory stays ours: the kernel may still write there
            raise StorageError(
                f"no answer within {self._deadline:g} s", path=self._paths[file],
                hint="the device hangs; a longer wait: --storage ufs:deadline=SECONDS",
            )  # fmt: skip
        failure = self._results.pop(ticket)
        del self._tickets[ticket]
        if failure.code != 0:
            self._fail(file, failure)

    def cancel(self, ticket: int) -> None:
        """Give up a read; returns when its memory is written to no more (api.SupportsAsyncRead)."""
        self._owner(ticket)
        self._abi.cancel(self._abi.self, ticket)
        with suppress(StorageError):
            self.wait(ticket)

    def _owner(self, ticket: int) -> int:
        """The file that a ticket in flight reads from."""
        try:
            return self._tickets[ticket][0]
        except KeyError:
            raise StorageError(
                f"ticket {ticket} is spent, or of another tier", path=Path(self.name)
            ) from None

    def _settle(self, ticket: int, seconds: float) -> bool:
        """Whether the reads are over; if so, ``_results`` has how they ended."""
        failure = native.Failure()
        over: bool = self._abi.wait(self._abi.self, ticket, seconds, byref(failure)) != native.PENDING
        if over:
            self._results[ticket] = failure
        return over

    def _open(self) -> int:
        """The native reader."""
        if self._ufs is None:
            raise PluginError("the ufs tier is closed", hint="open it again")
        return self._ufs

    def abi_address(self) -> int:
        """Where the ``pi2_storage_abi`` of this tier is (api.SupportsStorageAbi)."""
        self._open()
        return ctypes.addressof(self._abi)

    def close(self) -> None:
        if self._ufs is not None:
            self._lib.pi2_ufs_close(self._ufs)
        self._ufs = None
        self._paths.clear()
        self._tickets.clear()
        self._results.clear()

    def _fail(self, file: int, failure: native.Failure) -> NoReturn:
        says, hint = _SAYS.get(failure.code, (os.strerror(failure.code), None))
        offset = failure.offset if failure.offset != -1 or failure.code == errno.EINVAL else None
        raise StorageError(says, path=self._paths[file], offset=offset, hint=hint)


def uring_error() -> int:
    """0, or the errno with which this kernel, or an installation without the library, refuses io_uring."""
    lib = native.library()
    return errno.ENOSYS if lib is None else int(lib.pi2_ufs_uring())


def _engine_here() -> tuple[str, str]:
    """The best engine that there is, and why it is this one."""
    if (error := uring_error()) == 0:
        return "uring", "the kernel has io_uring"
    return "threads", f"the kernel refuses io_uring: {os.strerror(error)}"


def _check_options(depth: int, threads: int, block: int, merge: int, deadline: float) -> None:
    if not 1 <= depth <= 4096 or not 1 <= threads <= 256:
        raise OptionError(
            f"depth {depth} with {threads} threads cannot be", hint="depth 1-4096, threads 1-256"
        )
    if not 512 <= block <= 1 << 20 or block & (block - 1):
        raise OptionError(f"a block of {block} bytes cannot be", hint="a power of two from 512 to 1048576")
    if not block <= merge <= 1 << 30 or merge % block:
        raise OptionError(f"merging up to {merge} bytes cannot be", hint="blocks, up to 1073741824 bytes")
    if not 0 < deadline < math.inf:
        raise OptionError(f"a deadline of {deadline} seconds cannot be", hint="some positive number")


def _addressed(ranges: Ranges, into: U8, path: Path) -> NDArray[np.void]:
    """Ranges -> what the library takes; ``into`` (sum of lengths) is filled from its start on."""
    reads = np.empty(len(ranges), _READ)
    reads["offset"], reads["nbytes"] = ranges[:, 0], ranges[:, 1]
    lengths = ranges[:, 1].tolist()
    room, at = into.nbytes, into.ctypes.data
    if not (into.flags.c_contiguous and into.flags.writeable) or sum(max(n, 0) for n in lengths) > room:
        raise StorageError(
            f"{sum(lengths)} bytes wanted, into {room} writable ones", path=path, offset=int(ranges[0, 0]),
            hint="the model's sizes and its files disagree; convert it again",
        )  # fmt: skip
    reads["into"] = at + np.cumsum([0, *lengths[:-1]], dtype=np.int64)[: len(reads)].astype(np.uint64)
    return reads
