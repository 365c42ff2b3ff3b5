"""Finds plugins, refuses broken ones, and picks by name or by score.

A ``Plugins`` object owns one registry, so tests build their own.  A plugin that fails in any way is kept
out whole and listed in ``broken`` with its reason; it never takes the others down.
"""

# mypy: disable-error-code="type-abstract"
# (KINDS holds the abstract bases on purpose: they are compared with, never instantiated)

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

from pi2 import hookspecs
from pi2.api import (
    API_VERSION,
    Backend,
    CachePolicy,
    ModelFormat,
    Plugin,
    Predictor,
    Probe,
    StorageTier,
)
from pi2.errors import PluginError

if TYPE_CHECKING:
    from pi2.config import Settings


KINDS: dict[str, type[Plugin]] = {
    "backends": Backend,
    "storage_tiers": StorageTier,
    "predictors": Predictor,
    "cache_policies": CachePolicy,
    "model_formats": ModelFormat,
}


class Plugins:
    """All implementations that may be used, by kind and name."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager("pi2")
        self._manager.add_hookspecs(hookspecs)
        self._classes: dict[str, dict[str, type[Plugin]]] = {kind: {} for kind in KINDS}
        self.models: dict[str, Path] = {}
        self._carriers: dict[str, str] = {}  # model -> plugin
        self.broken: dict[str, str] = {}
        """Entry-point name -> why the plugin was refused."""
        self.versions: dict[str, str] = {}
        """Entry-point name -> distribution and its version."""

    @classmethod
    def installed(cls, settings: Settings | None = None) -> Plugins:
        """The built-ins and every installed plugin that ``settings.plugins`` allows."""
        from pi2 import builtin

        found = cls()
        found.add("builtin", builtin)
        allowed = settings.plugins if settings else None
        points = sorted(entry_points(group="pi2"), key=lambda p: p.name)
        for point in points:
            if allowed is None or point.name in allowed:
                found._load(point)
        for name in sorted((allowed or frozenset()) - {p.name for p in points}):
            found.broken[name] = "PI2_PLUGINS names it, but it is not installed"
        return found

    def _load(self, point: EntryPoint) -> None:
        if point.dist is not None:
            self.versions[point.name] = f"{point.dist.name} {point.dist.version}"
        try:
            self.add(point.name, point.load())
        except (Exception, SystemExit) as e:  # whatever a plugin raises is its own fault, and shown as such
            self.broken[point.name] = str(e) if isinstance(e, PluginError) else f"{type(e).__name__}: {e}"

    def add(self, name: str, plugin: ModuleType | object) -> None:
        """Register ``plugin`` with all that its hooks return, or raise PluginError and leave no trace."""
        _check_version(name, plugin)
        if self._manager.get_plugin(name) is not None:
            raise PluginError(f"two plugins are called {name!r}", hint="uninstall one of them")
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
        except pluggy.PluginValidationError as e:
            self._forget(name)
            raise PluginError(f"{name}: {e}", hint=f"the hooks are {', '.join(sorted(_hooks()))}") from None
        if not self.hooks_of(name):
            self._forget(name)
            raise PluginError(
                f"{name} implements no hook", hint="decorate its hooks with pi2.hookspecs.hookimpl"
            )
        try:
            classes = {kind: self._collect(kind, name, plugin) for kind in KINDS}
            models = self._collect_models(name, plugin)
        except PluginError:
            self._forget(name)
            raise
        except Exception as e:
            self._forget(name)
            raise PluginError(f"{name}: a hook raised {type(e).__name__}: {e}") from e
        for kind, by_name in classes.items():
            self._classes[kind] |= by_name
        self.models |= models
        self._carriers |= dict.fromkeys(models, name)

    def _forget(self, name: str) -> None:
        if self._manager.get_plugin(name) is not None:
            self._manager.unregister(name=name)

    def _answers(self, hook: str, plugin: object) -> list[Any]:
        others = [p for p in self._manager.get_plugins() if p is not plugin]
        caller = self._manager.subset_hook_caller(hook, others)
        return [answer for answer in caller() if answer is not None]

    def _collect(self, kind: str, name: str, plugin: object) -> dict[str, type[Plugin]]:
        found: dict[str, type[Plugin]] = {}
        for answer in self._answers(f"pi2_{kind}", plugin):
            if not isinstance(answer, Iterable) or isinstance(answer, (str, bytes, Mapping)):
                raise PluginError(f"{name}: pi2_{kind} must return a list of classes, not {answer!r}")
            for cls in answer:
                _check_class(name, kind, cls)
                rival = self._classes[kind].get(cls.name) or found.get(cls.name)
                if rival is not None:
                    raise PluginError(
                        f"{_path(cls)} and {_path(rival)} both claim the name {cls.name!r}",
                        hint="uninstall one of the two plugins",
                    )
                found[cls.name] = cls
        return found

    def _collect_models(self, name: str, plugin: object) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for answer in self._answers("pi2_models", plugin):
            if not isinstance(answer, Mapping):
                raise PluginError(f"{name}: pi2_models must return a mapping of names to directories")
            for model, path in answer.items():
                if model in self.models:
                    raise PluginError(
                        f"{name} and {self._carriers[model]} both carry a model {model!r}",
                        hint="uninstall one of the two plugins",
                    )
                found[str(model)] = Path(path)
        return found

    def of(self, kind: str) -> dict[str, type[Plugin]]:
        """Name -> class of one kind (a key of KINDS), sorted by name."""
        return dict(sorted(self._classes[kind].items()))

    def pick(self, kind: str, name: str | None = None) -> type[Any]:
        """The class called ``name``, or the one with the best probe; ties go to the first name.

        Raises PluginError if there is none of that name, or if it cannot run here.
        """
        classes = self.of(kind)
        if name is None:
            scores = {n: probe(c).score for n, c in classes.items()}
            best = max(classes, key=lambda n: scores[n], default=None)
            if best is None or scores[best] <= 0:
                raise PluginError(f"none of the {_words(kind)} can run here", hint="see pi2 plugins")
            return classes[best]
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=1)
            known = ", ".join(classes) or "none"
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {known}"
            if name in self.broken:
                hint = f"the plugin {name!r} was refused: {self.broken[name]}"
            raise PluginError(f"there is no {name!r} among the {_words(kind)}", hint=hint)
        verdict = probe(classes[name])
        if not verdict:
            raise PluginError(f"{name} cannot run here: {verdict.reason}", hint="see pi2 doctor")
        return classes[name]

    def hooks_of(self, name: str) -> list[str]:
        """Hooks that the plugin called ``name`` implements."""
        callers = self._manager.get_hookcallers(self._manager.get_plugin(name)) or []
        return sorted(c.name for c in callers)

    @property
    def names(self) -> list[str]:
        """Names of all plugins that were accepted."""
        return sorted(n for n, p in self._manager.list_name_plugin() if p is not None)


def probe(cls: type[Plugin]) -> Probe:
    """``cls.probe()``, or why it broke its promise never to raise."""
    try:
        verdict: object = cls.probe()
    except Exception as e:
        return Probe(0, f"probe() raised {type(e).__name__}: {e}")
    if isinstance(verdict, Probe):
        return verdict
    return Probe(0, f"probe() returned {verdict!r}, which is no Probe")


def _check_version(name: str, plugin: object) -> None:
    version = getattr(plugin, "PI2_API_VERSION", None)
    if version is None:
        raise PluginError(
            f"{name} does not state PI2_API_VERSION", hint=f"write PI2_API_VERSION = {API_VERSION} into it"
        )
    if version != API_VERSION:
        raise PluginError(
            f"{name} was written for version {version} of the plugin API, this pi2 has {API_VERSION}",
            hint="install matching versions of pi2 and the plugin",
        )


def _check_class(plugin: str, kind: str, cls: object) -> None:
    base = KINDS[kind]
    if not isinstance(cls, type) or not issubclass(cls, base):
        raise PluginError(f"{plugin}: pi2_{kind} returned {cls!r}, which is no subclass of {base.__name__}")
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise PluginError(f"{_path(cls)} lacks {missing}")
    if not isinstance(getattr(cls, "name", None), str) or not cls.name:
        raise PluginError(f"{_path(cls)} has no name", hint='write name = "..." into the class')
    if kind == "predictors" and not isinstance(getattr(cls, "lossless", None), bool):
        raise PluginError(f"{_path(cls)} does not say whether it is lossless")


def _hooks() -> list[str]:
    return [name for name in vars(hookspecs) if name.startswith("pi2_")]


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _words(kind: str) -> str:
    return kind.replace("_", " ")
