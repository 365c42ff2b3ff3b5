"""The pi2 model: a directory with a manifest, texts, and two safetensors files of weights."""

from __future__ import annotations

from pi2.container.manifest import FileEntry, Manifest, read_manifest
from pi2.container.predictors import FfnPredictor, Measured, Predictors, model_predictors
from pi2.container.reader import PiModel, open_model
from pi2.container.writer import PartialModel, list_file, replace_file

__all__ = [
    "FfnPredictor",
    "FileEntry",
    "Manifest",
    "Measured",
    "PartialModel",
    "PiModel",
    "Predictors",
    "list_file",
    "model_predictors",
    "open_model",
    "read_manifest",
    "replace_file",
]
