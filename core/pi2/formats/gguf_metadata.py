"""Metadata of a GGUF file with the type of every value checked when it is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pi2.errors import FormatError
from pi2.formats.gguf import Strings


class Metadata:
    """Typed access to the pairs of a GGUF file.  A value of the wrong type raises FormatError.

    Without a ``default`` a key must be there; ``None`` as default makes it optional.
    """

    def __init__(self, pairs: Mapping[str, Any], file: str) -> None:
        self.pairs = pairs
        self.file = file

    def __contains__(self, key: str) -> bool:
        return key in self.pairs

    def integer(self, key: str, default: int | None = None) -> int:
        """A number from 0 to 2^24; an array with one number per layer counts if all are the same."""
        value = self._value(key, default)
        if isinstance(value, np.ndarray) and value.size and np.issubdtype(value.dtype, np.integer):
            if (value != value[0]).any():
                raise FormatError(
                    f"{self.file}: {key} differs from layer to layer",
                    hint="pi2 runs models with equal layers",
                )
            value = int(value[0])
        if type(value) is not int or not 0 <= value <= 1 << 24:
            raise self._impossible(key, value)
        return value

    def optional_integer(self, key: str) -> int | None:
        return self.integer(key) if key in self.pairs else None

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self._impossible(key, value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if type(value) is not bool:
            raise self._impossible(key, value)
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._impossible(key, value)
        return value

    def strings(self, key: str) -> Strings:
        value = self._value(key, None)
        if not isinstance(value, Strings):
            raise self._impossible(key, value)
        return value

    def numbers(self, key: str, count: int) -> list[float]:
        """``count`` finite numbers."""
        value = self._value(key, None)
        if not isinstance(value, np.ndarray) or value.size != count or not np.isfinite(value).all():
            raise self._impossible(key, value)
        return list(value.tolist())

    def _value(self, key: str, default: Any) -> Any:
        if key in self.pairs:
            return self.pairs[key]
        if default is None:
            raise FormatError(f"{self.file}: the metadata lack {key}", hint="convert the model again")
        return default

    def _impossible(self, key: str, value: Any) -> FormatError:
        shown = repr(value)[:60] if type(value) in (int, float, bool, str) else f"an array of {len(value)}"
        return FormatError(f"{self.file}: {key} has an impossible value, {shown}")
