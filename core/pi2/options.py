"""From the text of an option to the value that a plugin's ``__init__`` takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pi2.errors import OptionError

_YES, _NO = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def parse_options(cls: type, options: Mapping[str, str]) -> dict[str, Any]:
    """Texts -> arguments of ``cls.__init__``, by its annotations (int, float, bool, str)."""
    parameters = inspect.signature(cls).parameters
    converters: dict[str, Callable[[str], Any]] = {
        "int": int,
        "float": float,
        "bool": _parse_bool,
        "str": str,
    }
    parsed: dict[str, Any] = {}
    for key, text in options.items():
        if key not in parameters:
            known = ", ".join(sorted(parameters)) or "none"
            raise OptionError(f"{cls.__name__} has no option {key!r}", hint=f"its options: {known}")
        annotation = parameters[key].annotation
        kind = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
        kind = kind.removesuffix(" | None")
        try:
            parsed[key] = converters[kind](text)
        except (ValueError, KeyError):
            raise OptionError(f"option {key} of {cls.__name__} takes a {kind}, not {text!r}") from None
    return parsed


def _parse_bool(text: str) -> bool:
    word = text.lower()
    if word not in (*_YES, *_NO):
        raise ValueError(text)
    return word in _YES
