"""The one place of the project with Python threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue


def run_together(tasks: Sequence[Callable[[], None]]) -> None:
    """Run the tasks at the same time and return when all have ended; a single one runs in this thread.

    The first exception of a task is raised here, after the others have ended: a task that can fail must
    have a way to tell the others to stop.
    """
    if len(tasks) == 1:
        tasks[0]()
        return
    failures: list[BaseException] = []

    def guarded(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as e:  # handed over to the caller's thread
            failures.append(e)

    threads = [threading.Thread(target=guarded, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def lock() -> threading.Lock:
    """A lock for what tasks of :func:`run_together` share."""
    return threading.Lock()


_SOON_S = 0.1


class Deputy:
    """A thread that waits in its caller's place, for what has no deadline of its own."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._done = threading.Lock()
        self._done.acquire()
        self._thread: threading.Thread | None = None
        self._waits = self._gave_up = False

    def wait(self, call: Callable[[], object], seconds: float) -> bool:
        """Whether ``call`` returned in time, or raised: what, is for the caller to find out.

        It goes on if it did not.  Until it has returned, every other call is refused, with False, and soon.
        """
        if self._waits and not self._returned(_SOON_S if self._gave_up else seconds):
            return False
        if self._thread is None:
            self._thread = threading.Thread(target=_obey, args=(self._calls, self._done), daemon=True)
            self._thread.start()
        self._waits = True
        self._calls.put(call)
        return self._returned(seconds)

    def _returned(self, seconds: float) -> bool:
        self._gave_up = not self._done.acquire(timeout=min(seconds, threading.TIMEOUT_MAX))
        self._waits = self._gave_up
        return not self._gave_up

    def close(self) -> None:
        """End the thread, as soon as it waits for nothing."""
        self._calls.put(None)
        self._thread = None


def _obey(calls: SimpleQueue[Callable[[], object] | None], done: threading.Lock) -> None:
    while (call := calls.get()) is not None:
        with suppress(Exception):
            call()
        del call
        done.release()
