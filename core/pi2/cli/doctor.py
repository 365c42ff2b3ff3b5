"""``pi2 doctor``: what this machine has, and what to install."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import typer

from pi2.cli import options as o
from pi2.cli.output import human_bytes, print_json, print_table

if TYPE_CHECKING:
    from pi2.cli.machine import Machine
    from pi2.plugins import Plugins

_LITTLE_MEMORY = 2 << 30  # bytes; below, only the smallest models have room
_LITTLE_DISK = 4 << 30  # bytes; a converted 7 B model in q4_0


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.  "missing": pi2 cannot run without it; "advice": it could do more with it."""

    topic: str
    level: Literal["ok", "advice", "missing"]
    fact: str
    remedy: str = ""


def command(json: o.Json = False) -> None:
    """Check this machine, and say what to install.

    Exits with 1 only if pi2 cannot run at all.
    """
    from pi2.cli.machine import Machine

    findings = examine(Machine.here(), o.installed_plugins)
    fatal = any(f.level == "missing" for f in findings)
    if json:
        print_json({"ok": not fatal, "findings": [asdict(f) for f in findings]})
    else:
        marks = {"ok": "ok", "advice": "--", "missing": "!!"}
        print_table([marks[f.level], f.topic, f.fact] for f in findings)
        remedies = [[f.topic, f.remedy] for f in findings if f.remedy]
        print()
        print_table([[f"{topic}:", remedy] for topic, remedy in remedies] or [["nothing to do"]])
    if fatal:
        raise typer.Exit(1)


def examine(machine: Machine, find_plugins: Callable[[], Plugins]) -> list[Finding]:
    """Everything that is worth a line.  Changes nothing."""
    findings = [*_hardware(machine), *_software(machine), *_drivers(machine)]
    if not any(f.level == "missing" for f in findings):  # else plugins cannot even be imported
        findings += _plugins(find_plugins())
    return findings


def _hardware(machine: Machine) -> Iterator[Finding]:
    simd = " ".join(machine.simd) or "no SIMD that pi2 has kernels for"
    yield Finding("cpu", "ok", f"{machine.cpu}, {machine.cores} cores, {simd}")
    memory = machine.memory_bytes
    fact = f"{human_bytes(memory)}, {human_bytes(machine.memory_available_bytes)} available"
    limit = machine.cgroup_limit_bytes
    if limit is not None and limit < memory:
        fact += f", this process may use {human_bytes(limit)} (cgroup)"
        memory = limit
    small = memory < _LITTLE_MEMORY
    remedy = "choose a small model: the weights of a run stay in memory" if small else ""
    yield Finding("memory", "advice" if small else "ok", fact, remedy)
    full = machine.disk_free_bytes < _LITTLE_DISK
    remedy = "make room before converting a large model" if full else ""
    yield Finding("disk", "advice" if full else "ok", f"{human_bytes(machine.disk_free_bytes)} free", remedy)


def _software(machine: Machine) -> Iterator[Finding]:
    import importlib.metadata

    yield Finding("python", "ok", machine.python)
    for name, wanted in required_packages():
        try:
            yield Finding(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "missing", "not installed", f"python3 -m pip install '{name}{wanted}'")
    compiler = next((c for c in ("g++", "clang++") if shutil.which(c)), None)
    if compiler:
        yield Finding("compiler", "ok", machine.version_of(compiler))
    else:
        yield Finding(
            "compiler", "advice", "neither g++ nor clang++", "native kernels need one: apt-get install g++"
        )
    if shutil.which("cmake"):
        yield Finding("cmake", "ok", machine.version_of("cmake"))
    else:
        yield Finding("cmake", "ok", "not installed; pip fetches it where a plugin is built")


def required_packages() -> list[tuple[str, str]]:
    """(name, version wanted) of what pi2 depends on, from its own metadata."""
    import importlib.metadata

    try:
        lines = importlib.metadata.requires("pi2") or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that was never installed
        lines = ["jinja2", "numpy", "pluggy", "pyyaml", "rich", "safetensors", "tokenizers"]
    needed = [line for line in lines if "extra ==" not in line]
    pairs = (re.match(r"([\w.-]+)\s*([^;]*)", line) for line in needed)
    return [(m.group(1), m.group(2).strip(" ()")) for m in pairs if m]


def _drivers(machine: Machine) -> Iterator[Finding]:
    if machine.opencl_drivers:
        yield Finding("opencl", "ok", ", ".join(machine.opencl_drivers))
    else:
        yield Finding(
            "opencl",
            "advice",
            "no driver",
            "for a GPU install its OpenCL driver; pocl-opencl-icd runs on any CPU",
        )
    if machine.io_uring == "":
        yield Finding("io_uring", "ok", "available")
    else:
        yield Finding("io_uring", "advice", machine.io_uring, "reads go through threads instead, more slowly")
    if machine.dsp_nodes:
        yield Finding("fastrpc", "ok", ", ".join(machine.dsp_nodes))
    else:
        yield Finding("fastrpc", "ok", "no Hexagon DSP: this is no Snapdragon, or its nodes are hidden")


def _plugins(plugins: Plugins) -> Iterator[Finding]:
    from pi2.plugins import KINDS, probe

    for kind in KINDS:
        usable = 0
        for name, cls in plugins.of(kind).items():
            verdict = probe(cls)
            usable += bool(verdict)
            topic = f"{kind.replace('_', ' ')}: {name}"
            yield Finding(topic, "ok" if verdict else "advice", verdict.reason)
        if kind in ("backends", "storage_tiers", "predictors") and not usable:
            yield Finding(
                kind.replace("_", " "),
                "missing",
                "none can run here",
                "python3 -m pip install --force-reinstall pi2",
            )
    for name, reason in plugins.broken.items():
        yield Finding(f"plugin: {name}", "advice", reason, f"update or uninstall the package of {name!r}")
    names = ", ".join(plugins.models)
    if names:
        yield Finding("models", "ok", names)
    else:
        yield Finding(
            "models", "advice", "none installed", "install a model package, or make one: pi2 convert SRC DST"
        )
