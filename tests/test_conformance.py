"""The conformance kit, run over everything that is installed."""

from __future__ import annotations

import pytest
from pi2.api import Plugin
from pi2.plugins import Plugins
from pi2.testing import BackendTests, CachePolicyTests, PredictorTests, StorageTierTests

INSTALLED = Plugins.installed()


def every(kind: str) -> list[object]:
    """The classes of one kind, as parameters that bear their names."""
    return [pytest.param(cls, id=name) for name, cls in INSTALLED.of(kind).items()]


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
    @pytest.fixture(scope="class", params=every("predictors"))
    @classmethod
    def implementation(cls, request: pytest.FixtureRequest) -> type[Plugin]:
        return request.param


class TestCachePolicies(CachePolicyTests):
    @pytest.fixture(scope="class", params=every("cache_policies"))
    @classmethod
    def implementation(cls, request: pytest.FixtureRequest) -> type[Plugin]:
        return request.param


def test_no_installed_plugin_is_broken():
    assert INSTALLED.broken == {}
