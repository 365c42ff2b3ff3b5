"""What this machine has, without loading anything of QNN."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pi2.api import Probe
from pi2.errors import Pi2Error

from pi2_backend_qnn.errors import INSTALL
from pi2_backend_qnn.targets import SOCS, check_packages, installed

# How the kernel offers the compute DSP: upstream, and in Qualcomm's older Android trees.
_DEVICES = ("dev/fastrpc-cdsp", "dev/adsprpc-smd")
_CHIP = "sys/devices/soc0/machine"
_ARM = ("aarch64", "arm64")
_X86 = ("x86_64", "amd64")
_EMULATOR, _UNPROVEN = 1, 2  # below every backend that is taken by itself


@dataclass(frozen=True, slots=True)
class Npu:
    """A Hexagon compute DSP: its device, whether this user may open it, the SoC if the kernel names it."""

    device: str
    usable: bool
    soc: str | None


def find_npu(root: Path = Path("/")) -> Npu | None:
    """The NPU of the machine whose devices are below ``root``."""
    for device in _DEVICES:
        if (path := root / device).exists():
            return Npu(f"/{device}", os.access(path, os.R_OK | os.W_OK), _soc(root))
    return None


def _soc(root: Path) -> str | None:
    try:
        named = (root / _CHIP).read_text().strip().upper()
    except OSError:
        return None
    return next((name for name in SOCS if name in named), None)


def describe_npu(npu: Npu | None) -> str:
    if npu is None:
        return f"this machine has no Hexagon NPU: no /{_DEVICES[0]}"
    may = "" if npu.usable else ", which this user may not open"
    return f"this machine has a Hexagon NPU at {npu.device}{may}" + (f", {npu.soc}" if npu.soc else "")


def probe(root: Path = Path("/"), machine: str | None = None) -> Probe:
    """Score 0 without the extra.  An emulator and a device that nobody has measured are never taken by
    themselves: their scores are below NumPy's.
    """
    npu, machine = find_npu(root), (machine or platform.machine()).lower()
    here = describe_npu(npu)
    if not all(find_spec(module) for module in ("onnxruntime", "onnxruntime_qnn", "onnx")):
        return Probe(0, f"{here}; ONNX Runtime's QNN provider is not installed: {INSTALL}")
    try:
        check_packages(installed())
    except Pi2Error as e:
        return Probe(0, f"{e}: {e.hint}")
    if npu is not None and npu.usable and machine in _ARM:
        return Probe(_UNPROVEN, f"{here}; never run on one yet, so it is taken only by name")
    if machine in _X86:
        return Probe(_EMULATOR, f"{here}; emulator only, with --backend qnn:emulator=on, for tests")
    return Probe(0, here)
