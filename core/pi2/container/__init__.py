"""The pi2 model: a directory with a manifest, texts, and two safetensors files of weights."""

from __future__ import annotations

from pi2.container.manifest import FileEntry, Manifest, read_manifest
from pi2.container.reader import PiModel, open_model

__all__ = ["FileEntry", "Manifest", "PiModel", "open_model", "read_manifest"]
