"""The README's example, a stranger's plugin: 40 lines, installed by pip, conforming, running a model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pi2.plugins import Plugins
from pi2.testing.models import write_toy_model

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "pi2-backend-toy"
version = "0.1.0"
dependencies = ["pi2>=0.1,<0.2"]

[project.entry-points.pi2]
toy = "pi2_backend_toy"
"""

README = (Path(__file__).parent.parent / "README.md").read_text()
MODULE, CONFORMANCE = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """``python("-m", ...)`` runs an interpreter that sees the installed toy; its stdout, or an error."""
    project, site = tmp_path_factory.mktemp("toy"), tmp_path_factory.mktemp("site")
    (project / "pyproject.toml").write_text(PYPROJECT)
    (project / "pi2_backend_toy.py").write_text(MODULE)
    (project / "test_conformance.py").write_text(CONFORMANCE)
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=project, env=environment, capture_output=True, check=False
        )
        output = done.stdout.decode()
        assert done.returncode == 0, output + done.stderr.decode()
        return output

    # what is needed to build comes with the tests' extra, so this needs no network
    offline = ("--no-deps", "--no-build-isolation", "--no-index")
    run("-m", "pip", "install", "--quiet", *offline, "--target", str(site), str(project))
    return run


def test_the_plugin_has_forty_lines_at_most():
    assert len(MODULE.splitlines()) <= 40
    assert len(CONFORMANCE.split("\n\n")[1].splitlines()) <= 15


def test_it_is_listed(python):
    listed = json.loads(python("-m", "pi2", "plugins", "--json"))
    assert "plain NumPy" in json.dumps(listed)
    assert "pi2-backend-toy 0.1.0" in json.dumps(listed)
    assert listed["broken"] == {}


def test_it_passes_the_conformance_kit(python):
    said = python(
        "-m", "pytest", "-q", "-rs", "-W", "error", "-c", os.devnull, "--rootdir=.", "test_conformance.py"
    )
    assert " passed" in said
    skipped = [line for line in said.splitlines() if line.startswith("SKIPPED")]
    assert all("an optional power" in line for line in skipped)


def test_it_runs_a_model_and_agrees_with_the_built_in(python, tmp_path):
    model = str(write_toy_model(tmp_path / "model"))
    by_toy, by_numpy = (answer(python, "--model", model, "--backend", name) for name in ("toy", "numpy"))
    assert by_toy["backend"] == "toy"
    assert by_toy["tokens"] == by_numpy["tokens"]
    assert by_toy["density"] == pytest.approx(by_numpy["density"], rel=1e-3)


@pytest.mark.parametrize("model", sorted(Plugins.installed().models) or ["none"])
def test_it_runs_every_installed_model(python, model):
    if model == "none":
        pytest.skip("no model package is installed")
    assert answer(python, "--model", model, "--backend", "toy")["text"].strip()


def answer(python, *options):
    arguments = ("run", "What is the capital of France?", "--json", "--max-tokens", "16", *options)
    return json.loads(python("-m", "pi2", *arguments))
