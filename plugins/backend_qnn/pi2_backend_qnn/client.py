"""This side of the worker: starts it, talks to it, and notices when it dies or does not answer."""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pi2.memory import rss_bytes

from pi2_backend_qnn.errors import WorkerDied, WorkerTimeout, reason

_ALIGN = 256
_SAID = 20_000  # bytes of the worker's stderr that are kept for an error


@dataclass(frozen=True, slots=True)
class Reply:
    """What a request brought: values, and when it was worked on, in seconds of ``time.perf_counter``."""

    values: Mapping[str, Any]
    start: float
    end: float


class Client:
    """One worker at a time.  Several requests may be under way.

    ``generation`` counts workers: what was made in an earlier one is gone.
    """

    def __init__(self, library: str | None, options: Mapping[str, str], deadline: float) -> None:
        self._hello = {"do": "hello", "library": library, "options": dict(options)}
        self._deadline = deadline
        self._memory = os.memfd_create("pi2-qnn", os.MFD_CLOEXEC)
        self._map: mmap.mmap | None = None
        self._used = 0  # bytes of the shared memory that belong to requests under way
        self._process: subprocess.Popen[bytes] | None = None
        self._asked: set[int] = set()
        self._answered: dict[int, Reply] = {}
        self._unwanted: set[int] = set()
        self._unseen: set[int] = set()
        self._tickets = 0
        self.generation = 0
        self.about: Mapping[str, Any] = {}
        """What the worker said of itself: kind, versions."""

    @property
    def process_id(self) -> int | None:
        """Of the worker, if there is one."""
        return None if self._process is None else self._process.pid

    def resident_bytes(self) -> int:
        """Of the worker's memory."""
        return 0 if self._process is None else rss_bytes(self._process.pid)

    def reuse(self) -> None:
        """Called before a request is put together: what others left in the shared memory may go, if all
        have been answered and the results been seen.
        """
        if not self._asked and not self._unseen:
            self._used = 0

    def now(self) -> float:
        """Seconds on the clock that replies go by."""
        return time.perf_counter()

    def share(self, array: NDArray[Any]) -> dict[str, Any]:
        """Copy ``array`` into the shared memory; the place is good until ``reuse``."""
        where = self.room(array.shape, array.dtype)
        self.view(where)[...] = array
        return where

    def room(self, shape: tuple[int, ...], dtype: Any = np.float32) -> dict[str, Any]:
        """A place in the shared memory that nobody else has."""
        dtype, offset = np.dtype(dtype), self._used
        self._used = offset + -(-max(1, dtype.itemsize * int(np.prod(shape))) // _ALIGN) * _ALIGN
        if self._map is None or self._used > len(self._map):
            size = max(1 << 20, 2 * self._used)
            os.ftruncate(self._memory, size)
            self._map = mmap.mmap(self._memory, size)
        return {"offset": offset, "dtype": dtype.str, "shape": list(shape)}

    def view(self, where: Mapping[str, Any]) -> NDArray[Any]:
        assert self._map is not None
        return np.ndarray(where["shape"], where["dtype"], self._map, where["offset"])

    def call(self, request: Mapping[str, Any]) -> Reply:
        """Ask and wait.  Raises QnnError."""
        return self.wait(self.ask(request))

    def ask(self, request: Mapping[str, Any], *, unseen: bool = False) -> int:
        """Send a request, to be waited for; ``unseen``: its results lie in the shared memory.

        Raises WorkerDied.
        """
        self.start()
        self._tickets += 1
        if unseen:
            self._unseen.add(self._tickets)
        self._asked.add(self._tickets)
        try:
            self._socket.sendall(json.dumps({**request, "ticket": self._tickets}).encode() + b"\n")
        except OSError:
            self._fail(self._died())
        return self._tickets

    def poll(self, ticket: int) -> bool:
        """Whether ``wait`` would return, or raise, at once."""
        while ticket in self._asked and self._heard():
            self._read_one()
        return ticket not in self._asked

    def wait(self, ticket: int) -> Reply:
        """The answer to a request.  Raises QnnError for what QNN refuses, WorkerDied, WorkerTimeout."""
        while ticket in self._asked:
            self._read_one()
        if ticket not in self._answered:
            raise WorkerDied("the process with QNN ended before it answered", hint="try again")
        reply = self._answered.pop(ticket)
        self._unseen.discard(ticket)
        if "error" in reply.values:
            raise reason(reply.values["error"], self._said())
        self._stderr_read = self._stderr_size()
        return reply

    def forget(self, ticket: int) -> None:
        """Nobody will wait for this."""
        self._unseen.discard(ticket)
        self._answered.pop(ticket, None)
        if ticket in self._asked:
            self._unwanted.add(ticket)

    def start(self) -> None:
        """Make sure that there is a worker.  Raises QnnError."""
        if self._process is not None:
            return
        ours, theirs = socket.socketpair()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the worker
        if self._map is None:
            self.room((1,))
        command = [sys.executable, "-m", "pi2_backend_qnn.worker", str(theirs.fileno()), str(self._memory)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._stderr,
            pass_fds=(theirs.fileno(), self._memory), start_new_session=True,
        )  # fmt: skip
        theirs.close()
        self._socket, self._rest, self._stderr_read = ours, b"", 0
        self.generation += 1
        self.about = self.call(self._hello).values

    def close(self) -> None:
        """End the worker.  Safe to call twice."""
        self._end()
        if self._memory >= 0:
            os.close(self._memory)
        self._memory, self._map = -1, None

    def _read_one(self) -> None:
        """Take the next answer in."""
        values = json.loads(self._read_line(self._deadline))
        ticket = values.pop("ticket")
        self._asked.remove(ticket)
        reply = Reply(values, values.pop("start"), values.pop("end"))
        if ticket in self._unwanted:
            self._unwanted.remove(ticket)
        else:
            self._answered[ticket] = reply

    def _heard(self) -> bool:
        """Whether there is something to read, or was read already with an earlier answer."""
        return b"\n" in self._rest or bool(select.select([self._socket], [], [], 0)[0])

    def _read_line(self, deadline: float) -> bytes:
        end = time.monotonic() + deadline
        while b"\n" not in self._rest:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._socket], [], [], left)[0]:
                self._fail(
                    WorkerTimeout(
                        f"the NPU did not answer within {deadline:g} s; its process was ended",
                        hint="the next call starts a new one; more time: --backend qnn:deadline=SECONDS",
                    )
                )
            try:
                part = self._socket.recv(1 << 16)
            except ConnectionError:
                part = b""
            if not part:
                self._fail(self._died())
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _died(self) -> WorkerDied:
        assert self._process is not None
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        lines = [line for line in self._said().splitlines() if line.strip() and "LIBNATIVE" not in line]
        last = f": {lines[-1].strip()[:300]}" if lines else ""
        return WorkerDied(f"the process with QNN ended {how}{last}", hint="the next call starts a new one")

    def _fail(self, error: WorkerDied | WorkerTimeout) -> None:
        self._end()
        raise error

    def _end(self) -> None:
        if self._process is None:
            return
        self._socket.close()
        self._process.kill()
        self._process.wait()
        self._stderr.close()
        self._process = None
        self._asked.clear()
        self._answered.clear()
        self._unwanted.clear()
        self._unseen.clear()

    def _stderr_size(self) -> int:
        return os.fstat(self._stderr.fileno()).st_size

    def _said(self) -> str:
        """What the worker wrote on stderr since the last request that went well."""
        first = max(self._stderr_read, self._stderr_size() - _SAID)
        return os.pread(self._stderr.fileno(), _SAID, first).decode(errors="replace")
