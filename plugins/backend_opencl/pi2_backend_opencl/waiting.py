"""Waiting for a device that may never answer: OpenCL's own waits have no end."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

from pi2.errors import PluginError
from pi2.threads import Deputy

DEADLINE_S = 60.0
_COMPLETE = 0  # CL_COMPLETE: what has not ended is above it, what failed below


class Waiting:
    """Waits for events of one queue, in which a command begins when the one before it has ended."""

    def __init__(self, name: str, deadline: float) -> None:
        """``name`` is the device's; it has ``deadline`` seconds for whatever is waited for."""
        self._name, self._deadline = name, deadline
        self._deputy = Deputy()

    def wait(self, event: Any) -> None:
        """Until ``event``, whose command was flushed, has ended.

        Raises cl.Error if the command failed, PluginError if it does not end in time, and then at once as
        long as it has not ended: what comes after it cannot have begun.
        """
        runs = event.command_execution_status > _COMPLETE
        if runs and not self._deputy.wait(event.wait, self._deadline):
            raise PluginError(
                f"{self._name} hangs: it has not answered for {self._deadline:g} s",
                hint="use --backend cpu; lost=cpu goes on without the device, deadline=SECONDS waits longer",
            )
        event.wait()  # returns at once, and raises what went wrong

    def close(self) -> None:
        self._deputy.close()


def never_free(events: Iterable[Any]) -> None:
    """Leak events that hold arrays: pyopencl waits without end before it frees one."""
    for event in events:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(event))
