"""Opening a pi2 model: every claim of its files is checked before a byte of it is used."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from pi2 import inventory
from pi2.api import StorageTier
from pi2.architecture import Architecture
from pi2.bundle import PAGE, BundleGeometry
from pi2.container.layout import DENSE, NEURONS, neuron_tensors, stored_shape
from pi2.container.manifest import (
    MANIFEST,
    Manifest,
    describe_member,
    member_size,
    read_manifest,
    read_member,
)
from pi2.container.safetensors_file import Entry, Header, parse_json, read_header
from pi2.errors import FormatError, StorageError
from pi2.memory import aligned_bytes
from pi2.powers import FfnPlace, SupportsView
from pi2.tensor import DTYPES, F32, U8, DType, Ids, Tensor

VERIFY_UP_TO = 1 << 30  # bytes that are checksummed on opening without being asked: about a second
_PIECE = 32 << 20  # bytes read at once
_TEMPLATE = "chat_template.jinja"
_SMALL = {"config.json": 1 << 20, "tokenizer.json": 1 << 28, _TEMPLATE: 1 << 22}  # max bytes
_HINT = "the model is incomplete or damaged: fetch or convert it again"


class PiModel:
    """A pi2 model, open for reading.  Made by :func:`open_model`; satisfies ``pi2.api.ModelView``.

    Weights come through the storage tier: as views of its bytes if it has them (``SupportsView``) and
    ``views`` is true, else read afresh by every call.  Arrays are read-only and valid until the tier is
    closed; the tier belongs to the caller.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        architecture: Architecture,
        tier: StorageTier,
        headers: tuple[Header, Header],
        chat_template: str | None,
        verified: bool,
        *,
        views: bool = True,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.architecture = architecture
        self.chat_template = chat_template
        self.verified = verified
        """Whether the checksum of every file was compared, not only sizes and headers."""
        self._tier = tier
        self._views = views
        self._dense, self._neurons = headers
        self._dense_file = tier.open_file(path / DENSE)
        self._neurons_file = tier.open_file(path / NEURONS)

    @property
    def geometry(self) -> BundleGeometry:
        return self.manifest.geometry

    @property
    def tokenizer_json(self) -> str:
        """The tokenizer, read from its file, which may be large.  Raises FormatError if it has changed."""
        return _text(self.path, self.manifest, "tokenizer.json")

    @property
    def nbytes(self) -> int:
        """Bytes of all weights on disk."""
        return self.manifest.files[DENSE].nbytes + self.manifest.files[NEURONS].nbytes

    def matrix(self, name: str) -> Tensor:
        """A matrix outside the FFNs by its canonical name.  KeyError for a name not in the inventory."""
        entry = self._dense.entries[name]
        rows, cols = inventory.dense_matrices(self.architecture)[name]
        dtype: DType = self._dense.metadata[name]  # type: ignore[assignment]  # checked on opening
        return Tensor(self._bytes(self._dense_file, entry).reshape(rows, -1), dtype, cols)

    def rows(self, name: str, ids: Ids) -> Tensor:
        """Rows ``ids`` of such a matrix, in their order; no other is read unless all are in memory."""
        if not self.by_rows(name):
            whole = self.matrix(name)
            return Tensor(whole.data[ids], whole.dtype, whole.cols)
        entry, (rows, cols) = self._dense.entries[name], inventory.dense_matrices(self.architecture)[name]
        dtype: DType = self._dense.metadata[name]  # type: ignore[assignment]  # checked on opening
        size = entry.nbytes // rows
        starts = entry.offset + ids.astype(np.int64) * size
        data = aligned_bytes(len(ids) * size)
        self._tier.read(self._dense_file, np.stack((starts, np.full(len(ids), size)), axis=1), data)
        return Tensor(data.reshape(len(ids), size), dtype, cols)

    def by_rows(self, name: str) -> bool:
        """Whether a matrix is better read row by row when wanted: a table, while memory is dear."""
        head = name == "embed.weight" and self.architecture.tied
        return not self._views and name.startswith("embed.") and not head

    @property
    def resident_bytes(self) -> int:
        """Of the weights outside the FFNs, what stays in memory."""
        tables = [entry.nbytes for name, entry in self._dense.entries.items() if self.by_rows(name)]
        return self.manifest.files[DENSE].nbytes - sum(tables)

    def vector(self, name: str) -> F32:
        """A norm or bias outside the bundles, (n,).  KeyError for a name not in the inventory."""
        return self._bytes(self._dense_file, self._dense.entries[name]).view(np.float32)

    def bundles(self, ffn: int) -> U8:
        """(neurons, stride) uint8, read-only."""
        entry = self._neurons.entries[inventory.ffn_name(ffn)]
        return self._bytes(self._neurons_file, entry).reshape(entry.shape)

    def ffn_place(self, ffn: int) -> FfnPlace:
        """Where the tier finds bundle 0: at a multiple of 4096 and of the geometry's page."""
        offset = self._neurons.entries[inventory.ffn_name(ffn)].offset
        return FfnPlace(ffn, self.path / NEURONS, self._neurons_file, offset)

    def close(self) -> None:
        """Nothing to give back: the files belong to the tier.  Here so that callers need not know."""

    def _bytes(self, file: int, entry: Entry) -> U8:
        if self._views and isinstance(self._tier, SupportsView):
            return self._tier.view(file, entry.offset, entry.nbytes)
        data = aligned_bytes(entry.nbytes)
        for at in range(0, entry.nbytes, _PIECE):  # the deadline of a slow device is that of a piece
            piece = data[at : at + _PIECE]
            self._tier.read(file, np.array([[entry.offset + at, len(piece)]], np.int64), piece)
        data.flags.writeable = False
        return data


