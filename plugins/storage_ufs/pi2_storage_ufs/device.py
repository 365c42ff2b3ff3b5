"""Flash devices to pretend: how fast a phone's storage would have read (PowerInfer-2 §2.3.2)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import yaml
from pi2.errors import OptionError

from pi2_storage_ufs import native

_MB, _MIB = 1e6, 2**20


@dataclass(frozen=True, slots=True)
class Device:
    """Bandwidths in bytes per second at 4 KiB (small) and 512 KiB (large), and what takes from them."""

    sequential_small: float = 450 * _MB
    sequential_large: float = 4000 * _MB
    random_small: float = 1076.10 * _MB  # within 128 MiB, from the biggest core
    random_large: float = 3500 * _MB
    near_range: float = 128 * _MIB  # bytes that random reads may span at full speed
    far_range: float = 512 * _MIB  # and from where on they have `far_factor` of it
    far_factor: float = 850 / 1076.10
    queues_factor: float = 0.6  # several issuing threads: up to 40 % less
    core_factor: float = 1.0  # issuing core: 1 big, 0.937 mid, 0.708 little

    def native(self) -> native.Model:
        """As the library takes it."""
        return native.Model(**asdict(self))


UFS40 = Device()
"""OnePlus 12, as published."""
UFS31 = replace(
    UFS40,
    **{name: getattr(UFS40, name) / 2 for name in asdict(UFS40) if name.endswith(("_small", "_large"))},
)
"""Half of UFS 4.0, as the lanes of UFS 3.1 have half its rate: an assumption, nothing is published."""
DEVICES = {"ufs40": UFS40, "ufs31": UFS31}


def load_device(name: str) -> Device:
    """A device by name, or from a YAML file with some of ``Device``'s fields.  Raises OptionError."""
    if name in DEVICES:
        return DEVICES[name]
    known = [field.name for field in fields(Device)]
    hint = f"one of {', '.join(DEVICES)}, or a YAML file with some of: {', '.join(known)}"
    try:
        given = yaml.safe_load(Path(name).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        raise OptionError(f"there is no flash device {name!r} to pretend", hint=hint) from None
    if not isinstance(given, dict) or not all(key in known for key in given):
        raise OptionError(f"{name} does not describe a flash device", hint=hint)
    for key, value in given.items():
        sound = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not sound or not 0 < value < math.inf:
            raise OptionError(f"{key} in {name} is a positive number, not {value!r}", hint=hint)
    return replace(UFS40, **{key: float(value) for key, value in given.items()})
