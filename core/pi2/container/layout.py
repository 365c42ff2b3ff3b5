"""How a model's tensors are stored and where in the two weight files they lie."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from pi2 import inventory
from pi2.architecture import Architecture
from pi2.bundle import PAGE, BundleGeometry
from pi2.container.safetensors_file import Header, build_header
from pi2.errors import OptionError
from pi2.tensor import BLOCK, DTYPES, DType, row_bytes

DENSE: Final = "dense.safetensors"
NEURONS: Final = "neurons.safetensors"
_STORED_AS = {"f32": "F32", "f16": "F16", "q8_0": "U8", "q4_0": "U8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantPlan:
    """The storage format wanted for each kind of matrix.  ``head`` is not used by tied models."""

    gate: DType
    up: DType
    down: DType
    attention: DType
    embed: DType
    head: DType

    @classmethod
    def named(cls, name: str, **overrides: str | None) -> QuantPlan:
        """All matrices as ``name``, but for q4_0 embedding and head as q8_0; ``overrides`` by field.

        Raises OptionError for an unknown format or field.
        """
        fields = [f.name for f in dataclasses.fields(cls)]
        chosen = dict.fromkeys(fields, name)
        if name == "q4_0":  # a token's embedding is used whole: 4 bits cost quality there, and no speed
            chosen |= {"embed": "q8_0", "head": "q8_0"}
        chosen |= {key: value for key, value in overrides.items() if value is not None}
        for key, value in chosen.items():
            if key not in fields:
                raise OptionError(f"no kind of matrix is called {key!r}", hint=f"known: {', '.join(fields)}")
            if value not in DTYPES:
                raise OptionError(f"no weight format is called {value!r}", hint=f"known: {', '.join(DTYPES)}")
        return cls(**chosen)  # type: ignore[arg-type]  # checked against DTYPES


@dataclass(frozen=True, slots=True)
class Layout:
    """What is stored how and where: the plan, as far as the model allows it."""

    dtypes: Mapping[str, DType]  # dense matrix -> format
    geometry: BundleGeometry
    files: Mapping[str, tuple[bytes, Header]]
    notes: tuple[str, ...]  # where the plan was not followed

    @property
    def nbytes(self) -> int:
        return sum(file_bytes(*file) for file in self.files.values())

    def summary(self) -> dict[str, DType]:
        """Kind of matrix -> format that it is stored in; exceptions are in the notes."""
        g, dtypes = self.geometry, self.dtypes
        kinds = {"gate": g.gate, "up": g.up, "down": g.down, "attention": dtypes["layers.0.attn.q.weight"]}
        kinds |= {"embed": dtypes["embed.weight"], "head": dtypes.get("head.weight")}
        return {kind: dtype for kind, dtype in kinds.items() if dtype is not None}


def plan_layout(arch: Architecture, quant: QuantPlan, page: int = PAGE) -> Layout:
    """Lay out both weight files.  Matrices whose rows are no multiple of 32 fall back to f16, with a note."""
    notes: dict[str, None] = {}  # an ordered set

    def possible(wanted: DType, cols: int, what: str) -> DType:
        if wanted in ("f32", "f16") or cols % BLOCK == 0:
            return wanted
        what = re.sub(r"\.\d+\.", ".*.", what)
        notes[f"{what}: rows of {cols} weights cannot be stored as {wanted}, so they are f16"] = None
        return "f16"

    matrices = inventory.dense_matrices(arch)
    dtypes = {n: possible(_wanted(quant, n), cols, n) for n, (_, cols) in matrices.items()}
    segments = {
        part: possible(getattr(quant, part), arch.d_model, name)
        for part, name in inventory.neuron_matrices(arch, 0).items()
    }
    geometry = BundleGeometry(
        arch.d_model, segments.get("gate"), segments["up"], segments["down"], arch.ffn_bias, page
    )
    geometry = BundleGeometry.from_dict(geometry.to_dict())  # refuses a page size that cannot be
    stored = {n: stored_shape(dtypes[n], *shape) for n, shape in matrices.items()}
    stored |= {n: ("F32", (length,)) for n, length in inventory.dense_vectors(arch).items()}
    files = {
        DENSE: build_header(dict(sorted(stored.items(), key=_by_alignment)), dtypes, PAGE),
        NEURONS: build_header(neuron_tensors(geometry, arch), {}, max(PAGE, page)),
    }
    return Layout(dtypes, geometry, files, tuple(notes))


def _wanted(quant: QuantPlan, name: str) -> DType:
    kind = name.partition(".")[0]
    return {"embed": quant.embed, "head": quant.head}.get(kind, quant.attention)


def _by_alignment(item: tuple[str, tuple[str, tuple[int, ...]]]) -> tuple[int, bool]:
    """Wide items first, odd sizes last: then as many tensors as possible start at a multiple of 64."""
    dtype, shape = item[1]
    width = {"F32": 4, "F16": 2, "U8": 1}[dtype]
    return -width, int(np.prod(shape)) * width % 64 != 0


def neuron_tensors(geometry: BundleGeometry, arch: Architecture) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensors of ``neurons.safetensors`` in order: name -> safetensors dtype and shape.

    Where an FFN does not end at a page boundary, ``<name>.pad`` (bytes,) fills it up to the next,
    since the format allows no holes.
    """
    align = max(PAGE, geometry.page)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer in range(arch.n_layers):
        name = inventory.ffn_name(layer)
        tensors[name] = "U8", (arch.n_neurons, geometry.stride)
        pad = -(arch.n_neurons * geometry.stride) % align
        if pad:
            tensors[f"{name}.pad"] = "U8", (pad,)
    return tensors


def stored_shape(dtype: DType, rows: int, cols: int) -> tuple[str, tuple[int, ...]]:
    """Safetensors dtype and shape of a dense matrix: quantised rows are bytes."""
    stored = _STORED_AS[dtype]
    return stored, (rows, row_bytes(dtype, cols) if stored == "U8" else cols)


def file_bytes(head: bytes, header: Header) -> int:
    """Size of the finished file."""
    return len(head) + sum(entry.nbytes for entry in header.entries.values())
