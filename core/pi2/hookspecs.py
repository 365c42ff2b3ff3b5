"""Everything that a plugin can add to pi2.  Each hook runs once, at start-up; none runs per token.

All hooks collect: every plugin's answer is taken.  Choosing among them is a pure function of the name
asked for and the probes (``pi2.plugins``), so it does not depend on the order of installation.
"""
# mypy: disable-error-code="empty-body"

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import pluggy

from pi2.api import Backend, CachePolicy, ModelFormat, Predictor, StorageTier

hookspec = pluggy.HookspecMarker("pi2")
hookimpl = pluggy.HookimplMarker("pi2")


@hookspec
def pi2_backends() -> Iterable[type[Backend]]:
    """Devices that can compute.  Collecting."""


@hookspec
def pi2_storage_tiers() -> Iterable[type[StorageTier]]:
    """Places that weights can be read from.  Collecting."""


@hookspec
def pi2_predictors() -> Iterable[type[Predictor]]:
    """Guessers of which neurons will fire.  Collecting."""


@hookspec
def pi2_cache_policies() -> Iterable[type[CachePolicy]]:
    """Orders in which resident neurons give way to newcomers.  Collecting."""


@hookspec
def pi2_model_formats() -> Iterable[type[ModelFormat]]:
    """Importers of foreign model files.  Collecting."""


@hookspec
def pi2_models() -> Mapping[str, Path]:
    """Models that a package carries: name -> directory of a pi2 model.  Collecting."""
