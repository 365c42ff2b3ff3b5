"""Writing a pi2 model: complete under its final name or not there at all, and able to go on after a stop.

Everything is written to ``<destination>.partial``, which is locked meanwhile and renamed at the end.  A
journal in it lists the steps whose data is on the disk, under a fingerprint of what is being written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np

from pi2.container.layout import file_bytes
from pi2.container.manifest import (
    MANIFEST,
    OPTIONAL,
    REQUIRED,
    FileEntry,
    Manifest,
    describe_member,
    member_size,
    read_manifest,
)
from pi2.container.safetensors_file import Header
from pi2.errors import FormatError, StorageError
from pi2.tensor import U8

JOURNAL: Final = "journal"
_OURS = {MANIFEST, JOURNAL, *REQUIRED, *OPTIONAL}


class PartialModel:
    """A pi2 model under construction; a context manager that holds the lock.

    ``files`` gives the head and the header of each data file; the files have their final size from the
    start and hold zeros where nothing was written.  Leaving the context without :meth:`finish` keeps
    what is done for the next run with the same ``fingerprint``.
    """

    def __init__(
        self, destination: Path, fingerprint: str, files: Mapping[str, tuple[bytes, Header]]
    ) -> None:
        self.destination = destination
        self.path = partial_path(destination)
        self.done: set[str] = set()
        self._fingerprint = fingerprint
        self._files = files
        self._stack = contextlib.ExitStack()
        self._fds: dict[str, int] = {}

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, _lock(self.path))
            if not self._resume():
                self._start()
            for name in self._files:
                self._fds[name] = os.open(self.path / name, os.O_RDWR | os.O_NOFOLLOW)
                stack.callback(os.close, self._fds[name])
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _resume(self) -> bool:
        """Whether an earlier run wrote the same; then ``done`` is what it finished."""
        try:
            complete = (self.path / JOURNAL).read_bytes().rpartition(b"\n")[0]  # a torn line does not count
            first, *steps = complete.decode().split("\n")
            sizes = {name: member_size(self.path, name) for name in self._files}
        except (FileNotFoundError, UnicodeDecodeError, FormatError):
            return False
        if first != self._fingerprint or sizes != {n: file_bytes(*f) for n, f in self._files.items()}:
            return False
        self.done = set(steps)
        return True

    def _start(self) -> None:
        remove_model_files(self.path)
        for name, (head, header) in self._files.items():
            with (self.path / name).open("xb") as f:
                f.write(head)
                f.truncate(file_bytes(head, header))
                f.flush()
                os.fsync(f.fileno())
        _write(self.path / JOURNAL, f"{self._fingerprint}\n".encode())

    def write(self, file: str, offset: int, data: U8) -> None:
        """Put ``data`` at byte ``offset`` of ``file``."""
        view = np.ascontiguousarray(data).reshape(-1).data
        while view:
            n = os.pwrite(self._fds[file], view, offset)
            view, offset = view[n:], offset + n

    def read(self, file: str, offset: int, nbytes: int) -> U8:
        """Bytes of ``file`` as they are now, writeable copy."""
        data = np.empty(nbytes, np.uint8)
        view = data.data
        while view:
            n = os.preadv(self._fds[file], [view], offset)
            if n == 0:
                raise StorageError("the file was cut while being written", path=self.path / file)
            view, offset = view[n:], offset + n
        return data

    def mark(self, step: str, file: str) -> None:
        """Record that ``step``, whose data is in ``file``, need not be done again."""
        os.fsync(self._fds[file])
        with (self.path / JOURNAL).open("ab") as f:
            f.write(f"{step}\n".encode())
        self.done.add(step)

    def finish(
        self,
        manifest: Manifest,
        texts: Mapping[str, bytes],
        *,
        overwrite: bool = False,
        on_bytes: Callable[[str, int], None] | None = None,
    ) -> Path:
        """Write the texts and the manifest with its checksums, then give the model its final name."""
        entries: dict[str, FileEntry] = {}
        for name, text in texts.items():
            _write(self.path / name, text)
        for name in [*texts, *self._files]:
            report = None if on_bytes is None else (lambda n, name=name: on_bytes(name, n))
            entries[name] = describe_member(self.path, name, report)
        _write(self.path / MANIFEST, dataclasses.replace(manifest, files=entries).to_yaml().encode())
        _sync_directory(self.path)
        if self.destination.exists():
            if not overwrite:
                raise destination_exists(self.destination)
            _set_aside(self.destination)
        self.path.rename(self.destination)
        (self.destination / JOURNAL).unlink()  # not before: a stop in between must not cost all the work
        _sync_directory(self.destination.parent)
        if overwrite and (old := _old_path(self.destination)).exists():
            remove_model_files(old)
            old.rmdir()
        return self.destination


def partial_path(destination: Path) -> Path:
    """Where a model is built: beside its final place, so that renaming it is atomic."""
    return destination.with_name(f"{destination.name}.partial")


def _old_path(destination: Path) -> Path:
    return destination.with_name(f"{destination.name}.old")


def destination_exists(destination: Path) -> FormatError:
    return FormatError(
        f"{destination} exists already", hint="choose another name, or replace it with --force"
    )


def check_replaceable(destination: Path) -> None:
    """Raise FormatError unless ``destination`` is a directory with nothing but files of a pi2 model."""
    if destination.is_symlink() or not destination.is_dir():
        raise FormatError(
            f"{destination} is not a directory", hint="remove it yourself, or choose another name"
        )
    foreign = sorted(p.name for p in destination.iterdir() if p.name not in _OURS or p.is_dir())
    if foreign:
        raise FormatError(
            f"{destination} holds {foreign[0]!r}, which is no file of a pi2 model",
            hint="remove it yourself, or choose another name",
        )


def remove_model_files(directory: Path) -> None:
    """Empty ``directory``; refuses (FormatError) if it holds anything that is not pi2's."""
    check_replaceable(directory)
    for path in directory.iterdir():
        path.unlink()


