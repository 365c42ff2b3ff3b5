"""The GGUF container, versions 2 and 3: header, metadata, directory of tensors, mapped data.

    magic "GGUF" | u32 version | u64 tensors | u64 pairs | pairs (key, type, value) | directory | data

Source: docs/gguf.md of the ggml project.  The file is hostile until proven otherwise: every count, length
and offset is compared with the bytes that are really there before anything is allocated for it.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pi2.errors import FormatError, StorageError, UnsupportedModel
from pi2.formats.gguf_blocks import BLOCKS, type_name
from pi2.tensor import U8

MAGIC = b"GGUF"
POWERINFER_MAGIC = b"PWRI"
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
# Far above any model in existence; they bound what Python objects a header can ask for.
_MAX_PAIRS = _MAX_TENSORS = 1 << 16
_MAX_STRINGS = 1 << 22
_MAX_NAME = 1 << 16


@dataclass(frozen=True, slots=True)
class Strings:
    """An array of strings, left where it lies in the file and decoded while it is iterated."""

    buffer: mmap.mmap
    offset: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[str]:
        at = self.offset
        for _ in range(self.count):
            (length,) = struct.unpack_from("<Q", self.buffer, at)
            at += 8 + length
            yield _decode(self.buffer[at - length : at])


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """An entry of the directory.  ``shape`` is (rows, cols), or (n,) for a vector; ``offset`` in the file."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    nbytes: int


