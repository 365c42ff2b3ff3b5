"""The one place of the project with Python threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence


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
