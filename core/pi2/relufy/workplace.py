"""Where a training keeps what it has done: a locked directory beside the model that it makes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from pi2.container.safetensors_file import Header, build_header, parse_json, read_header
from pi2.errors import FormatError, StorageError
from pi2.tensor import F32

CHECKPOINT: Final = "checkpoint.safetensors"
_STATE: Final = "state"


def workplace_path(destination: Path) -> Path:
    """The directory for the training of the model at ``destination``."""
    return destination.with_name(f"{destination.name}.training")


@contextlib.contextmanager
def open_workplace(path: Path) -> Iterator[Path]:
    """Make the directory if need be and lock it.  Raises StorageError if another training has it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as e:
        raise StorageError(e.strerror or str(e), path=path, hint="choose another place") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield path
    except BlockingIOError:
        raise StorageError(
            "another training is going on here", path=path, hint="wait for it, or choose another name"
        ) from None
    finally:
        os.close(fd)


def save(path: Path, arrays: Mapping[str, F32], state: Mapping[str, Any]) -> None:
    """Write ``arrays`` and ``state`` as a safetensors file that replaces ``path`` in one step.

    Takes no memory beside them.  Raises StorageError if the disk is full.
    """
    shapes = {name: ("F32", array.shape) for name, array in arrays.items()}
    head, _ = build_header(shapes, {_STATE: json.dumps(state)}, 4096)
    fresh = path.with_name(f"{path.name}.new")
    try:
        with fresh.open("wb") as f:
            f.write(head)
            for array in arrays.values():
                f.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            f.flush()
            os.fsync(f.fileno())
        fresh.replace(path)
    except OSError as e:
        raise StorageError(
            e.strerror or str(e), path=path, hint="make room; the last checkpoint is still there"
        ) from None


def read_state(path: Path) -> dict[str, Any] | None:
    """The state in a file that :func:`save` wrote; None if there is none.  Raises FormatError."""
    return None if not path.exists() else parse_json(_header(path).metadata[_STATE].encode(), str(path))


def read_arrays(path: Path, into: Mapping[str, F32]) -> None:
    """Fill ``into`` from a file that :func:`save` wrote with arrays of the same names and shapes."""
    header = _header(path)
    if {n: e.shape for n, e in header.entries.items()} != {n: a.shape for n, a in into.items()}:
        raise FormatError(f"{path} holds other tensors than this training", hint=_hint(path))
    with path.open("rb") as f:
        for name, array in into.items():
            f.seek(header.entries[name].offset)
            values = np.fromfile(f, np.float32, array.size)
            array[...] = values.reshape(array.shape)


def remove(path: Path) -> None:
    """Delete a workplace with all that is in it."""
    shutil.rmtree(path)


def _header(path: Path) -> Header:
    header = read_header(path)
    if _STATE not in header.metadata or {e.dtype for e in header.entries.values()} - {"F32"}:
        raise FormatError(f"{path} is no checkpoint of a training", hint=_hint(path))
    return header


def _hint(path: Path) -> str:
    return f"begin again with --restart, which deletes {path.parent}"
