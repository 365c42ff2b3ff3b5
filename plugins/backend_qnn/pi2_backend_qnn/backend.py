"""The Qualcomm NPU backend: its place in pi2, without its graphs yet."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pi2.api import Backend, FfnSpec, Probe
from pi2.errors import PluginError
from pi2.tensor import F32, U8, Ids, Tensor

# How the kernel offers the compute DSP: upstream, and in Qualcomm's older Android trees.
_DEVICES = ("dev/fastrpc-cdsp", "dev/adsprpc-smd")


class QnnBackend(Backend):
    """Graphs for the Hexagon NPU will be here.  This version has no graph."""

    name = "qnn"

    @classmethod
    def probe(cls) -> Probe:
        runtime = "has" if find_spec("onnxruntime") else "does not have"
        return Probe(
            0,
            "not built yet: graphs for the Hexagon NPU will be here, this version has the registration only"
            f" ({describe_npu(Path('/'))}, Python {runtime} onnxruntime)",
        )

    def __init__(self) -> None:
        raise _not_built()

    def place(self, weight: Tensor) -> object:
        raise _not_built()

    def linear(self, weight: Any, x: F32, out: F32, rows: Ids | None = None) -> None:
        raise _not_built()

    def place_ffn(self, bundles: U8, spec: FfnSpec) -> object:
        raise _not_built()

    def ffn(self, ffn: Any, x: F32, out: F32, rows: Ids | None = None) -> int:
        raise _not_built()


def describe_npu(root: Path) -> str:
    """Whether the devices below ``root`` include a Hexagon compute DSP."""
    for device in _DEVICES:
        if (root / device).exists():
            return f"this machine has a Hexagon DSP at /{device}"
    return f"this machine has no Hexagon NPU: no /{_DEVICES[0]}"


def _not_built() -> PluginError:
    return PluginError("the qnn backend is not built yet", hint="use --backend numpy")
