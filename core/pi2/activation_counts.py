"""How often each neuron was active, per layer and batch size: sums that merge, and the file that keeps them.

A batch of b stands for b sequences decoded together: a neuron counts once for each step at which it is
active for the token of any of them (PowerInfer-2 §2.3: the larger the batch, the denser the union).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from pi2.activity import Active
from pi2.container.safetensors_file import Header, parse_json, read_header
from pi2.errors import FormatError, OptionError

FORMAT: Final = "pi2 statistics 1"
BATCHES: Final = (1, 2, 4, 8, 16, 32)
_HINT = "remove the file, or count into another one with --output"
_MAX_BATCH = 1 << 10
_MAX_HEADER = 1 << 24  # bytes; a text takes about 90, a layer 80


@dataclass(slots=True)
class ActivationCounts:
    """Sums: a neuron was active in ``counts[layer, k, neuron]`` of ``steps[k]`` steps of ``batches[k]``."""

    model: str
    """SHA-256 of the model's neurons."""
    sequence: int
    """Tokens of a sequence; each begins anew, with the model's begin-of-text token, which is not counted."""
    batches: tuple[int, ...]
    counts: NDArray[np.int64]
    steps: NDArray[np.int64]
    texts: dict[str, int] = field(default_factory=dict)
    """SHA-256 of each text -> how many of its sequences, from the first on, are counted."""

    @classmethod
    def empty(
        cls, model: str, layers: int, neurons: int, *, sequence: int, batches: tuple[int, ...] = BATCHES
    ) -> Self:
        """Nothing counted yet.  Raises OptionError unless ``batches`` ascend within 1 ... 1024."""
        if not batches or list(batches) != sorted({b for b in batches if 1 <= b <= _MAX_BATCH}):
            raise OptionError(
                f"batch sizes {', '.join(map(str, batches))} do not ascend within 1 to {_MAX_BATCH}",
                hint="for example --batch 1,2,4,8",
            )
        counts = np.zeros((layers, len(batches), neurons), np.int64)
        return cls(model, sequence, batches, counts, np.zeros(len(batches), np.int64))

    @property
    def tokens(self) -> int:
        """How many tokens were counted, each in every batch size that its group had room for."""
        return sum(self.texts.values()) * self.sequence

    @property
    def density(self) -> NDArray[np.float64]:
        """(layers, batch sizes): mean share of active neurons; NaN for a batch size that no text filled."""
        steps = np.where(self.steps, self.steps, 1)
        share = self.counts.mean(axis=2) / steps
        return np.where(self.steps, share, np.nan)

    def add(self, layer: int, active: Active) -> None:
        """Count one FFN's activity of a group, (sequences, positions, neurons).

        Sequences 0 ... b-1 make a batch of b, the next b another; those left over make none.
        """
        for k, batch in enumerate(self.batches):
            whole = len(active) // batch
            union = active[: whole * batch].reshape(whole, batch, *active.shape[1:]).any(axis=1)
            self.counts[layer, k] += union.sum(axis=(0, 1))

    def finish_group(self, text: str, sequences: int) -> None:
        """Enter that every layer of a group of the ``text`` with this SHA-256 was added."""
        self.steps += [sequences // batch * self.sequence for batch in self.batches]
        self.texts[text] = self.texts.get(text, 0) + sequences

    def merged(self, other: ActivationCounts, *, later: bool = False) -> ActivationCounts:
        """The counts of both, as if collected at once.  Raises FormatError if they do not go together.

        ``later``: what ``other`` has of a text lies behind what this has of it; else each text is in one.
        """
        if (self.model, self.sequence, self.batches, self.counts.shape) != (
            other.model, other.sequence, other.batches, other.counts.shape,
        ):  # fmt: skip
            raise FormatError(
                "the statistics are of another model, or of other batch sizes or sequences", hint=_HINT
            )
        both = set(self.texts) & set(other.texts)
        if both and not later:
            raise FormatError(f"text {min(both)[:12]} is in both statistics", hint="merge each text once")
        texts = {t: self.texts.get(t, 0) + other.texts.get(t, 0) for t in self.texts | other.texts}
        return ActivationCounts(
            self.model, self.sequence, self.batches,
            self.counts + other.counts, self.steps + other.steps, texts,
        )  # fmt: skip

    def save(self, path: Path) -> None:
        """Write a safetensors file: ``layers.N.counts`` (batch sizes, neurons), the rest as metadata.

        Raises OSError.
        """
        from safetensors.numpy import save

        metadata = {
            "format": FORMAT,
            "model": self.model,
            "sequence": str(self.sequence),
            "batches": json.dumps(self.batches),
            "tokens": str(self.tokens),
            "texts": json.dumps(self.texts),
        }
        tensors = {f"layers.{layer}.counts": counts for layer, counts in enumerate(self.counts)}
        path.write_bytes(save({"steps": self.steps, **tensors}, metadata))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read back ``save``, treating the file as hostile.  Raises FormatError, OSError."""
        header = read_header(path, _MAX_HEADER)
        try:
            model, sequence, batches, texts = _metadata(header.metadata)
            layers, neurons = _check_tensors(header, len(batches))
            found = cls.empty(model, layers, neurons, sequence=sequence, batches=batches)
        except (FormatError, OptionError) as e:
            raise FormatError(f"{path}: {e}", hint=_HINT) from None
        with path.open("rb") as f:
            for name, entry in header.entries.items():
                f.seek(entry.offset)
                values = np.frombuffer(f.read(entry.nbytes), np.int64).reshape(entry.shape)
                target = found.steps if name == "steps" else found.counts[int(name.split(".")[1])]
                target[...] = values
        if found.counts.min(initial=0) < 0 or (found.counts > found.steps[:, None]).any():
            raise FormatError(f"{path}: a neuron was active more often than it was seen", hint=_HINT)
        found.texts = texts
        return found


def _metadata(metadata: Mapping[str, str]) -> tuple[str, int, tuple[int, ...], dict[str, int]]:
    """model, sequence, batches and texts, checked."""
    if metadata.get("format") != FORMAT:
        raise FormatError(f"its format is {metadata.get('format', '')[:40]!r}, not {FORMAT!r}")
    try:
        model, texts = metadata["model"], parse_json(metadata["texts"].encode(), "texts")
        sequence, batches = _number(json.loads(metadata["sequence"])), json.loads(metadata["batches"])
        if not isinstance(batches, list):
            raise FormatError("batches is not a list")
        sizes = tuple(_number(b) for b in batches)
        counted = {str(text): _number(n) for text, n in texts.items()}
    except (KeyError, ValueError, RecursionError):
        raise FormatError("its metadata is incomplete or malformed") from None
    return model, sequence, sizes, counted


def _number(value: Any) -> int:
    if type(value) is not int or not 0 < value < 1 << 48:
        raise FormatError("its metadata has an impossible number")
    return value


def _check_tensors(header: Header, batches: int) -> tuple[int, int]:
    """(layers, neurons), if there is a tensor for every layer and all have one shape."""
    entries = dict(header.entries)
    steps = entries.pop("steps", None)
    if steps is None or (steps.dtype, steps.shape) != ("I64", (batches,)):
        raise FormatError("the tensor steps is missing or malformed")
    expected = {f"layers.{layer}.counts" for layer in range(len(entries))}
    if not entries or set(entries) != expected:
        odd = sorted(set(entries) ^ expected, key=_by_number)
        raise FormatError(f"a layer is missing, or unknown: {odd[0][:40] if odd else 'all'}")
    shapes = {(entry.dtype, entry.shape) for entry in entries.values()}
    dtype, shape = shapes.pop()
    if shapes or dtype != "I64" or len(shape) != 2 or shape[0] != batches:
        raise FormatError("the tensors of its layers are malformed")
    return len(entries), shape[1]


def _by_number(name: str) -> tuple[int, str]:
    digits = re.search(r"\d+", name)
    return int(digits[0][:9]) if digits else -1, name
