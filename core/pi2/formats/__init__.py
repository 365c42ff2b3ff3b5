"""Importers of foreign model files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pi2.api import ModelFormat
from pi2.errors import FormatError


def detect(path: Path, formats: Iterable[type[ModelFormat]]) -> type[ModelFormat]:
    """The one of ``formats`` that recognises ``path``.  Raises FormatError if none does, or several do."""
    known = sorted(formats, key=lambda f: f.name)
    if not path.exists():
        raise FormatError(f"{path}: no such file or directory", hint="check the path")
    matches = [f for f in known if f.recognises(path)]
    if len(matches) == 1:
        return matches[0]
    names = ", ".join(f.name for f in matches or known)
    if matches:
        raise FormatError(f"{path}: several formats claim it: {names}", hint="restrict the plugins")
    raise FormatError(f"{path}: no known model format", hint=f"pi2 reads: {names or 'nothing'}")
