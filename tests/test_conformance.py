"""The conformance kit, run over everything that is installed.

What cannot run here is only asked why, and whether it refuses to open.
"""

from __future__ import annotations

from pathlib import Path

import gguf_files
import huggingface_files
import lowrank_files
import pytest
import threshold_files
from gguf import GGMLQuantizationType as Type
from pi2.api import Plugin
from pi2.formats.gguf_source import GgufFormat
from pi2.formats.huggingface import HuggingFaceFormat
from pi2.plugins import KINDS, Plugins, probe
from pi2.testing import (
    BackendTests,
    CachePolicyTests,
    ModelFormatTests,
    PredictorTests,
    StorageTierTests,
)
from pi2.testing.models import toy_architecture, write_toy_model
from pi2.testing.plugin import PluginTests
from pi2.testing.predictor import MODELS

INSTALLED = Plugins.installed()
ON_REQUEST = {"qnn"}
"""Run here only with an option, on an emulator: tested beside their plugins."""


def every(kind: str, *, can_run: bool = True) -> list[object]:
    """The classes of one kind that can run here, or those that cannot, as parameters with their names."""
    classes = INSTALLED.of(kind).items()
    return [
        pytest.param(cls, id=name)
        for name, cls in classes
        if bool(probe(cls)) == can_run and (name not in ON_REQUEST or not can_run)
    ]


class TestWhatCannotRunHere(PluginTests):
    @pytest.fixture(scope="class", params=[cls for kind in KINDS for cls in every(kind, can_run=False)])
    @classmethod
    def implementation(cls, request: pytest.FixtureRequest) -> type[Plugin]:
        return request.param


class TestBackends(BackendTests):
    @pytest.fixture(scope="class", params=every("backends"))
    @classmethod
    def implementation(cls, request: pytest.FixtureRequest) -> type[Plugin]:
        return request.param


class TestStorageTiers(StorageTierTests):
    @pytest.fixture(scope="class", params=every("storage_tiers"))
    @classmethod
    def implementation(cls, request: pytest.FixtureRequest) -> type[Plugin]:
        return request.param


class TestPredictors(PredictorTests):
    @pytest.fixture(scope="class", params=sorted(MODELS))
    @classmethod
    def model_path(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """With files for the predictors that need them."""
        arch = toy_architecture(**MODELS[request.param])
        path = write_toy_model(tmp_path_factory.mktemp("predictor") / "model", arch)
        threshold_files.install(path, arch)
        return lowrank_files.install(path, lowrank_files.random_predictors(path, arch))

    @pytest.fixture(scope="class", params=every("predictors"))
    @classmethod
    def implementation(cls, request: pytest.FixtureRequest) -> type[Plugin]:
        return request.param


class TestCachePolicies(CachePolicyTests):
    @pytest.fixture(scope="class", params=every("cache_policies"))
    @classmethod
    def implementation(cls, request: pytest.FixtureRequest) -> type[Plugin]:
        return request.param


class TestGguf(ModelFormatTests):
    plugin = GgufFormat

    @classmethod
    def sample(cls, directory: Path) -> Path:
        tensors = gguf_files.random_tensors(gguf_files.shapes(), Type.Q4_0)
        return gguf_files.write(directory / "tiny.gguf", tensors)


class TestHuggingFace(ModelFormatTests):
    plugin = HuggingFaceFormat

    @classmethod
    def sample(cls, directory: Path) -> Path:
        return huggingface_files.write(directory / "tiny", huggingface_files.LLAMA, dtype="F16", shards=2)


def test_every_installed_model_format_is_tested_here_or_beside_its_plugin():
    built_in = {cls for cls in INSTALLED.of("model_formats").values() if cls.__module__.startswith("pi2.")}
    assert built_in == {TestGguf.plugin, TestHuggingFace.plugin}


def test_no_installed_plugin_is_broken():
    assert INSTALLED.broken == {}
