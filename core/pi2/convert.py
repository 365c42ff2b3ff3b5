"""Conversion of a foreign model into a pi2 model: streaming, resumable, atomic."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import pi2
from pi2 import inventory
from pi2.api import ModelSource
from pi2.bundle import PAGE
from pi2.container.layout import DENSE, NEURONS, Layout, QuantPlan, plan_layout
from pi2.container.manifest import VERSION, Manifest, check_writable
from pi2.container.writer import (
    PartialModel,
    check_replaceable,
    destination_exists,
    partial_path,
)
from pi2.errors import BudgetError, FormatError, StorageError
from pi2.tensor import F32, U8, DType, Tensor, encode

CHUNK = 8 << 20  # bytes of float32 that are encoded at a time
_LARGEST = {"f32": np.inf, "f16": 65504.0, "q8_0": 65504.0 * 127, "q4_0": 65504.0 * 8}  # scales are fp16
Progress = Callable[[str, int, int], None]
"""Called with what was just done, bytes done, bytes in all."""


def convert(
    source: ModelSource,
    destination: Path,
    quant: QuantPlan,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
    page: int = PAGE,
) -> Path:
    """Write ``source`` as a pi2 model at ``destination`` and return that path.

    Matrices that the source has in the wanted format are taken over bit for bit; what could not be
    stored as asked is in the manifest's notes.  Memory: one tensor of the source and ``CHUNK``.
    The destination is complete or does not exist; a run that was stopped is continued by the next one.

    Raises FormatError (destination exists, source contradicts itself, weights beyond the format's
    range), BudgetError (disk too small), StorageError (disk full, a second converter).
    """
    destination = Path(os.path.abspath(destination))  # noqa: PTH100  (resolve() would follow links)
    if destination.exists() or destination.is_symlink():
        if not overwrite:
            raise destination_exists(destination)
        check_replaceable(destination)
    source.architecture.check()
    try:
        return _convert(
            source, destination, plan_layout(source.architecture, quant, page), progress, overwrite
        )
    except OSError as e:
        place = Path(e.filename) if isinstance(e.filename, str) else partial_path(destination)
        hint = "make room or choose another place; running it again continues where it stopped"
        raise StorageError(f"{e.strerror or e}", path=place, hint=hint) from e


def _convert(
    source: ModelSource, destination: Path, layout: Layout, progress: Progress | None, overwrite: bool
) -> Path:
    arch = source.architecture
    vectors = {name: _vector(source, name, n) for name, n in inventory.dense_vectors(arch).items()}
    texts = _texts(source)
    destination.parent.mkdir(parents=True, exist_ok=True)
    text_bytes = sum(map(len, texts.values()))
    _check_disk(destination, layout.nbytes + text_bytes)
    # Weights are written; then everything is read for its checksum.
    meter = _Meter(progress, 2 * layout.nbytes + text_bytes)
    fingerprint = _fingerprint(source, layout, vectors, texts)
    manifest = Manifest(
        family=arch.family,
        source=dict(source.provenance),
        quantisation=layout.summary(),
        geometry=layout.geometry,
        files={},
        notes=(*source.notes, *layout.notes),
    )
    check_writable(manifest)
    with PartialModel(destination, fingerprint, layout.files) as partial:
        _write_weights(partial, layout, source, vectors, meter)
        return partial.finish(
            manifest, texts, overwrite=overwrite, on_bytes=lambda name, n: meter.add(f"checksum of {name}", n)
        )


def _write_weights(
    partial: PartialModel, layout: Layout, source: ModelSource, vectors: Mapping[str, F32], meter: _Meter
) -> None:
    """Every step that an earlier run has not done."""
    dense, neurons = (layout.files[name][1].entries for name in (DENSE, NEURONS))
    if "vectors" not in partial.done:
        for name, values in vectors.items():
            partial.write(DENSE, dense[name].offset, values.view(np.uint8))
        partial.mark("vectors", DENSE)
    ffns = [inventory.ffn_name(layer) for layer in range(source.architecture.n_layers)]
    large = sum(dense[n].nbytes for n in layout.dtypes) + sum(neurons[n].nbytes for n in ffns)
    meter.add("vectors", layout.nbytes - large)  # with headers and padding
    for name in layout.dtypes:
        if name not in partial.done:
            _write_matrix(partial, layout, source, name)
            partial.mark(name, DENSE)
        meter.add(name, dense[name].nbytes)
    for layer, name in enumerate(ffns):
        if name not in partial.done:
            _write_ffn(partial, layout, source, layer)
            partial.mark(name, NEURONS)
        meter.add(name, neurons[name].nbytes)


def _texts(source: ModelSource) -> dict[str, bytes]:
    """File name -> contents of what is not weights."""
    texts = {
        "config.json": json.dumps(source.architecture.to_dict(), indent=1),
        "tokenizer.json": source.tokenizer_json(),
    }
    if (template := source.chat_template()) is not None:
        texts["chat_template.jinja"] = template
    try:
        return {name: text.encode() for name, text in texts.items()}
    except UnicodeEncodeError:
        raise FormatError("the tokenizer or chat template of the source is not valid Unicode") from None


class _Meter:
    """Adds up what is done for the progress callback."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, what: str, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress(what, self._done, self._total)


