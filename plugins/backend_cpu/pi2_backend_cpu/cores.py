"""Which cores the threads run on: what the machine says of their speeds, and what the user says."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from pi2.errors import OptionError

_SYSFS = Path("/sys/devices/system/cpu")
_SPEEDS = ("cpu_capacity", "cpufreq/cpuinfo_max_freq")  # the kernel's own measure; else MHz


def speeds(cores: Iterable[int], sysfs: Path = _SYSFS) -> dict[int, int]:
    """How fast each core is beside the others; the same number for all where the system does not say."""
    cores = list(cores)
    for name in _SPEEDS:
        try:
            return {core: int((sysfs / f"cpu{core}" / name).read_text()) for core in cores}
        except (OSError, ValueError):
            continue
    return dict.fromkeys(cores, 1)


def fastest(count: int, sysfs: Path = _SYSFS) -> list[int] | None:
    """The ``count`` fastest of the cores that this process may use, best first (big.LITTLE).

    None where all are alike or there are too few: then the system places the threads better than we do.
    """
    found = speeds(sorted(os.sched_getaffinity(0)), sysfs)
    if len(set(found.values())) < 2 or count > len(found):
        return None
    return sorted(found, key=lambda core: -found[core])[:count]


def parse_cores(text: str) -> list[int]:
    """``4-7+2`` -> [4, 5, 6, 7, 2].  Raises OptionError, also for cores that this process may not use."""
    cores: list[int] = []
    try:
        for part in text.split("+"):
            first, _, last = part.partition("-")
            cores += range(int(first), int(last or first) + 1)
    except ValueError:
        raise OptionError(f"{text!r} names no cores", hint="write cpus=0+1 or cpus=4-7") from None
    allowed = os.sched_getaffinity(0)
    for core in cores:
        if core not in allowed:
            known = "+".join(map(str, sorted(allowed)))
            raise OptionError(f"this process may not use core {core}", hint=f"it may use {known}")
    if not cores or len(set(cores)) < len(cores):
        raise OptionError(f"{text!r} names no core, or one twice", hint="write cpus=0+1 or cpus=4-7")
    return cores
