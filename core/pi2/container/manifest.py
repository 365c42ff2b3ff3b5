"""pi2.yaml: what a pi2 model is made of, and the checked way to its other files."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

import pi2
from pi2.bundle import BundleGeometry
from pi2.errors import FormatError
from pi2.tensor import DTYPES

MANIFEST: Final = "pi2.yaml"
VERSION: Final = 1
REQUIRED: Final = ("config.json", "tokenizer.json", "dense.safetensors", "neurons.safetensors")
OPTIONAL: Final = (
    "chat_template.jinja",
    "predictors.safetensors",
    "statistics.safetensors",
    "head.safetensors",
    "plan.yaml",
)
MAX_MANIFEST = 1 << 18  # bytes; a real one has 2 to 4 KiB
_MAX_DEPTH = 8  # nesting of YAML collections; ours has 3
_MAX_EVENTS = 1 << 13  # YAML scalars and brackets; ours has about 100
_CHUNK = 1 << 20
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size in bytes and SHA-256 (hexadecimal) of one file."""

    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The contents of pi2.yaml."""

    family: str
    source: Mapping[str, str]  # provenance: format, name, whatever identifies the source
    quantisation: Mapping[str, str]  # kind of matrix -> dtype
    geometry: BundleGeometry
    files: Mapping[str, FileEntry]
    notes: tuple[str, ...] = ()  # what was not taken over as asked
    created_by: str = f"pi2 {pi2.__version__}"

    def to_yaml(self) -> str:
        files = {name: {"bytes": e.nbytes, "sha256": e.sha256} for name, e in self.files.items()}
        raw = {
            "format": "pi2",
            "version": VERSION,
            "created_by": self.created_by,
            "family": self.family,
            "source": dict(self.source),
            "quantisation": dict(self.quantisation),
            "bundle": self.geometry.to_dict(),
            "notes": list(self.notes),
            "files": files,  # last, so that a manifest that was cut lacks something
        }
        return str(yaml.safe_dump(raw, sort_keys=False, allow_unicode=True))

    @classmethod
    def from_yaml(cls, text: bytes) -> Manifest:
        """Read back ``to_yaml``, treating the input as hostile.  Raises FormatError."""
        raw = _parse_yaml(text)
        if not isinstance(raw, dict) or raw.get("format") != "pi2":
            raise FormatError("not the manifest of a pi2 model")
        if raw.get("version") != VERSION:
            raise FormatError(
                f"container version {str(raw.get('version'))[:20]!r}; this pi2 reads version {VERSION}",
                hint="use the version of pi2 that wrote it, or convert the model again",
            )
        names = {"created_by", "family", "source", "quantisation", "bundle", "files", "notes"}
        if set(raw) != names | {"format", "version"}:
            odd = set(raw) ^ (names | {"format", "version"})
            raise FormatError(f"unknown or missing: {', '.join(sorted(str(k)[:40] for k in odd))}")
        texts = (raw["created_by"], raw["family"])
        if not all(isinstance(t, str) for t in texts) or not _texts(raw["notes"]):
            raise FormatError("created_by, family and notes must be texts")
        if not isinstance(raw["bundle"], dict):
            raise FormatError("bundle is not a mapping")
        quantisation = _text_map(raw["quantisation"], "quantisation")
        if not set(quantisation.values()) <= set(DTYPES):
            raise FormatError("quantisation names an unknown dtype")
        return cls(
            family=raw["family"],
            source=_text_map(raw["source"], "source"),
            quantisation=quantisation,
            geometry=BundleGeometry.from_dict(raw["bundle"]),
            files=_files(raw["files"]),
            notes=tuple(raw["notes"]),
            created_by=raw["created_by"],
        )


def _parse_yaml(text: bytes) -> Any:
    """Plain YAML of moderate size: no aliases (they can expand without limit), little nesting."""
    depth = 0
    try:
        for count, event in enumerate(yaml.parse(text, Loader=_Loader)):
            if isinstance(event, yaml.AliasEvent):
                raise FormatError("YAML aliases are not allowed")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH or count > _MAX_EVENTS:
                raise FormatError("YAML nested too deeply or too long")
        return yaml.load(text, Loader=_Loader)  # a safe loader: plain values only
    except yaml.YAMLError as e:
        raise FormatError(f"not YAML: {' '.join(str(e).split())[:160]}") from None
    except (ValueError, OverflowError) as e:  # bad UTF-8, impossible dates, endless numbers
        raise FormatError(f"not YAML: {str(e)[:160]}") from None


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _text_map(value: Any, what: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(t, str) for kv in value.items() for t in kv):
        raise FormatError(f"{what} is not a mapping of texts")
    return value


def _files(raw: Any) -> dict[str, FileEntry]:
    if not isinstance(raw, dict) or not set(REQUIRED) <= set(raw):
        raise FormatError(f"files must name {', '.join(REQUIRED)}")
    entries = {}
    for name, value in raw.items():
        if name not in REQUIRED + OPTIONAL:
            raise FormatError(f"{str(name)[:80]!r} is no file of a pi2 model")
        if not isinstance(value, dict) or set(value) != {"bytes", "sha256"}:
            raise FormatError(f"the entry of {name} is malformed")
        nbytes, sha256 = value["bytes"], value["sha256"]
        ok = type(nbytes) is int and nbytes >= 0 and isinstance(sha256, str) and len(sha256) == 64
        if not ok:
            raise FormatError(f"the entry of {name} is malformed")
        entries[name] = FileEntry(nbytes, sha256)
    return entries


def check_writable(manifest: Manifest) -> None:
    """Raise FormatError if a reader would refuse this manifest (before hours of conversion, not after)."""
    entries = dict.fromkeys(REQUIRED, FileEntry(0, "0" * 64))
    text = dataclasses.replace(manifest, files=entries).to_yaml().encode(errors="surrogatepass")
    if len(text) > MAX_MANIFEST // 2:
        raise FormatError(f"the provenance or the notes of the source are too long: {len(text)} bytes")
    Manifest.from_yaml(text)


def member_size(directory: Path, name: str) -> int:
    """Bytes of a file of the model.  Links, devices and the like are refused: FormatError."""
    try:
        status = (directory / name).lstat()
    except FileNotFoundError:
        raise FormatError(f"{name} is missing") from None
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(f"{name} is not a regular file")
    return status.st_size


def read_member(directory: Path, name: str, max_bytes: int) -> bytes:
    """A small file of the model, whole.  Raises FormatError if it has more than ``max_bytes``."""
    size = member_size(directory, name)
    if size > max_bytes:
        raise FormatError(f"{name} has {size} bytes, more than the {max_bytes} that it may have")
    with (directory / name).open("rb") as f:
        return f.read(size)


def describe_member(directory: Path, name: str, on_bytes: Callable[[int], None] | None = None) -> FileEntry:
    """Size and checksum of a file of the model, by streaming it; ``on_bytes`` hears of each chunk's size."""
    digest = hashlib.sha256()
    member_size(directory, name)
    with (directory / name).open("rb", buffering=0) as f:
        size = os.fstat(f.fileno()).st_size
        while chunk := f.read(_CHUNK):
            digest.update(chunk)
            if on_bytes is not None:
                on_bytes(len(chunk))
    return FileEntry(size, digest.hexdigest())


def read_manifest(directory: Path) -> Manifest:
    """pi2.yaml of a model, checked for itself; its claims about other files are not.  Raises FormatError."""
    try:
        return Manifest.from_yaml(read_member(directory, MANIFEST, MAX_MANIFEST))
    except FormatError as e:
        raise FormatError(f"{MANIFEST}: {e}", hint=e.hint) from None
