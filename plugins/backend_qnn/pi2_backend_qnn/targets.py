"""SoCs, packages and options that are known to work, since QNN itself ignores or only warns of the others.

Numbers of SoCs: ``soc_model`` of the QNN provider, which is not the ``soc_id`` of Linux.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from pi2.errors import OptionError

from pi2_backend_qnn.errors import INSTALL, NotInstalled, WrongSoc, WrongVersion

PACKAGES = {
    "onnxruntime": ((1, 24, 4), (1, 32)),
    "onnxruntime-qnn": ((2, 7), (2, 8)),
    "onnx": ((1, 17), (2,)),
}
"""Package -> first version that works, first that is not known to."""
PERFORMANCE = (
    "default", "burst", "balanced", "high_performance", "sustained_high_performance", "low_balanced",
    "high_power_saver", "power_saver", "low_power_saver", "extreme_power_saver",
)  # fmt: skip
PRIORITY = ("low", "normal", "normal_high", "high")


@dataclass(frozen=True, slots=True)
class Soc:
    """A chip, by Qualcomm's name, the number that QNN has for it, and the generation of its NPU."""

    name: str
    number: int
    arch: str
    sold_as: str


SOCS = {
    soc.name: soc
    for soc in (
        Soc("SM8450", 36, "V69", "Snapdragon 8 Gen 1"),
        Soc("SM8550", 43, "V73", "Snapdragon 8 Gen 2"),
        Soc("SM8650", 57, "V75", "Snapdragon 8 Gen 3"),
        Soc("SC8380XP", 60, "V73", "Snapdragon X Elite"),
        Soc("SM8750", 69, "V79", "Snapdragon 8 Elite"),
        Soc("SM8850", 87, "V81", "Snapdragon 8 Elite Gen 5"),
    )
}
_TOO_OLD = {"SM8350": "the NPU of SM8350 (V68) has neither fp16 nor blocks of 4 bits"}


def soc_named(name: str) -> Soc:
    """Raises WrongSoc for a name that is not in the table: QNN would take it for the oldest of all."""
    wanted = name.upper()
    if wanted in _TOO_OLD:
        raise WrongSoc(_TOO_OLD[wanted], hint="use --backend cpu")
    if wanted not in SOCS:
        raise WrongSoc(f"there is no SoC {name!r} in the table", hint=f"there are: {', '.join(SOCS)}")
    return SOCS[wanted]


def installed() -> dict[str, str]:
    """Versions of the packages of the extra, as far as they are there."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def check_packages(found: Mapping[str, str]) -> None:
    """Raises NotInstalled or WrongVersion for the first package that is not as it should be."""
    missing = [package for package in PACKAGES if package not in found]
    if missing:
        raise NotInstalled(f"{', '.join(missing)} not installed", hint=INSTALL)
    for package, (first, beyond) in PACKAGES.items():
        if not first <= _numbers(found[package]) < beyond:
            wanted = f">={'.'.join(map(str, first))},<{'.'.join(map(str, beyond))}"
            raise WrongVersion(
                f"{package} {found[package]} is not known to work here, {wanted} is", hint=INSTALL
            )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


def provider_options(
    soc: Soc, performance: str, priority: str, vtcm_mb: int | None, rpc_latency_us: int | None
) -> dict[str, str]:
    """What the provider is told.  Raises OptionError: it would ignore, or only warn of, what is wrong."""
    for name, value, known in (
        ("performance", performance, PERFORMANCE),
        ("priority", priority, PRIORITY),
    ):
        if value not in known:
            raise OptionError(f"{name} cannot be {value!r}", hint=f"{name} is one of {', '.join(known)}")
    options = {
        "soc_model": str(soc.number),
        "htp_performance_mode": performance,
        "qnn_context_priority": priority,
    }
    if vtcm_mb is not None:
        if not 1 <= vtcm_mb <= 64:
            raise OptionError(f"vtcm_mb cannot be {vtcm_mb}", hint="1 to 64, or leave it to QNN")
        options["vtcm_mb"] = str(vtcm_mb)
    if rpc_latency_us is not None:
        if not 0 <= rpc_latency_us <= 100_000:
            raise OptionError(f"rpc_latency_us cannot be {rpc_latency_us}", hint="0 to 100000")
        options["rpc_control_latency"] = str(rpc_latency_us)
    return options