def _fingerprint(
    source: ModelSource, layout: Layout, vectors: Mapping[str, F32], texts: Mapping[str, bytes]
) -> str:
    """Names what is being written.  The norms stand for all weights: no two checkpoints share them."""
    what: dict[str, Any] = {
        "pi2": [pi2.__version__, VERSION],
        "source": dict(source.provenance),
        "notes": list(source.notes),
        "dtypes": dict(layout.dtypes),
        "bundle": layout.geometry.to_dict(),
    }
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode())
    for part in (*texts.values(), *(values.tobytes() for values in vectors.values())):
        digest.update(part)
    return digest.hexdigest()


def _check_disk(destination: Path, needed: int) -> None:
    """Raise BudgetError unless the disk has room for what an earlier run has not yet written."""
    partial = partial_path(destination)
    there = sum(p.lstat().st_blocks * 512 for p in partial.iterdir()) if partial.is_dir() else 0
    free = shutil.disk_usage(destination.parent).free
    if needed - there > free:
        raise BudgetError(
            f"{destination.parent}: {(needed - there) / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free",
            hint="make room, choose another place, or a smaller format with --quant",
        )


def _vector(source: ModelSource, name: str, n: int) -> F32:
    values = np.ascontiguousarray(source.vector(name), np.float32)
    if values.shape != (n,):
        raise FormatError(f"{name} of the source has the shape {values.shape}, not {(n,)}")
    return values


def _chunks(
    source: ModelSource, name: str, shape: tuple[int, int], dtype: DType
) -> Iterator[tuple[int, int, U8]]:
    """A matrix of the source as (first row, end row, bytes in ``dtype``), a few rows at a time."""
    tensor = source.tensor(name)
    if tensor.shape != shape:
        raise FormatError(f"{name} of the source has the shape {tensor.shape}, not {shape}")
    step = max(1, CHUNK // (4 * shape[1]))
    for first in range(0, shape[0], step):
        end = min(first + step, shape[0])
        yield first, end, _encoded(name, tensor, slice(first, end), dtype)


def _encoded(name: str, tensor: Tensor, rows: slice, dtype: DType) -> U8:
    """Rows of ``tensor`` in ``dtype``: its own bytes if it has that format, else rounded."""
    if tensor.dtype == dtype:
        return tensor.data[rows]
    values = tensor.to_f32(rows)
    if not np.isfinite(values).all():
        raise FormatError(
            f"{name} of the source has weights that are not finite", hint="the source is damaged"
        )
    if values.size and np.abs(values).max() > _LARGEST[dtype]:
        raise FormatError(f"{name} has weights too large for {dtype}", hint="use --quant f32 for this model")
    return encode(values, dtype)


def _write_matrix(partial: PartialModel, layout: Layout, source: ModelSource, name: str) -> None:
    entry = layout.files[DENSE][1].entries[name]
    shape = inventory.dense_matrices(source.architecture)[name]
    for first, _, data in _chunks(source, name, shape, layout.dtypes[name]):
        partial.write(DENSE, entry.offset + first * (entry.nbytes // shape[0]), data)


def _write_ffn(partial: PartialModel, layout: Layout, source: ModelSource, layer: int) -> None:
    """One segment of all bundles after the other, so that only one matrix is in memory."""
    arch, geometry = source.architecture, layout.geometry
    start = layout.files[NEURONS][1].entries[inventory.ffn_name(layer)].offset

    def fill(segment: str, first: int, end: int, data: F32 | U8) -> None:
        place, nbytes = start + first * geometry.stride, (end - first) * geometry.stride
        bundles = partial.read(NEURONS, place, nbytes).reshape(end - first, geometry.stride)
        geometry.pack_into(bundles, segment, data)
        partial.write(NEURONS, place, bundles)

    for segment, name in inventory.neuron_matrices(arch, layer).items():
        for first, end, data in _chunks(
            source, name, (arch.n_neurons, arch.d_model), getattr(geometry, segment)
        ):
            fill(segment, first, end, data)
    biases = [_vector(source, name, arch.n_neurons) for name in inventory.neuron_biases(arch, layer)]
    if biases:
        step = max(1, CHUNK // geometry.stride)
        table = np.stack(biases, axis=1)  # (neurons, 1 or 2)
        for first in range(0, arch.n_neurons, step):
            end = min(first + step, arch.n_neurons)
            fill("bias", first, end, table[first:end])
