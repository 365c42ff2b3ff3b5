"""Headers of safetensors files, read as hostile input and written with the data at a page boundary.

A file is: header length (8 bytes, little-endian), header (JSON, padded with spaces), data.  Tensors lie
back to back in the data, without holes, as the `safetensors` library demands.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pi2.errors import FormatError

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
MAX_HEADER = 100_000_000  # the limit of the safetensors library
_MAX_DIMS = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file.  ``offset`` counts from the start of the file, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file holds."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data_start: int


def read_header(path: Path, max_bytes: int = MAX_HEADER) -> Header:
    """Read and check the header of ``path``; touches no tensor.

    Every offset, shape and dtype of the result agrees with the file's size.  Raises FormatError that
    names the file if anything does not add up, and OSError if it cannot be read.
    """
    try:
        return _read(path, max_bytes)
    except FormatError as e:
        hint = "the file is incomplete or damaged: fetch or convert it again"
        raise FormatError(f"{path}: {e}", hint=hint) from None


def _read(path: Path, max_bytes: int) -> Header:
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
        raise FormatError("not a regular file")
    with path.open("rb") as f:
        size = os.fstat(f.fileno()).st_size
        if size < 8:
            raise FormatError(f"{size} bytes cannot be a safetensors file")
        (length,) = struct.unpack("<Q", f.read(8))
        if length > size - 8 or length > max_bytes:
            raise FormatError(f"the header claims {length} bytes, the file has {size}")
        text = f.read(length)
    raw = parse_json(text, "the header")
    if text[:1] != b"{":
        raise FormatError("the header is not a JSON object")
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError("the metadata is not a mapping of texts")
    start = 8 + length
    entries = {name: _entry(name, value, start) for name, value in raw.items()}
    _check_places(entries, start, size)
    return Header(entries, metadata, start)


def _entry(name: str, raw: Any, start: int) -> Entry:
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"the description of {name[:80]!r} is malformed")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise FormatError(f"{name[:80]!r} has the unknown dtype {str(dtype)[:20]!r}")
    if not (_sizes(shape) and len(shape) <= _MAX_DIMS and _sizes(offsets) and len(offsets) == 2):
        raise FormatError(f"the shape or the offsets of {name[:80]!r} are malformed")
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise FormatError(f"the shape of {name[:80]!r} does not fit its {offsets[1] - offsets[0]} bytes")
    return Entry(dtype, tuple(shape), start + offsets[0], nbytes)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in value)


def _check_places(entries: Mapping[str, Entry], start: int, size: int) -> None:
    """Back to back from the start of the data to the end of the file: no hole, no overlap."""
    at = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != at:
            raise FormatError(f"{name[:80]!r} starts at byte {entry.offset}, not where the last one ends")
        at += entry.nbytes
    if at != size:
        raise FormatError(f"the tensors end at byte {at}, the file at {size}")


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object without NaN, repeated keys or absurd nesting.  Raises FormatError."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except RecursionError:
        raise FormatError(f"{what} is nested too deeply") from None
    except ValueError as e:  # also bad UTF-8, and integers of thousands of digits
        raise FormatError(f"{what} is not JSON: {str(e)[:120]}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{what} is not a JSON object")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not allowed")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key is repeated")
    return value


def build_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str], align: int
) -> tuple[bytes, Header]:
    """Lay ``tensors`` (name -> safetensors dtype, shape) back to back, in order.

    Returns the bytes before the data, padded so that the data starts at a multiple of ``align``, and
    what :func:`read_header` will say of the finished file.
    """
    raw: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * ITEM_BYTES[dtype]
        raw[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(raw, separators=(",", ":")).encode()
    start = -(-(8 + len(text)) // align) * align
    head = struct.pack("<Q", start - 8) + text.ljust(start - 8)
    raw.pop("__metadata__", None)
    return head, Header({n: _entry(n, v, start) for n, v in raw.items()}, dict(metadata), start)
