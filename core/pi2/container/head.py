"""``head.safetensors``: a low-rank estimate of the LM head, which finds the tokens worth exact logits.

The estimate of the logits of a final state x (d,) is ``rows @ (basis @ x) + mean . x``.

    basis   F32 (rank, d)       mean   F32 (d,): the mean row of the head
    rows    U8: rows of q8_0 (vocab, rank)

Metadata:

    format     "pi2 head 1"
    model      SHA-256 of the ``dense.safetensors`` that it was made for
    measured   JSON: {"tokens": N, "agreement": {"K": share}}: on held-out text, how often the likeliest
               token was among the K best of the estimate
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np

from pi2.architecture import Architecture
from pi2.bundle import PAGE
from pi2.container.layout import stored_shape
from pi2.container.safetensors_file import Header, build_header, parse_json, read_header
from pi2.errors import FormatError
from pi2.tensor import BLOCK, F32, U8, Tensor

HEAD: Final = "head.safetensors"
FORMAT: Final = "pi2 head 1"
TRAIN_HINT: Final = "make it: pi2 train-head MODEL TEXT..."
_MAX_HEADER = 1 << 20


@dataclass(frozen=True, slots=True)
class HeadEstimate:
    """What the file holds."""

    model: str
    rows: Tensor  # (vocab, rank), q8_0
    basis: F32  # (rank, d)
    mean: F32  # (d,)
    tokens: int
    """Held-out tokens of the measurement."""
    agreement: dict[int, float]
    """Candidates K -> share of tokens whose likeliest next token was among them."""

    @property
    def rank(self) -> int:
        return len(self.basis)

    @property
    def nbytes(self) -> int:
        """Bytes that every token reads."""
        return self.rows.data.nbytes + self.basis.nbytes + self.mean.nbytes

    def save(self, path: Path) -> None:
        """Write the file.  Raises OSError."""
        measured = {"tokens": self.tokens, "agreement": {str(k): v for k, v in self.agreement.items()}}
        metadata = {"format": FORMAT, "model": self.model, "measured": json.dumps(measured)}
        shapes = {"basis": ("F32", self.basis.shape), "mean": ("F32", self.mean.shape)}
        head, _ = build_header({**shapes, "rows": stored_shape("q8_0", *self.rows.shape)}, metadata, PAGE)
        with path.open("wb") as f:
            f.write(head)
            for array in (self.basis, self.mean, self.rows.data):
                f.write(np.ascontiguousarray(array).data)

    @classmethod
    def load(cls, path: Path, arch: Architecture, model: str) -> Self:
        """Read the file of the model with ``arch`` whose dense.safetensors has the SHA-256 ``model``.

        Raises FormatError if there is none, or it is damaged or another model's.
        """
        if not path.exists():
            raise FormatError("the model has no estimate of its LM head", hint=TRAIN_HINT)
        try:
            header = read_header(path, _MAX_HEADER)
            found = cls(model, *_arrays(path, header, arch), *_measured(header))
            if header.metadata["model"] != model:
                raise FormatError("made for other weights than the model's")
        except (FormatError, KeyError) as e:
            reason = f"lacks {e}" if isinstance(e, KeyError) else str(e).removeprefix(f"{path}: ")
            raise FormatError(f"{path}: {reason}", hint=f"remove it, and {TRAIN_HINT}") from None
        return found


def _arrays(path: Path, header: Header, arch: Architecture) -> tuple[Tensor, F32, F32]:
    if header.metadata.get("format") != FORMAT:
        raise FormatError(f"the format is not {FORMAT!r}")
    rank = header.entries["basis"].shape[0] if header.entries["basis"].shape else 0
    if not 0 < rank <= arch.d_model or rank % BLOCK:
        raise FormatError(f"a rank of {rank} cannot be")
    wanted = {"basis": ("F32", (rank, arch.d_model)), "mean": ("F32", (arch.d_model,))}
    wanted["rows"] = stored_shape("q8_0", arch.vocab_size, rank)
    for name, shape in wanted.items():
        entry = header.entries[name]
        if (entry.dtype, entry.shape) != shape:
            raise FormatError(f"{name} is {entry.dtype} {entry.shape}, not {shape[0]} {shape[1]}")
    data = np.fromfile(path, np.uint8)

    def part(name: str) -> U8:
        entry = header.entries[name]
        return data[entry.offset : entry.offset + entry.nbytes]

    basis, mean = part("basis").view(np.float32).reshape(rank, -1), part("mean").view(np.float32)
    if not (np.isfinite(basis).all() and np.isfinite(mean).all()):
        raise FormatError("the basis is not finite")
    return Tensor(part("rows").reshape(arch.vocab_size, -1), "q8_0", rank), basis, mean


def _measured(header: Header) -> tuple[int, dict[int, float]]:
    raw = parse_json(header.metadata["measured"].encode(), "the measurement")
    tokens, agreement = raw["tokens"], raw["agreement"]
    try:
        return int(tokens), {int(k): float(v) for k, v in agreement.items()}
    except (AttributeError, TypeError, ValueError):
        raise FormatError("the measurement is malformed") from None
