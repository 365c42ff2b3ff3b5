"""Settings from outside: the only reader of ``os.environ`` in the project.

PI2_PLUGINS   load only these plugins, by entry-point name, comma-separated ("" loads none)
PI2_MODEL     model to use when the command line names none
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment says, read once."""

    plugins: frozenset[str] | None = None  # None: all that are installed
    model: str | None = None

    @classmethod
    def from_environment(cls) -> Settings:
        names = os.environ.get("PI2_PLUGINS")
        plugins = None
        if names is not None:
            plugins = frozenset(n.strip() for n in names.split(",") if n.strip())
        return cls(plugins=plugins, model=os.environ.get("PI2_MODEL") or None)
