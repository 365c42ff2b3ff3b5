"""Optional dependencies: asked for by name, so that what is missing is one clear sentence."""

from __future__ import annotations

import importlib

from pi2.errors import Pi2Error


def require_torch(purpose: str) -> None:
    """Raise Pi2Error unless PyTorch can be imported.  ``purpose`` begins the sentence: "training"."""
    try:
        importlib.import_module("torch")
    except ImportError as e:
        missing = isinstance(e, ModuleNotFoundError) and e.name == "torch"
        reason = "is not installed" if missing else f"cannot be imported: {' '.join(str(e).split())[:160]}"
        raise Pi2Error(
            f"{purpose} needs PyTorch, which {reason}", hint="python3 -m pip install 'pi2[train]'"
        ) from None
