"""What an OpenCL device can do, and which kernels follow from it.

A profile describes another device: kernels are then built as for that one, as far as this device can, and
what it lacks is emulated.  So the variants for an Adreno run, and are tested, on any machine.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from pi2.errors import OptionError

LANES = 64
"""Neurons of a cluster: one wave of an Adreno."""
_MOST_SPLITS = 4


@dataclass(frozen=True, slots=True)
class Caps:
    """A device.  Sizes in bytes; ``max_group`` in work-items, image sizes in texels."""

    name: str
    family: str = "generic"
    compiler: tuple[str | int, ...] = ()
    cpu: bool = False
    unified_memory: bool = False
    fp16: bool = False
    subgroups: bool = False
    dot: str = ""
    """"khr", "qcom", or "": no dot products of bytes."""
    required_subgroup: str = ""
    """"qcom", "intel", or "": no way to ask for a size of waves."""
    images: bool = True
    max_group: int = 256
    local_memory: int = 32768
    max_allocation: int = 1 << 30
    image2d_side: int = 8192
    image_buffer_texels: int = 65536


@dataclass(frozen=True, slots=True)
class Variant:
    """How kernels are built: macros, compiler options, and what stands in for what the device lacks."""

    macros: tuple[tuple[str, int], ...]
    options: tuple[str, ...]
    splits: int
    emulated: tuple[str, ...]
    limits: Caps
    """The smaller of device and profile: sizes of groups, allocations and images."""
    integer_dots: bool
    macros_map: dict[str, int] = field(init=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "macros_map", dict(self.macros))

    def flags(self, **more: int) -> list[str]:
        """Options for the compiler; ``more`` macros replace those of the same name."""
        macros = self.macros_map | more
        return [f"-D{name}={value}" for name, value in sorted(macros.items())] + list(self.options)

    def with_macros(self, **macros: int) -> Variant:
        return dataclasses.replace(self, macros=tuple(sorted((self.macros_map | macros).items())))


def adreno_compiler(driver: str) -> tuple[str | int, ...]:
    """("E031", 38, 11, 12) out of the driver's version: quirks are the compiler's, not the chip's."""
    found = re.search(r"(E031|E17|DX)\.(\d+)\.(\d+)(?:\.(\d+))?", driver)
    return (found[1], *(int(part or 0) for part in found.groups()[1:])) if found else ()


def from_device(device: Any) -> Caps:
    """The facts of a ``pyopencl.Device``.  Extensions are claims: ``probes`` tries what they promise."""
    extensions = set(device.extensions.split())
    adreno = "adreno" in f"{device.name} {device.version}".lower()
    has_images = bool(device.image_support)
    return Caps(
        name=device.name.strip(),
        family="adreno" if adreno else "generic",
        compiler=adreno_compiler(device.driver_version) if adreno else (),
        cpu=bool(device.type & 2),  # CL_DEVICE_TYPE_CPU
        unified_memory=bool(device.host_unified_memory),
        fp16="cl_khr_fp16" in extensions,
        subgroups="cl_khr_subgroups" in extensions,
        dot=(
            "khr" if "cl_khr_integer_dot_product" in extensions
            else "qcom" if "cl_qcom_dot_product8" in extensions else ""
        ),
        required_subgroup=(
            "qcom" if "cl_qcom_reqd_sub_group_size" in extensions
            else "intel" if "cl_intel_required_subgroup_size" in extensions else ""
        ),
        images=has_images,
        max_group=device.max_work_group_size,
        local_memory=device.local_mem_size,
        max_allocation=device.max_mem_alloc_size,
        image2d_side=min(device.image2d_max_width, device.image2d_max_height) if has_images else 0,
        image_buffer_texels=device.image_max_buffer_size if has_images else 0,
    )  # fmt: skip


def load_profile(name: str) -> Caps:
    """A built-in profile's name, or a JSON file with fields of ``Caps``.  Raises OptionError."""
    folder = files("pi2_backend_opencl") / "profiles"
    known = sorted(entry.name.removesuffix(".json") for entry in folder.iterdir())
    hint = f"one of {', '.join(known)}, or a JSON file with fields of Caps"
    try:
        text = (folder / f"{name}.json").read_text() if name in known else Path(name).read_text()
        raw = json.loads(text)
        wrong = sorted(set(raw) - {f.name for f in dataclasses.fields(Caps)})
        if wrong:
            raise OptionError(f"the OpenCL profile {name!r} has an unknown field {wrong[0]!r}", hint=hint)
        return _checked(raw | {"compiler": tuple(raw.get("compiler", ()))})
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise OptionError(f"there is no OpenCL profile {name!r} ({e})", hint=hint) from None


def _checked(raw: dict[str, Any]) -> Caps:
    caps = Caps(**raw)
    for f in dataclasses.fields(Caps):
        value, kind = getattr(caps, f.name), str(f.type).split("[")[0]
        if kind in ("int", "str", "bool", "tuple") and type(value).__name__ != kind:
            raise ValueError(f"{f.name} is {value!r}, not a value of type {kind}")
    if min(caps.max_group, caps.local_memory, caps.max_allocation) < 1:
        raise ValueError("sizes must be positive")
    return caps


def resolve(real: Caps, wanted: Caps | None = None) -> Variant:
    """The kernels for ``wanted`` (None: for the device itself) that ``real`` can run."""
    want = wanted or real
    limits = dataclasses.replace(
        real,
        images=real.images and want.images and (wanted is not None or not real.cpu),  # slow on a CPU
        **{
            name: min(getattr(real, name), getattr(want, name))
            for name in (
                "max_group", "local_memory", "max_allocation", "image2d_side", "image_buffer_texels"
            )
        },
    )  # fmt: skip
    splits = _MOST_SPLITS
    while splits > 1 and (LANES * splits > limits.max_group or 48 * LANES * splits > limits.local_memory):
        splits //= 2
    macros = {"LANES": LANES, "SPLITS": splits, "SUBGROUPS": 0, "BROADCAST": 0, "DOT": 0}
    options = ["-cl-mad-enable"]
    emulated = []
    modern = False
    if want.subgroups:
        macros["BROADCAST"] = 1
        if real.subgroups and real.required_subgroup:
            macros["SUBGROUPS"] = modern = True
            macros["REQD_QCOM" if real.required_subgroup == "qcom" else "REQD_INTEL"] = 1
        else:
            emulated.append("subgroups")
    if want.family == "adreno" and real.family != "adreno":
        emulated.append("Adreno's attributes")
        if "REQD_INTEL" not in macros:
            macros["REQD_QCOM"] = 1
    if want.fp16 and real.fp16:
        macros["HAVE_FP16"] = 1
    elif want.fp16:
        emulated.append("fp16")
    if want.dot and want.dot == real.dot:
        macros["DOT"] = 1 if want.dot == "khr" else 2
        modern = modern or want.dot == "khr"
    elif want.dot == "qcom":
        macros["DOT"], macros["EMULATE_QCOM_DOT"] = 2, 1
        emulated.append("qcom_dot8_acc")
    elif want.dot:
        emulated.append("dot products")
    if modern:
        options.append("-cl-std=CL3.0")
    return Variant(
        macros=tuple(sorted((k, int(v)) for k, v in macros.items())),
        options=tuple(options),
        splits=splits,
        emulated=tuple(emulated),
        limits=limits,
        integer_dots=bool(want.dot),
    )
