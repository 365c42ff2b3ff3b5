"""``statistics.safetensors``: what was measured of a model's activations, read back as hostile input.

    layers.N.counts    I64  (batch sizes, neurons)     in how many steps a neuron was active
    layers.N.sample    U8   (tokens, neurons / 8)      active sets of sampled tokens, one bit a neuron
    steps              I64  (batch sizes,)             steps that were counted
    repeats, factors   I64  (layers, 2), (layers, 3)   as in ``ActivationCounts``
    keys               U64  (tokens,)                  which tokens were sampled
    thresholds.weights, thresholds.RULE.cuts   F32     as in ``pi2.thresholds``

Counts and thresholds are both optional.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from pi2.activation_counts import MERGE_HINT, ActivationCounts
from pi2.activity_sketch import SAMPLE, ActivitySketch
from pi2.container.safetensors_file import Entry, Header, parse_json, read_header
from pi2.errors import FormatError, OptionError
from pi2.thresholds import Thresholds

STATISTICS: Final = "statistics.safetensors"
FORMAT: Final = "pi2 statistics 2"
_MAX_HEADER = 1 << 24  # bytes; a text takes about 90, a layer 160
_LAYER = re.compile(r"layers\.(0|[1-9]\d{0,8})\.(counts|sample)")

_Shapes = dict[str, tuple[str, tuple[int, ...]]]
_NUMPY = {"I64": np.int64, "U64": np.uint64, "U8": np.uint8, "F32": np.float32}


@dataclass(frozen=True, slots=True)
class Statistics:
    """Contents of the file."""

    counts: ActivationCounts | None = None
    thresholds: Thresholds | None = None

    def save(self, path: Path) -> None:
        """Write a safetensors file.  Raises OSError."""
        from safetensors.numpy import save

        metadata = {"format": FORMAT}
        tensors: dict[str, NDArray[Any]] = {}
        if self.counts is not None:
            metadata |= _counts_metadata(self.counts)
            tensors |= _counts_tensors(self.counts)
        if self.thresholds is not None:
            metadata |= {"model": self.thresholds.model, "thresholds": self.thresholds.to_metadata()}
            tensors |= self.thresholds.to_tensors()
        path.write_bytes(save({n: np.ascontiguousarray(a) for n, a in tensors.items()}, metadata))

    @classmethod
    def load(cls, path: Path, *, sample: bool = True) -> Self:
        """Read back ``save``, treating the file as hostile.  Raises FormatError, OSError.

        ``sample`` False leaves the sample of active sets out, which takes the most memory.
        """
        header = read_header(path, _MAX_HEADER)
        try:
            metadata = header.metadata
            if metadata.get("format") != FORMAT:
                raise FormatError(f"its format is {metadata.get('format', '')[:40]!r}, not {FORMAT!r}")
            parts = {n: e for n, e in header.entries.items() if n.startswith("thresholds.")}
            rest = Header(
                {n: e for n, e in header.entries.items() if n not in parts}, metadata, header.data_start
            )
            counts = _load_counts(path, rest, sample) if rest.entries else None
            thresholds = None
            if parts or "thresholds" in metadata:
                thresholds = Thresholds.from_file(
                    metadata.get("model", ""), metadata.get("thresholds", ""), _read(path, parts)
                )
        except (FormatError, OptionError) as e:
            raise FormatError(f"{path}: {e}", hint=MERGE_HINT) from None
        return cls(counts, thresholds)

    @classmethod
    def of_file(cls, path: Path, sha256: str, *, sample: bool = True) -> Self:
        """``load``, for the model whose neurons have this checksum; empty if there is no such file.

        Raises FormatError, also for statistics of another model.
        """
        if not path.exists():
            return cls()
        found = cls.load(path, sample=sample)
        for part in (found.counts, found.thresholds):
            if part is not None and part.model != sha256:
                raise FormatError(f"{path}: the statistics are of another model", hint=MERGE_HINT)
        return found


def _counts_metadata(c: ActivationCounts) -> dict[str, str]:
    return {
        "model": c.model,
        "activity": c.activity,
        "sequence": str(c.sequence),
        "batches": json.dumps(c.batches),
        "tokens": str(c.tokens),
        "texts": json.dumps(c.texts),
    }


def _counts_tensors(c: ActivationCounts) -> dict[str, NDArray[Any]]:
    tensors: dict[str, NDArray[Any]] = {
        "steps": c.steps, "repeats": c.repeats, "factors": c.factors, "keys": c.sketch.keys,
    }  # fmt: skip
    for layer, (counts, sample) in enumerate(zip(c.counts, c.sketch.sets, strict=True)):
        tensors |= {f"layers.{layer}.counts": counts, f"layers.{layer}.sample": sample}
    return tensors


def _load_counts(path: Path, header: Header, sample: bool) -> ActivationCounts:
    counts = _empty_counts(header)
    _check_tensors(header, _expected(counts, header))
    found = _read(path, {n: e for n, e in header.entries.items() if sample or not n.endswith(".sample")})
    counts.steps[...], counts.repeats[...] = found["steps"], found["repeats"]
    counts.factors[...] = found["factors"]
    for layer, target in enumerate(counts.counts):
        target[...] = found[f"layers.{layer}.counts"]
    if sample:
        sets = np.stack([found[f"layers.{layer}.sample"] for layer in range(len(counts.counts))])
        counts.sketch = ActivitySketch(counts.counts.shape[2], found["keys"].copy(), sets)
    _check_sums(counts)
    counts.sketch.check()
    return counts


def _read(path: Path, entries: Mapping[str, Entry]) -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = {}
    with path.open("rb") as f:
        for name, entry in entries.items():
            if entry.dtype not in _NUMPY:
                raise FormatError(f"the tensor {name[:40]} is malformed: {entry.dtype}")
            f.seek(entry.offset)
            data = np.frombuffer(f.read(entry.nbytes), _NUMPY[entry.dtype])
            found[name] = data.reshape(entry.shape)
    return found


def _empty_counts(header: Header) -> ActivationCounts:
    """What the metadata and the names of the tensors announce, without its numbers."""
    metadata = header.metadata
    try:
        model, activity = metadata["model"], metadata["activity"]
        texts = parse_json(metadata["texts"].encode(), "texts")
        sequence, batches = _number(json.loads(metadata["sequence"])), json.loads(metadata["batches"])
        if not isinstance(batches, list):
            raise FormatError("batches is not a list")
        sizes = tuple(_number(b) for b in batches)
        counted = {str(text): _number(n) for text, n in texts.items()}
    except (KeyError, ValueError, RecursionError):
        raise FormatError("its metadata is incomplete or malformed") from None
    first = header.entries.get("layers.0.counts")
    layers = 1 + max((int(m[1]) for n in header.entries if (m := _LAYER.fullmatch(n))), default=-1)
    if first is None or len(first.shape) != 2 or layers > len(header.entries):
        raise FormatError("the counts of a layer are missing or malformed")
    # ``counts`` has no more bytes than the file: read_header checked that
    if layers * first.nbytes > sum(entry.nbytes for entry in header.entries.values()):
        raise FormatError("the counts of a layer are missing or malformed")
    found = ActivationCounts.empty(
        model, layers, first.shape[1], sequence=sequence, batches=sizes, activity=activity
    )
    found.texts = counted
    return found


def _number(value: Any) -> int:
    if type(value) is not int or not 0 < value < 1 << 48:
        raise FormatError("its metadata has an impossible number")
    return value


def _expected(counts: ActivationCounts, header: Header) -> _Shapes:
    """Every tensor that belongs into the file, with dtype and shape."""
    layers, batches, neurons = counts.counts.shape
    keys = header.entries.get("keys")
    sampled = keys.shape[0] if keys and len(keys.shape) == 1 else -1
    if not 0 <= sampled <= SAMPLE:
        raise FormatError("the tensor keys is missing or malformed")
    shapes: _Shapes = {
        "steps": ("I64", (batches,)),
        "repeats": ("I64", (layers, 2)),
        "factors": ("I64", (layers, 3)),
        "keys": ("U64", (sampled,)),
    }
    for layer in range(layers):
        shapes[f"layers.{layer}.counts"] = "I64", (batches, neurons)
        shapes[f"layers.{layer}.sample"] = "U8", (sampled, -(-neurons // 8))
    return shapes


def _check_tensors(header: Header, expected: _Shapes) -> None:
    odd = sorted(set(header.entries) ^ set(expected))
    if odd:
        raise FormatError(f"the tensor {odd[0][:40]} is missing, or unknown")
    for name, shape in expected.items():
        entry = header.entries[name]
        if (entry.dtype, entry.shape) != shape:
            raise FormatError(f"the tensor {name} is malformed: {entry.dtype} {entry.shape}")


def _check_sums(c: ActivationCounts) -> None:
    """Numbers that no counting could have left."""
    if c.counts.min(initial=0) < 0 or (c.counts > c.steps[:, None]).any():
        raise FormatError("a neuron was active more often than it was seen")
    most = c.tokens * c.counts.shape[2]
    both, (repeated, of) = c.factors[:, 2:], c.repeats.T
    if c.factors.min() < 0 or (both > c.factors).any() or (c.factors > most).any():
        raise FormatError("its factors contradict each other")
    if c.repeats.min() < 0 or (repeated > of).any():
        raise FormatError("its repeats contradict each other")
    if c.sketch.tokens > c.tokens:
        raise FormatError("it has a sample of more tokens than were counted")
