"""Relufication: the ReLU twin of a SiLU or GELU model, whose zeros pi2 can leave out.

W_down is refitted in closed form, layer by layer; then the twin is distilled from the original, with a
push towards sparsity and its weights rounded as they will be stored.  Needs PyTorch, the extra ``train``;
importing this package does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from pi2.api import ModelSource
from pi2.extras import require_torch
from pi2.relufy.settings import Settings

if TYPE_CHECKING:
    from pi2.relufy.run import Relufication

__all__ = ["Settings", "open_relufication"]


def open_relufication(
    source: ModelSource,
    texts: Sequence[Path],
    destination: Path,
    settings: Settings,
    *,
    start: ModelSource | None = None,
    overwrite: bool = False,
    restart: bool = False,
) -> AbstractContextManager[Relufication]:
    """Begin, or go on with, the training of the twin of ``source`` that will lie at ``destination``.

    It begins as ``start``, a twin of ``source`` already, and without a refit; else as ``source`` with ReLU.
    What is done lies in ``<destination>.training``, locked meanwhile; ``restart`` forgets it.
    Raises Pi2Error: PyTorch is missing, the model is sparse already, texts or settings are unusable,
    ``start`` is no twin of it, ``destination`` is taken, or an earlier training there was of something else.
    """
    require_torch("relufication")
    from pi2.relufy.run import open_run

    return open_run(source, texts, destination, settings, start, overwrite=overwrite, restart=restart)
