"""The weights of a Hugging Face directory: one safetensors file or several, mapped and checked."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pi2.container.safetensors_file import Entry, parse_json, read_header
from pi2.errors import FormatError, StorageError, UnsupportedModel
from pi2.tensor import F32, U8, DType

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
_KINDS: Mapping[str, DType] = {"F32": "f32", "F16": "f16", "BF16": "f32"}  # what each is taken over as
_ITEM = {"F32": 4, "F16": 2, "BF16": 2}
_CHUNK = 1 << 24  # bytes compared at a time


class Checkpoint:
    """Named tensors in one or more safetensors files.

    Headers are read on opening, weights when asked for.  Raises FormatError, UnsupportedModel or
    StorageError, all of which name the file.
    """

    def __init__(self, directory: Path) -> None:
        self._files: dict[str, tuple[Path, Entry]] = {}
        self._maps: dict[Path, U8] = {}
        digest = hashlib.sha256()
        for path, names in _shards(directory):
            header = read_header(path)
            for name in header.entries if names is None else names:
                if name not in header.entries:
                    raise FormatError(f"{path} lacks {name[:120]!r}, which {INDEX} places there")
                self._files[name] = (path, header.entries[name])
            with path.open("rb") as f:
                digest.update(f.read(header.data_start))
        self.sha256 = digest.hexdigest()
        """Of the headers of all files: names, types, shapes and places, but no weights."""

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """As the file says.  KeyError for a name that is not there."""
        return self._files[name][1].shape

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse a tensor that is missing, of another shape, or of a type that is not taken over."""
        if name not in self._files:
            raise FormatError(
                f"the weights lack the tensor {name!r}", hint="the download is incomplete: fetch it again"
            )
        path, entry = self._files[name]
        if entry.dtype not in _KINDS:
            raise UnsupportedModel(
                f"{path}: {name!r} is stored as {entry.dtype}, which pi2 does not read",
                hint="use the model's f32, f16 or bf16 weights; pi2 quantises itself (--quant)",
            )
        if entry.shape != shape:
            raise FormatError(f"{path}: {name!r} has the shape {list(entry.shape)}, not {list(shape)}")

    def rows(self, name: str, *, skip: int = 0, transposed: bool = False) -> tuple[U8, DType, int]:
        """A checked matrix as bytes (rows, row bytes), their format, and the number of columns.

        f32 and f16 come as they are, bf16 as f32 (exact).  ``skip`` rows at the start are left out.
        """
        entry = self._files[name][1]
        values = self._items(name).reshape(entry.shape)[skip:]
        if transposed:
            values = values.T
        values = np.ascontiguousarray(values)
        if entry.dtype == "BF16":
            values = _widen(values)
        rows, cols = values.shape
        return values.view(np.uint8).reshape(rows, -1), _KINDS[entry.dtype], cols

    def vector(self, name: str) -> F32:
        """A checked vector as float32, (n,)."""
        entry, items = self._files[name][1], self._items(name)
        if entry.dtype == "BF16":
            return _widen(items).view(np.float32)
        kind: type[np.floating[Any]] = np.float16 if entry.dtype == "F16" else np.float32
        return items.view(kind).astype(np.float32)

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors are stored with the same type, shape and bytes."""
        a, b = self._files[one][1], self._files[other][1]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        x, y = self._bytes(one), self._bytes(other)
        return all(np.array_equal(x[i : i + _CHUNK], y[i : i + _CHUNK]) for i in range(0, a.nbytes, _CHUNK))

    def _items(self, name: str) -> NDArray[Any]:
        """The tensor's numbers as unsigned integers of their size, (n,)."""
        size = _ITEM[self._files[name][1].dtype]
        data = self._bytes(name)
        return data.view(np.uint16 if size == 2 else np.uint32)

    def _bytes(self, name: str) -> U8:
        path, entry = self._files[name]
        if path not in self._maps:
            self._maps[path] = _map(path)
        data = self._maps[path][entry.offset : entry.offset + entry.nbytes]
        # Touching a page behind the end of a file that was cut short since would be a SIGBUS.
        if len(data) != entry.nbytes or path.stat().st_size < entry.offset + entry.nbytes:
            raise StorageError("the file shrank while it was open", path=path, offset=entry.offset)
        return data


def read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    """A small JSON object.  Raises FormatError that names the file."""
    try:
        return parse_json(read_text(path, max_bytes).encode(), path.name)
    except FormatError as e:
        raise FormatError(f"{path.parent}: {e}", hint="fetch the file again") from None


def read_text(path: Path, max_bytes: int) -> str:
    """A small text file.  Raises FormatError if it is too large or not UTF-8."""
    if not path.is_file():
        raise FormatError(f"{path.name} is missing")
    with path.open("rb") as f:
        size = os.fstat(f.fileno()).st_size
        if size > max_bytes:
            raise FormatError(f"{path.name} has {size} bytes, more than the {max_bytes} that it may have")
        content = f.read(size)  # of no more: read() takes memory for all that it is asked for
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise FormatError(f"{path.name} is not UTF-8") from None


def _shards(directory: Path) -> list[tuple[Path, list[str] | None]]:
    """Files that hold the weights, and which tensors to take from each (None: all)."""
    if (directory / SINGLE).is_file():
        return [(directory / SINGLE, None)]
    if not (directory / INDEX).is_file():
        raise _without_weights(directory)
    raw = read_json(directory / INDEX, 1 << 26).get("weight_map")
    if not isinstance(raw, dict) or not raw:
        raise FormatError(f"{directory / INDEX} has no weight_map")
    shards: dict[str, list[str]] = {}
    for name, file in raw.items():
        if not isinstance(file, str) or not _is_plain(file):
            raise FormatError(f"{directory / INDEX} names a file that cannot be a shard: {str(file)[:80]!r}")
        shards.setdefault(file, []).append(name)
    for file in shards:
        if not (directory / file).is_file():
            raise FormatError(f"{directory} lacks {file[:120]!r}, which {INDEX} names",
                              hint="the download is incomplete: fetch it again")  # fmt: skip
    return [(directory / file, names) for file, names in sorted(shards.items())]


def _is_plain(file: str) -> bool:
    """A name in this directory and nothing else, on any operating system."""
    return file.endswith(".safetensors") and file.isprintable() and not set(file) & set('/\\:*?"<>|')


def _without_weights(directory: Path) -> FormatError:
    if any(directory.glob("pytorch_model*.bin*")) or any(directory.glob("*.pth")):
        return UnsupportedModel(
            f"{directory} holds PyTorch pickles, which can run code when they are opened",
            hint="save the model as safetensors: model.save_pretrained(DIR) in transformers",
        )
    gguf = next(directory.glob("*.gguf"), None)
    hint = "fetch all files of the model" if gguf is None else f"convert the file itself: {gguf}"
    return FormatError(f"{directory} holds no {SINGLE}", hint=hint)


def _map(path: Path) -> U8:
    try:
        return np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as e:  # ValueError: an empty file
        raise StorageError(str(e), path=path) from None


def _widen(bf16: NDArray[Any]) -> NDArray[Any]:
    """bfloat16 is the upper half of a float32: (...,) uint16 -> the same numbers as float32, in uint32."""
    return bf16.astype(np.uint32) << np.uint32(16)
