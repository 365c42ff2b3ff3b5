"""The flash storage tier: its place in pi2, without its readers yet."""

from __future__ import annotations

import os
from pathlib import Path

from pi2.api import Probe, Ranges, StorageTier
from pi2.errors import PluginError
from pi2.tensor import U8

_SWITCH = "proc/sys/kernel/io_uring_disabled"
_SWITCH_MEANS = {
    "0": "io_uring is allowed",
    "1": "io_uring is for privileged processes only",
    "2": "io_uring is switched off",
}


class UfsTier(StorageTier):
    """Direct asynchronous reads will be here: io_uring, threads where there is none.  It cannot read yet."""

    name = "ufs"

    @classmethod
    def probe(cls) -> Probe:
        return Probe(
            0,
            "not built yet: direct asynchronous reads will be here, this version has the registration only"
            f" ({describe_io(Path('/'))})",
        )

    def __init__(self) -> None:
        raise _not_built()

    def open_file(self, path: Path) -> int:
        raise _not_built()

    def read(self, file: int, ranges: Ranges, into: U8) -> None:
        raise _not_built()


def describe_io(root: Path) -> str:
    """What the system below ``root`` says about io_uring and O_DIRECT."""
    try:
        switch = (root / _SWITCH).read_text().strip()
    except OSError:
        switch = ""  # kernels before 6.6 have no switch, with and without io_uring
    uring = _SWITCH_MEANS.get(switch, "this kernel does not tell whether it has io_uring")
    if not hasattr(os, "O_DIRECT"):
        return f"{uring}, the system has no O_DIRECT"
    return f"{uring}, the system has O_DIRECT, which each file system may refuse"


def _not_built() -> PluginError:
    return PluginError("the ufs storage tier is not built yet", hint="use --storage mmap")