def _set_aside(destination: Path) -> None:
    """Directories cannot be replaced in one step: the old one waits as ``.old`` meanwhile."""
    check_replaceable(destination)
    old = _old_path(destination)
    if old.exists():
        remove_model_files(old)
        old.rmdir()
    destination.rename(old)


def _lock(path: Path) -> int:
    """Make ``path`` if need be and lock it against a second converter; released when the fd closes."""
    path.mkdir(exist_ok=True)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(fd), path.lstat()):  # renamed since: the other has finished
            raise BlockingIOError
    except (BlockingIOError, FileNotFoundError):
        os.close(fd)
        raise StorageError(
            "another conversion is writing here", path=path, hint="wait for it, or choose another name"
        ) from None
    return fd


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(directory: Path, name: str, write: Callable[[Path], None]) -> None:
    """Let ``write`` make the optional file ``name`` of a model under another name, then take it in.

    A stop at any moment leaves a model that opens: with the old file, the new one, or one not listed.
    Raises FormatError as ``list_file``, and StorageError if the model cannot be written.
    """
    fresh = directory / f"{name}.new"
    try:
        manifest = read_manifest(directory)
        write(fresh)
        if name in manifest.files:
            files = {n: entry for n, entry in manifest.files.items() if n != name}
            _replace_manifest(directory, dataclasses.replace(manifest, files=files))
        fresh.replace(directory / name)
        list_file(directory, name)
    except OSError as e:
        raise StorageError(
            e.strerror or str(e), path=directory, hint="check that it may be written"
        ) from None
    finally:
        fresh.unlink(missing_ok=True)


def list_file(directory: Path, name: str) -> None:
    """Enter the optional file ``name`` (predictors, statistics, plan), new or rewritten, into pi2.yaml.

    The manifest is replaced atomically.  Raises FormatError for any other name or a missing file.
    """
    if name not in OPTIONAL:
        raise FormatError(
            f"{name!r} is no optional file of a pi2 model", hint=f"those are {', '.join(OPTIONAL)}"
        )
    manifest = read_manifest(directory)
    files = {**manifest.files, name: describe_member(directory, name)}
    _replace_manifest(directory, dataclasses.replace(manifest, files=files))


def _replace_manifest(directory: Path, manifest: Manifest) -> None:
    fresh = directory / f"{MANIFEST}.new"
    _write(fresh, manifest.to_yaml().encode())
    fresh.replace(directory / MANIFEST)
    _sync_directory(directory)