def open_model(path: Path, tier: StorageTier, *, verify: bool | None = None, views: bool = True) -> PiModel:
    """Open the pi2 model in directory ``path`` and check it.

    ``views`` False: weights are always read into memory of their own, whatever the tier can do.

    Small files are always checksummed; weights if ``verify``, or by default if they have at most
    ``VERIFY_UP_TO`` bytes.  Raises FormatError (with path and hint) if anything does not add up.
    """
    try:
        return _open(path, tier, verify, views)
    except FormatError as e:
        raise type(e)(f"{path}: {e}", hint=e.hint or _HINT) from None
    except OSError as e:
        place = Path(e.filename) if isinstance(e.filename, str) else path
        raise StorageError(e.strerror or str(e), path=place, hint="check that it may be read") from None


def _open(path: Path, tier: StorageTier, verify: bool | None, views: bool) -> PiModel:
    if not path.is_dir():
        raise FormatError("no such directory", hint="a pi2 model is a directory made by pi2 convert")
    if not (path / MANIFEST).exists():
        raise FormatError(f"not a pi2 model: no {MANIFEST}", hint="convert it first: pi2 convert SRC DST")
    manifest = read_manifest(path)
    _check_sizes(path, manifest)
    total = sum(entry.nbytes for entry in manifest.files.values())
    verified = total <= VERIFY_UP_TO if verify is None else verify
    config = _text(path, manifest, "config.json")
    _text(path, manifest, "tokenizer.json")  # only checked: it may be large
    template = _text(path, manifest, _TEMPLATE) if _TEMPLATE in manifest.files else None
    architecture = Architecture.from_dict(parse_json(config.encode(), "config.json"))
    _check_geometry(manifest, architecture)
    neurons = _neurons_header(path, manifest, architecture)  # first: it bounds the number of layers
    headers = (_dense_header(path, architecture), neurons)
    if verified:
        for name in set(manifest.files) - set(_SMALL):
            _check_sum(path, manifest, name, None if views else tier)
    return PiModel(path, manifest, architecture, tier, headers, template, verified, views=views)


def _check_sizes(path: Path, manifest: Manifest) -> None:
    for name, entry in manifest.files.items():
        size = member_size(path, name)
        if size != entry.nbytes:
            raise FormatError(f"{name} has {size} bytes, not the {entry.nbytes} of {MANIFEST}")


def _check_sum(path: Path, manifest: Manifest, name: str, tier: StorageTier | None = None) -> None:
    """Through ``tier``, if given: what reads past the page cache then leaves nothing there."""
    entry = manifest.files[name]
    if tier is None:
        right = describe_member(path, name) == entry
    else:
        right = _digest(tier, path / name, entry.nbytes) == entry.sha256
    if not right:
        raise FormatError(f"the checksum of {name} is wrong")


