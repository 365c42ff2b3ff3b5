"""The families of models that pi2 runs.  Each is one short module here; adding a module adds a family."""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any

from pi2.architecture import Architecture
from pi2.errors import UnsupportedModel
from pi2.families._family import Family

__all__ = ["Family", "all_families", "by_architecture", "by_gguf", "describe"]


@functools.cache
def all_families() -> tuple[Family, ...]:
    """Every family, in the order of its module's name; modules with a leading underscore are shared."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return tuple(importlib.import_module(f"{__name__}.{name}").FAMILY for name in names)


def by_architecture(name: str) -> Family:
    """The family with this Hugging Face class name.  Raises UnsupportedModel."""
    return _find(name, {a: f for f in all_families() for a in f.architectures}, "architecture")


def by_gguf(arch: str) -> Family:
    """The family with this ``general.architecture`` of GGUF.  Raises UnsupportedModel."""
    return _find(arch, {a: f for f in all_families() for a in f.gguf}, "GGUF architecture")


def describe(config: Mapping[str, Any]) -> tuple[Family, Architecture]:
    """The family and hyper-parameters that a Hugging Face config.json states.

    Raises UnsupportedModel for whatever would compute something else than pi2 does, FormatError for nonsense.
    """
    _refuse(config)
    names = config.get("architectures")
    if not (isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)):
        raise UnsupportedModel(
            "config.json does not name one architecture",
            hint=f'add "architectures": [...] with one of {_listed(_all_names())}',
        )
    family = by_architecture(names[0])
    return family, family.configure(config)


def _refuse(config: Mapping[str, Any]) -> None:
    """Kinds of models that no family here covers, recognised whatever their class is called."""
    for key, value in config.items():
        if value and ("expert" in key or key.startswith("moe_")):
            raise UnsupportedModel(
                f"mixture-of-experts models are not supported, and this is one ({key} in config.json)",
                hint="use the dense model of the same family",
            )
    if config.get("quantization_config"):
        raise UnsupportedModel(
            "the weights are quantised by a method of Hugging Face's (quantization_config in config.json)",
            hint="convert the original f16 or bf16 weights, or a GGUF file; pi2 quantises itself (--quant)",
        )


def _all_names() -> list[str]:
    return [a for f in all_families() for a in f.architectures]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _find(name: str, known: Mapping[str, Family], kind: str) -> Family:
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    nearest = f"did you mean {close[0]!r}? " if close else ""
    raise UnsupportedModel(f"no family of models has the {kind} {name[:80]!r}",
                           hint=f"{nearest}known: {_listed(known)}")  # fmt: skip