class GgufFile:
    """One GGUF file, mapped and checked.

    ``metadata`` maps keys to int, float, bool, str, a NumPy array (a view of the file) or :class:`Strings`.
    Raises StorageError if it cannot be read, FormatError if it is damaged, UnsupportedModel if it is of
    another version or holds a type of tensor that pi2 does not decode.
    """

    def __init__(self, path: Path, *, powerinfer: bool = False) -> None:
        """``powerinfer`` takes PowerInfer's files too, for what is in them beside the model."""
        self.path = path
        self._buffer = _map(path)
        reader = _Reader(self._buffer, path)
        n_tensors, n_pairs = self._header(reader, powerinfer)
        self.metadata: dict[str, Any] = {}
        for _ in range(n_pairs):
            key = reader.string("the name of a metadata key", _MAX_NAME)
            if key in self.metadata:
                raise FormatError(f"{path.name}: the metadata key {key!r} occurs twice")
            self.metadata[key] = reader.value(reader.scalar("<I"), key)
        alignment = self._alignment()
        directory = [_entry(reader) for _ in range(n_tensors)]
        start = -(-reader.at // alignment) * alignment
        self.tensors = _placed(directory, start, alignment, self._buffer, path)

    @property
    def size_bytes(self) -> int:
        return len(self._buffer)

    def data(self, info: TensorInfo) -> U8:
        """The bytes of a tensor as (rows, bytes of a row) uint8, a read-only view of the file."""
        raw = np.frombuffer(self._buffer, np.uint8, info.nbytes, info.offset)
        return raw.reshape(1 if len(info.shape) == 1 else info.shape[0], -1)

    def _header(self, reader: _Reader, powerinfer: bool) -> tuple[int, int]:
        magic = bytes(self._buffer[:4])
        if magic == POWERINFER_MAGIC and not powerinfer:
            raise UnsupportedModel(
                f"{self.path.name} is a PowerInfer GGUF; its predictors and neuron order are not supported",
                hint="convert the original Hugging Face model, then: pi2 train-predictor MODEL --from FILE",
            )
        if magic not in (MAGIC, POWERINFER_MAGIC):
            raise FormatError(f"{self.path.name} is not a GGUF file: it begins with {magic!r}")
        reader.at = 4
        version = reader.scalar("<I")
        if version not in (2, 3):
            big_endian = " (it is big-endian)" if version in (2 << 24, 3 << 24) else ""
            raise UnsupportedModel(
                f"{self.path.name} is GGUF of version {version}{big_endian}; little-endian 2 and 3 are read",
                hint="convert the model again with a current converter",
            )
        n_tensors, n_pairs = reader.scalar("<Q"), reader.scalar("<Q")
        if n_tensors > _MAX_TENSORS or n_pairs > _MAX_PAIRS:
            raise FormatError(f"{self.path.name}: {n_tensors} tensors and {n_pairs} metadata keys cannot be")
        return n_tensors, n_pairs

    def _alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise FormatError(f"{self.path.name}: an alignment of {str(alignment)[:40]} bytes cannot be")
        return alignment


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            if path.stat().st_size < 24:
                raise FormatError(f"{path.name} is too short to be a GGUF file", hint="download it again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as e:
        raise StorageError(f"cannot be read: {e.strerror or e}", path=path) from None


def _decode(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise FormatError(f"a string of the GGUF metadata is not UTF-8: {raw[:40]!r}") from None


@dataclass(slots=True)
class _Reader:
    """A cursor that never passes the end of the file."""

    buffer: mmap.mmap
    path: Path
    at: int = 0

    def take(self, nbytes: int, what: str) -> int:
        """Step over ``nbytes`` and return where they begin."""
        begin = self.at
        if nbytes > len(self.buffer) - begin:
            raise FormatError(
                f"{self.path.name}: the file ends inside of {what}, at byte {begin}", hint="download it again"
            )
        self.at = begin + nbytes
        return begin

    def scalar(self, form: str, what: str = "the header") -> Any:
        return struct.unpack_from(form, self.buffer, self.take(struct.calcsize(form), what))[0]

    def string(self, what: str, limit: int) -> str:
        length = self.scalar("<Q", what)
        if length > limit:
            raise FormatError(f"{self.path.name}: {what} of {length} bytes cannot be")
        begin = self.take(length, what)
        return _decode(self.buffer[begin : self.at])

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string(key, len(self.buffer))
        if kind == _ARRAY:
            return self.array(key)
        if kind not in _SCALARS:
            raise FormatError(f"{self.path.name}: the metadata key {key!r} has the unknown type {kind}")
        return self.scalar(_SCALARS[kind], key)

    def array(self, key: str) -> Any:
        kind, count = self.scalar("<I", key), self.scalar("<Q", key)
        if kind == _STRING:
            begin = self.at
            if count > _MAX_STRINGS:
                raise FormatError(f"{self.path.name}: {key!r} with {count} strings cannot be")
            self._skip_strings(count, key)
            return Strings(self.buffer, begin, count)
        if kind not in _SCALARS:
            raise FormatError(
                f"{self.path.name}: {key!r} is an array of elements of type {kind}, which pi2 does not read"
            )
        form = "<u1" if kind == _BOOL else _SCALARS[kind]
        begin = self.take(count * np.dtype(form).itemsize, key)
        return np.frombuffer(self.buffer, form, count, begin)

    def _skip_strings(self, count: int, key: str) -> None:
        at, size, unpack = self.at, len(self.buffer), struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > size:
                at = size + 1  # refused by take
                break
            at += 8 + unpack(self.buffer, at)[0]
        self.take(at - self.at, key)


def _entry(reader: _Reader) -> TensorInfo:
    """One entry of the directory; its offset still counts from the start of the data."""
    name = reader.string("the name of a tensor", _MAX_NAME)
    n_dims = reader.scalar("<I", name)
    if not 1 <= n_dims <= 4:
        raise FormatError(f"the tensor {name!r} has {n_dims} dimensions")
    dims = [reader.scalar("<Q", name) for _ in range(n_dims)]
    kind, offset = reader.scalar("<I", name), reader.scalar("<Q", name)
    while len(dims) > 2 and dims[-1] == 1:
        dims.pop()
    if kind not in BLOCKS:
        raise UnsupportedModel(
            f"the tensor {name!r} is of type {type_name(kind)}, which pi2 does not decode",
            hint="use a file quantised as Q4_0, Q8_0, Q4_K_M, Q6_K or F16",
        )
    weights, size = BLOCKS[kind]
    if dims[0] % weights:
        raise FormatError(f"the tensor {name!r} has rows of {dims[0]} weights, not a multiple of {weights}")
    # Python's integers do not overflow: an absurd product is only a large number, refused in _placed.
    nbytes = dims[0] // weights * size
    for dim in dims[1:]:
        nbytes *= dim
    return TensorInfo(name, tuple(reversed(dims)), kind, offset, nbytes)


def _placed(
    directory: list[TensorInfo], start: int, alignment: int, buffer: mmap.mmap, path: Path
) -> dict[str, TensorInfo]:
    """Name -> entry with its offset in the file, after checking that all lie in it, apart and aligned."""
    tensors: dict[str, TensorInfo] = {}
    end = start
    for info in sorted(directory, key=lambda t: t.offset):
        begin = start + info.offset
        if info.name in tensors:
            raise FormatError(f"{path.name}: the tensor {info.name!r} occurs twice")
        if info.nbytes == 0 or begin + info.nbytes > len(buffer):
            raise FormatError(
                f"{path.name}: the tensor {info.name!r} of {info.nbytes} bytes is not inside of the file",
                hint="download it again",
            )
        if info.offset % alignment or begin < end:
            raise FormatError(f"{path.name}: the tensor {info.name!r} is misaligned or overlaps another")
        end = begin + info.nbytes
        tensors[info.name] = TensorInfo(info.name, info.shape, info.type, begin, info.nbytes)
    return tensors
