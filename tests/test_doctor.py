"""``pi2 doctor``: facts from the system's files, and a remedy for each problem."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import shutil

import pytest
from pi2 import builtin
from pi2.api import API_VERSION, Backend, Probe
from pi2.cli import doctor
from pi2.cli.app import app
from pi2.cli.machine import Machine, cgroup_limit
from pi2.hookspecs import hookimpl
from pi2.plugins import Plugins
from typer.testing import CliRunner

HEALTHY = Machine(
    cpu="A CPU",
    cores=8,
    simd=("asimd", "i8mm"),
    memory_bytes=16 << 30,
    memory_available_bytes=8 << 30,
    cgroup_limit_bytes=None,
    disk_free_bytes=100 << 30,
    python="3.11.7 at /usr/bin/python3",
    opencl_drivers=("pocl",),
    io_uring="",
    dsp_nodes=(),
)


def found_plugins(*extra):
    plugins = Plugins()
    plugins.add("builtin", builtin)
    for name, plugin in extra:
        plugins.add(name, plugin)
    return plugins


def examine(machine=HEALTHY, plugins=found_plugins, **changes):
    findings = doctor.examine(dataclasses.replace(machine, **changes), plugins)
    return {f.topic: f for f in findings}


@pytest.fixture(autouse=True)
def only_builtins(monkeypatch):
    monkeypatch.setenv("PI2_PLUGINS", "")


def test_this_machine_is_described_truthfully():
    machine = Machine.here()
    assert machine.cpu
    assert machine.cores == len(os.sched_getaffinity(0))
    assert 0 < machine.memory_available_bytes <= machine.memory_bytes
    assert machine.memory_bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < machine.disk_free_bytes <= shutil.disk_usage(".").total


def test_doctor_finds_that_pi2_can_run_here():
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert any(line.startswith("ok  backends: numpy") for line in lines)
    assert any(line.startswith("models:") and "pi2 convert" in line for line in lines)


def test_doctor_speaks_json():
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert found["ok"] is True
    topics = {f["topic"] for f in found["findings"]}
    assert {"cpu", "memory", "disk", "python", "numpy", "compiler", "opencl", "io_uring", "fastrpc"} <= topics
    assert all(f["level"] in ("ok", "advice", "missing") for f in found["findings"])


def test_a_healthy_machine_needs_nothing_but_a_model():
    troubles = [f for f in examine().values() if f.level != "ok"]
    assert {f.topic for f in troubles} <= {"models", "compiler"}


@pytest.mark.parametrize(
    ("changes", "topic", "fact", "remedy"),
    [
        ({"memory_bytes": 1 << 30}, "memory", "1.1 GB", "small model"),
        ({"cgroup_limit_bytes": 1 << 30}, "memory", "may use 1.1 GB (cgroup)", "small model"),
        ({"disk_free_bytes": 5}, "disk", "5 B free", "make room"),
        ({"opencl_drivers": ()}, "opencl", "no driver", "pocl-opencl-icd"),
        ({"io_uring": "forbidden here"}, "io_uring", "forbidden here", "threads"),
    ],
)
def test_every_shortcoming_has_a_remedy(changes, topic, fact, remedy):
    finding = examine(**changes)[topic]
    assert finding.level == "advice"
    assert fact in finding.fact
    assert remedy in finding.remedy


def test_a_cgroup_above_the_memory_limits_nothing():
    assert "cgroup" not in examine(cgroup_limit_bytes=1 << 50)["memory"].fact


def test_simd_and_dsp_are_named_where_they_are():
    assert "asimd i8mm" in examine()["cpu"].fact
    assert "no SIMD" in examine(simd=())["cpu"].fact
    assert examine(dsp_nodes=("/dev/fastrpc-cdsp",))["fastrpc"].fact == "/dev/fastrpc-cdsp"


def test_missing_tools_are_said(monkeypatch):
    monkeypatch.setenv("PATH", "")
    found = examine()
    assert "apt-get install g++" in found["compiler"].remedy
    assert "pip fetches it" in found["cmake"].fact
    assert "does not run" in HEALTHY.version_of("no-such-tool")


def test_a_missing_package_is_fatal_and_named(monkeypatch):
    monkeypatch.setattr(doctor, "required_packages", lambda: [("surely-not-there", ">=1")])

    def never():
        pytest.fail("plugins cannot be imported without the packages")

    finding = examine(plugins=never)["surely-not-there"]
    assert (finding.level, finding.remedy) == ("missing", "python3 -m pip install 'surely-not-there>=1'")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "!!  surely-not-there" in result.stdout


def test_the_packages_are_those_of_the_project():
    names = {name for name, _ in doctor.required_packages()}
    assert {"jinja2", "numpy", "pluggy", "pyyaml", "rich", "safetensors", "tokenizers"} <= names
    for name in names:
        assert importlib.metadata.version(name)


class Sick:
    """A plugin whose only backend cannot run here."""

    PI2_API_VERSION = API_VERSION

    class SickBackend(Backend):
        name = "sick"

        @classmethod
        def probe(cls):
            return Probe(0, "no such device")

        def place(self, weight):
            return weight

        def linear(self, weight, x, out, rows=None):
            out[:] = 0

        def place_ffn(self, bundles, spec):
            return bundles

        def ffn(self, ffn, x, out, rows=None):
            out[:] = 0
            return 0

    @hookimpl
    def pi2_backends(self):
        return [self.SickBackend]


def test_a_plugin_that_cannot_run_is_listed_with_its_reason():
    finding = examine(plugins=lambda: found_plugins(("sick", Sick())))["backends: sick"]
    assert (finding.level, finding.fact) == ("advice", "no such device")


def test_without_any_usable_part_pi2_cannot_run():
    def nothing_but_sick():
        plugins = Plugins()
        plugins.add("sick", Sick())
        return plugins

    found = examine(plugins=nothing_but_sick)
    assert [found[kind].level for kind in ("backends", "storage tiers", "predictors")] == ["missing"] * 3


def test_broken_plugins_and_installed_models_are_listed(tmp_path):
    def plugins():
        found = found_plugins()
        found.broken["odd"] = "raises at import"
        found.models["small"] = tmp_path
        return found

    assert "uninstall" in examine(plugins=plugins)["plugin: odd"].remedy
    assert examine(plugins=plugins)["models"].fact == "small"


def limit_file(root, group, name, text):
    path = root / group
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_text(text)


def test_the_lowest_cgroup_limit_counts(tmp_path):
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    membership.write_text("0::/a/b\n")
    assert cgroup_limit(root, membership) is None
    limit_file(root, "a/b", "memory.max", "max\n")
    limit_file(root, "a", "memory.max", "5000\n")
    assert cgroup_limit(root, membership) == 5000
    limit_file(root, "a/b", "memory.max", "400\n")
    assert cgroup_limit(root, membership) == 400
    membership.write_text("4:cpu,memory:/x\n3:cpuset:/\n")
    limit_file(root, "memory/x", "memory.limit_in_bytes", str((1 << 63) - 4096))
    assert cgroup_limit(root, membership) is None
    limit_file(root, "memory", "memory.limit_in_bytes", "77\n")
    assert cgroup_limit(root, membership) == 77
    assert cgroup_limit(root, tmp_path / "missing") is None
