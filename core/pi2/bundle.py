"""Neuron bundles: where the gate, up and down weights of one neuron lie, as pure arithmetic.

A bundle holds, contiguously, one neuron's gate row, up row and down column, and its biases where the
model has them (PowerInfer-2 §4.4: one bundle is one small read).  An FFN is ``neurons`` bundles at a
fixed stride, so the place of neuron i is ``i * stride``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pi2.errors import FormatError
from pi2.tensor import DTYPES, F32, U8, DType, Ids, decode, encode, row_bytes

SEGMENT_ALIGN = 16  # one NEON vector or 128-bit lane; rows of wide models come out 64-aligned anyway
PAGE = 4096  # default logical block of the device
LEAST_PAGE = 64  # packs bundles without gaps: reads are widened to blocks when they are made


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


@dataclass(frozen=True, slots=True)
class Neurons:
    """Weights of k neurons as float32: gate (k, d) or None, up (k, d), down (k, d), biases (k,) or None."""

    gate: F32 | None
    up: F32
    down: F32
    gate_bias: F32 | None = None
    up_bias: F32 | None = None

    def __getitem__(self, rows: Ids | slice) -> Neurons:
        def take(a: F32 | None) -> F32 | None:
            return None if a is None else a[rows]

        return Neurons(
            take(self.gate), self.up[rows], self.down[rows], take(self.gate_bias), take(self.up_bias)
        )


@dataclass(frozen=True, slots=True)
class BundleGeometry:
    """Byte layout of a bundle of a ``d_model``-wide FFN.  ``gate`` is None for an FFN without a gate."""

    d_model: int
    gate: DType | None
    up: DType
    down: DType
    biased: bool = False
    page: int = PAGE

    def segments(self) -> dict[str, tuple[int, int]]:
        """Name -> (offset, bytes) of each segment, in file order: gate, up, down, bias."""
        at = 0
        places: dict[str, tuple[int, int]] = {}
        for name, dtype in (("gate", self.gate), ("up", self.up), ("down", self.down)):
            if dtype is not None:
                size = row_bytes(dtype, self.d_model)
                places[name] = (at, size)
                at = _up(at + size, SEGMENT_ALIGN)
        if self.biased:
            places["bias"] = (at, 4 * (1 if self.gate is None else 2))
        return places

    @property
    def nbytes(self) -> int:
        """Bytes of a bundle without padding at its end."""
        offset, size = list(self.segments().values())[-1]
        return offset + size

    @property
    def stride(self) -> int:
        """Distance of two bundles, so that neuron i starts at byte ``i * stride`` of its FFN.

        A bundle of a page or more takes whole pages.  A smaller one takes the smallest power-of-two
        share of a page that holds it, so that it never straddles two, unless that wastes more than an
        eighth of the file; then bundles are only aligned to SEGMENT_ALIGN.
        """
        need = _up(self.nbytes, SEGMENT_ALIGN)
        if need >= self.page:
            return _up(need, self.page)
        share = self.page
        while share // 2 >= need:
            share //= 2
        return share if need * 8 >= share * 7 else need

    def pack_into(self, bundles: U8, name: str, values: F32 | U8) -> None:
        """Write one segment of every bundle in ``bundles`` (k, stride).

        ``values`` is float32 (k, d), or uint8 (k, bytes) that is already in the segment's format.
        """
        offset, size = self.segments()[name]
        if values.dtype != np.uint8:
            dtype: DType = "f32" if name == "bias" else getattr(self, name)
            values = encode(np.asarray(values, dtype=np.float32), dtype)
        bundles[:, offset : offset + size] = values

    def unpack(self, bundles: U8) -> Neurons:
        """(k, stride) uint8 -> float32 weights, exactly."""
        gate = None if self.gate is None else self.unpack_segment(bundles, "gate")
        up, down = self.unpack_segment(bundles, "up"), self.unpack_segment(bundles, "down")
        if not self.biased:
            return Neurons(gate, up, down)
        bias = self.unpack_segment(bundles, "bias")
        return Neurons(gate, up, down, None if gate is None else bias[:, 0], bias[:, -1])

    def unpack_segment(self, bundles: U8, name: str) -> F32:
        """One segment of (k, stride) uint8 as float32, exactly: (k, d), or the biases (k, 1 or 2)."""
        offset, size = self.segments()[name]
        dtype: DType = "f32" if name == "bias" else getattr(self, name)
        return decode(bundles[:, offset : offset + size], dtype)

    def to_dict(self) -> dict[str, Any]:
        """For the manifest: what defines the layout, and the arithmetic spelt out for other readers."""
        return {
            "d_model": self.d_model,
            "gate": self.gate,
            "up": self.up,
            "down": self.down,
            "biased": self.biased,
            "page": self.page,
            "stride": self.stride,
            "segments": {name: list(place) for name, place in self.segments().items()},
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> BundleGeometry:
        """Read back and check; the derived numbers must agree.  Raises FormatError."""
        names = ("d_model", "gate", "up", "down", "biased", "page")
        try:
            d_model, gate, up, down, biased, page = (raw[k] for k in names)
        except (KeyError, TypeError) as e:
            raise FormatError(f"the bundle geometry lacks {e}") from None
        ok = (
            type(d_model) is int
            and 0 < d_model <= 1 << 20
            and (gate is None or gate in DTYPES)
            and up in DTYPES
            and down in DTYPES
            and type(biased) is bool
            and type(page) is int
            and LEAST_PAGE <= page <= 1 << 20
            and page & (page - 1) == 0
        )
        if not ok:
            raise FormatError("the bundle geometry has impossible values")
        geometry = cls(d_model, gate, up, down, biased, page)
        if geometry.to_dict() != dict(raw):
            raise FormatError("the bundle geometry contradicts itself")
        return geometry
