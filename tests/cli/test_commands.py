"""The commands as a whole: help, version, plugins, the environment."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from command_line import pi2
from pi2 import __version__
from pi2.cli.output import human_bytes


def test_plugins_lists_everything_with_its_reason(monkeypatch):
    found = json.loads(pi2("plugins", "--json").stdout)
    names = {(item["kind"], item["name"]) for item in found["implementations"]}
    assert {("backends", "numpy"), ("storage_tiers", "mmap"), ("model_formats", "gguf")} <= names
    assert all(item["reason"] for item in found["implementations"])
    assert found["plugins"]["builtin"]["hooks"] == sorted(found["plugins"]["builtin"]["hooks"])
    assert found["broken"] == {}
    monkeypatch.setenv("PI2_PLUGINS", "unheard")
    shown = pi2("plugins").stdout
    assert "!!" in shown
    assert "unheard" in shown
    assert "ok  backends" in shown


def test_the_version_is_printed():
    assert pi2("--version").stdout == f"pi2 {__version__}\n"


def test_help_names_every_command_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom pi2.cli.app import app\n"
        "try: app(['--help'], prog_name='pi2')\nexcept SystemExit: pass\n"
        "print([m for m in ('numpy', 'tokenizers', 'rich', 'jinja2', 'yaml') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.endswith("[]\n")
    for name in ("run", "chat", "convert", "inspect", "collect", "eval", "plugins", "doctor"):
        assert f"  {name} " in shown


def test_the_environment_names_a_model(toy, monkeypatch):
    monkeypatch.setenv("PI2_MODEL", toy)
    assert pi2("run", "--raw", "Hi", "-q", "--max-tokens", 1).exit_code == 0


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_500_000, "2.5 MB"), (3 * 10**15, "3000.0 TB")],
)
def test_sizes_are_in_decimal_units(n, text):
    assert human_bytes(n) == text
