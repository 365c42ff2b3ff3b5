"""What ``pi2 compile`` hands to a backend is what a run will place on it, in the same order."""

from __future__ import annotations

import pytest
from command_line import assert_error, pi2
from hypothesis import given, settings
from hypothesis import strategies as st
from pi2 import builtin
from pi2.ahead import to_place
from pi2.builtin.mmap_tier import MmapTier
from pi2.builtin.numpy_backend import NumpyBackend
from pi2.cli import options
from pi2.container import open_model
from pi2.engine import Engine
from pi2.hookspecs import hookimpl
from pi2.hybrid import HybridOptions
from pi2.plugins import Plugins
from pi2.testing.models import toy_architecture, write_toy_model


class Recorder(NumpyBackend):
    """NumPy that remembers what was placed, and compiles by taking notes."""

    name = "recorder"
    placed: list[bytes]
    compiled: list[bytes]

    def __init__(self, soc: str = "here") -> None:
        self.soc = soc

    def place(self, weight):
        Recorder.placed.append(weight.data.tobytes())
        return super().place(weight)

    def place_ffn(self, bundles, spec):
        Recorder.placed.append(bundles.tobytes())
        return super().place_ffn(bundles, spec)

    @classmethod
    def compile(cls, weights, destination, options, progress):
        Recorder.compiled = notes(weights)
        progress("notes", 1, 1)
        destination.mkdir()
        (destination / "soc").write_text(options["soc"])
        return {"use": f"recorder:soc={options['soc']}"}


class Module:
    PI2_API_VERSION = 1

    @hookimpl
    def pi2_backends(self):
        return [Recorder]


def notes(weights):
    return [m.data.tobytes() for m in weights.matrices] + [ffn().tobytes() for ffn in weights.ffns]


@pytest.fixture(scope="module")
def plugins():
    found = Plugins()
    found.add("builtin", builtin)
    found.add("recorder", Module())
    return found


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request, tmp_path_factory):
    arch = toy_architecture(tied=request.param)
    return write_toy_model(tmp_path_factory.mktemp("ahead") / "model", arch)


def placed_by_running(model, plugins, hybrid):
    Recorder.placed = []
    cold = None if hybrid is None else "numpy"
    Engine.open(
        model, backend="recorder", cold=cold, hybrid=hybrid, predictor="exact", plugins=plugins
    ).close()
    return Recorder.placed


shared = st.builds(
    HybridOptions,
    hot=st.sampled_from((0.0, 0.3, 1.0)),
    cluster=st.sampled_from((32, 64)),
    attention=st.sampled_from(("cpu", "accelerator")),
    prefill=st.sampled_from(("cpu", "accelerator")),
)


@settings(deadline=None, max_examples=25)
@given(hybrid=st.none() | shared)
def test_what_is_compiled_is_what_a_run_places(model, plugins, hybrid):
    opened = open_model(model, tier := MmapTier.open())
    ahead = notes(to_place(opened, hybrid, []))
    placed = placed_by_running(model, plugins, hybrid)
    assert set(ahead) == set(placed)
    opened.close()
    tier.close()


def test_the_command_names_the_chip_and_says_how_to_use_it(model, plugins, tmp_path, monkeypatch):
    monkeypatch.setattr(options, "installed_plugins", lambda: plugins)
    monkeypatch.chdir(tmp_path)
    done = pi2("compile", model, "--backend", "recorder", "--soc", "X1")
    assert done.exit_code == 0
    assert "--backend recorder:soc=X1" in done.stderr
    assert (tmp_path / "model.recorder-X1" / "soc").read_text() == "X1"
    opened = open_model(model, MmapTier.open())
    assert Recorder.compiled == notes(to_place(opened, None, []))


def test_a_backend_that_compiles_nothing_is_refused(model):
    assert_error(pi2("compile", model, "--backend", "numpy"), "numpy compiles nothing ahead of time")
    assert_error(pi2("compile", model, "--backend", "nmupy"), "there is no 'nmupy'", "numpy")