def _digest(tier: StorageTier, path: Path, nbytes: int) -> str:
    """SHA-256 of a file of ``nbytes``."""
    file, digest = tier.open_file(path), hashlib.sha256()
    buffer = aligned_bytes(min(nbytes, _PIECE // 4))
    for at in range(0, nbytes, _PIECE // 4):
        piece = buffer[: nbytes - at]
        tier.read(file, np.array([[at, len(piece)]], np.int64), piece)
        digest.update(piece.data)
    return digest.hexdigest()


def _text(path: Path, manifest: Manifest, name: str) -> str:
    """A text file of the model, checksummed."""
    content = read_member(path, name, _SMALL[name])
    _check_sum(path, manifest, name)
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise FormatError(f"{name} is not UTF-8") from None


def _check_geometry(manifest: Manifest, arch: Architecture) -> None:
    g = manifest.geometry
    fits = g.d_model == arch.d_model and (g.gate is not None) == arch.gated and g.biased == arch.ffn_bias
    if not fits or manifest.family != arch.family:
        raise FormatError(f"{MANIFEST} and config.json describe different models")


def _neurons_header(path: Path, manifest: Manifest, arch: Architecture) -> Header:
    stride, align = manifest.geometry.stride, max(PAGE, manifest.geometry.page)
    ffn_bytes = arch.n_neurons * stride
    padded = -(-ffn_bytes // align) * align
    # Before anything is made per layer: a lying layer count must not cost memory.
    if arch.n_layers * padded > manifest.files[NEURONS].nbytes:
        raise FormatError(f"{NEURONS} is too small for {arch.n_layers} FFNs of {arch.n_neurons} neurons")
    header = read_header(path / NEURONS, _header_limit(2 * arch.n_layers, align))
    expected = neuron_tensors(manifest.geometry, arch)
    _check_names(NEURONS, header, set(expected))
    for name, (dtype, shape) in expected.items():
        entry = header.entries[name]
        if (entry.dtype, entry.shape) != (dtype, shape):
            raise FormatError(f"{NEURONS}: {name} is {entry.dtype} {entry.shape}, not {dtype} {shape}")
        if len(shape) == 2 and entry.offset % align:
            raise FormatError(f"{NEURONS}: {name} does not start at a multiple of {align}")
    return header


def _dense_header(path: Path, arch: Architecture) -> Header:
    # 16: the largest number of dense tensors that a layer can have, with room
    header = read_header(path / DENSE, _header_limit(16 * arch.n_layers, PAGE))
    matrices, vectors = inventory.dense_matrices(arch), inventory.dense_vectors(arch)
    _check_names(DENSE, header, set(matrices) | set(vectors))
    if set(header.metadata) != set(matrices) or not set(header.metadata.values()) <= set(DTYPES):
        raise FormatError(f"{DENSE}: the metadata does not give the dtype of every matrix")
    for name, (rows, cols) in matrices.items():
        dtype: DType = header.metadata[name]  # type: ignore[assignment]  # checked above
        _check_entry(name, header.entries[name], stored_shape(dtype, rows, cols))
    for name, n in vectors.items():
        _check_entry(name, header.entries[name], ("F32", (n,)))
    return header


def _check_entry(name: str, entry: Entry, expected: tuple[str, tuple[int, ...]]) -> None:
    if (entry.dtype, entry.shape) != expected:
        raise FormatError(f"{DENSE}: {name} is {entry.dtype} {entry.shape}, not {expected[0]} {expected[1]}")


def _check_names(file: str, header: Header, expected: set[str]) -> None:
    odd = sorted(set(header.entries) ^ expected)
    if odd:
        which = "an unknown tensor" if odd[0] in header.entries else "no tensor"
        raise FormatError(f"{file} has {which} {odd[0][:80]!r}")


def _header_limit(tensors: int, padding: int) -> int:
    """Bytes that the header of an honest file with so many tensors stays below (an entry takes ~120)."""
    return (1 << 16) + padding + 512 * tensors
