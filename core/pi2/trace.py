"""A trace of the cluster pipeline and of an accelerator, as a file for Perfetto and chrome://tracing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pi2.errors import StorageError
from pi2.powers import Spans, Stage

_TIER = 255  # the thread of spans that the storage tier did
ACCELERATOR = 254
"""The thread of spans that an accelerator did."""
GRAPHS = 253
"""The thread of graphs that an accelerator got ready meanwhile."""
_NAMES = ("gate read", "gate", "up/down read", "up/down", "hot", "cold", "graph")  # by Stage
_READS = (Stage.GATE_READ, Stage.UP_DOWN_READ)


class TraceWriter:
    """Appends spans to a file in the Trace Event Format: an array of events, each with layer and cluster.

    A disk that is full ends the trace, not the run: ``failure`` says so.
    """

    def __init__(self, path: Path) -> None:
        """Raises StorageError if the file cannot be made."""
        self.path = path
        self.failure: str | None = None
        """Why the trace is not whole, if so."""
        try:
            self._file: int | None = os.open(
                path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666
            )
        except OSError as e:
            raise StorageError(e.strerror or str(e), path=path, hint="choose another --trace FILE") from None
        names = ((0, "compute"), (GRAPHS, "graphs"), (ACCELERATOR, "accelerator"), (_TIER, "storage"))
        events = [
            {"name": "thread_name", "ph": "M", "pid": 1, "tid": tid, "args": {"name": name}}
            for tid, name in names
        ]
        self._write("[\n" + ",\n".join(map(json.dumps, events)))

    def add(self, spans: Spans) -> None:
        """Enter (n,) ``SPANS``; their seconds become the format's microseconds."""
        self._write("".join(",\n" + json.dumps(_event(span)) for span in spans.tolist()))

    def close(self) -> None:
        """End the file.  Safe to call twice."""
        self._write("\n]\n")
        if self._file is not None:
            os.close(self._file)
        self._file = None

    def _write(self, text: str) -> None:
        data = text.encode()
        while data and self._file is not None and self.failure is None:
            try:
                data = data[os.write(self._file, data) :]
            except OSError as e:
                self.failure = f"the trace {self.path} ends early: {e.strerror or e}"


def _event(span: tuple[Any, ...]) -> dict[str, Any]:
    ffn, cluster, stage, thread, neurons, start, end = span
    return {
        "name": _NAMES[stage],
        "cat": "io" if stage in _READS else "compute",
        "ph": "X",
        "ts": round(start * 1e6, 3),
        "dur": round((end - start) * 1e6, 3),
        "pid": 1,
        "tid": thread,
        "args": {"layer": ffn, "cluster": cluster, "neurons": neurons},
    }
