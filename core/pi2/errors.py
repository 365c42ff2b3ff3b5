"""The exceptions of pi2, drawn as a tree.

Pi2Error                  anything that the user can act on; the command line prints it and exits with 1
├── PluginError           a plugin is broken, missing, clashing, or cannot run here
├── OptionError           an option has an unknown name or an unusable value
├── FormatError           a file is damaged, hostile, or of a kind that pi2 does not read
│   └── UnsupportedModel  the file is sound, but the model in it is not one that pi2 can run
├── StorageError          reading or writing bytes failed; carries the file and the offset
└── BudgetError           what was asked for does not fit into memory or onto the disk
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Self

_READING = {
    errno.ENODATA: ("the file ends before the read does", "the file was cut short; convert the model again"),
    errno.ESTALE: ("the file was changed, cut or replaced while it was open", "run again"),
    errno.EINVAL: ("this is no place in a file", None),
    errno.ETIMEDOUT: ("the device did not answer in time", "look into the system's log: it may be failing"),
    errno.ECANCELED: ("the read was cancelled", None),
    errno.EIO: ("the device could not read", "look into the system's log: the device may be failing"),
}


class Pi2Error(Exception):
    """What happened, as one sentence without a full stop, and a hint that says what to do."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class PluginError(Pi2Error):
    """A plugin is broken, missing, clashing, or cannot run here."""


class OptionError(Pi2Error):
    """An option has an unknown name or an unusable value."""


class FormatError(Pi2Error):
    """A file is damaged, hostile, or of a kind that pi2 does not read."""


class UnsupportedModel(FormatError):
    """The file is sound, but the model in it is not one that pi2 can run."""


class StorageError(Pi2Error):
    """Reading or writing bytes failed."""

    def __init__(
        self, message: str, *, path: Path, offset: int | None = None, hint: str | None = None
    ) -> None:
        place = f"{path}" if offset is None else f"{path} at byte {offset}"
        super().__init__(f"{place}: {message}", hint=hint)
        self.path = path
        self.offset = offset

    @classmethod
    def from_errno(cls, code: int, *, path: Path, offset: int) -> Self:
        """What a ``pi2_storage_failure`` tells (include/pi2_abi.h); offset -1 is nowhere in particular."""
        says, hint = _READING.get(code, (os.strerror(code), None))
        return cls(
            says, path=path, offset=None if offset == -1 and code != errno.EINVAL else offset, hint=hint
        )


class BudgetError(Pi2Error):
    """What was asked for does not fit into memory or onto the disk."""
