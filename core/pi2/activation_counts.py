"""How often each neuron was active, per layer and batch size: sums that merge.

A batch of b stands for b sequences decoded together: a neuron counts once for each step at which it is
active for the token of any of them (PowerInfer-2 §2.3: the larger the batch, the denser the union).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from pi2.activity import Active
from pi2.activity_sketch import ActivitySketch
from pi2.errors import FormatError, OptionError

BATCHES: Final = (1, 2, 4, 8, 16, 32)
MERGE_HINT: Final = "remove the file, or count into another one with --output"
_MAX_BATCH = 1 << 10
Sums = NDArray[np.int64]


@dataclass(slots=True)
class ActivationCounts:
    """Sums: a neuron was active in ``counts[layer, k, neuron]`` of ``steps[k]`` steps of ``batches[k]``."""

    model: str
    """SHA-256 of the model's neurons."""
    sequence: int
    """Tokens of a sequence; each begins anew, with the model's begin-of-text token, which is not counted."""
    batches: tuple[int, ...]
    counts: Sums
    steps: Sums
    repeats: Sums
    """(layers, 2): active neurons that were active for the token before too, and all that had one before."""
    factors: Sums
    """(layers, 3): neurons, token by token, whose gate was open, whose up side was, and where both were."""
    sketch: ActivitySketch
    texts: dict[str, int] = field(default_factory=dict)
    """SHA-256 of each text -> how many of its sequences, from the first on, are counted."""
    activity: str = "exact"
    """What was counted as active: "exact" is not zero."""

    @classmethod
    def empty(
        cls, model: str, layers: int, neurons: int, *, sequence: int, batches: tuple[int, ...] = BATCHES,
        activity: str = "exact",
    ) -> Self:  # fmt: skip
        """Nothing counted yet.  Raises OptionError unless ``batches`` ascend within 1 ... 1024."""
        if not batches or list(batches) != sorted({b for b in batches if 1 <= b <= _MAX_BATCH}):
            raise OptionError(
                f"batch sizes {', '.join(map(str, batches))} do not ascend within 1 to {_MAX_BATCH}",
                hint="for example --batch 1,2,4,8",
            )
        return cls(
            model, sequence, batches,
            counts=np.zeros((layers, len(batches), neurons), np.int64),
            steps=np.zeros(len(batches), np.int64),
            repeats=np.zeros((layers, 2), np.int64),
            factors=np.zeros((layers, 3), np.int64),
            sketch=ActivitySketch.empty(layers, neurons),
            activity=activity,
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """How many tokens were counted, each in every batch size that its group had room for."""
        return sum(self.texts.values()) * self.sequence

    @property
    def frequency(self) -> NDArray[np.float64]:
        """(layers, batch sizes, neurons): share of the steps in which each neuron was active.

        NaN for a batch size that no text filled.
        """
        steps = self.steps[:, None]
        return np.where(steps, self.counts / np.where(steps, steps, 1), np.nan)

    @property
    def density(self) -> NDArray[np.float64]:
        """(layers, batch sizes): mean share of active neurons; NaN for a batch size that no text filled."""
        shares: NDArray[np.float64] = self.frequency.mean(axis=2)
        return shares

    def add(self, layer: int, active: Active) -> None:
        """Count one FFN's activity of a group, (sequences, positions, neurons).

        Sequences 0 ... b-1 make a batch of b, the next b another; those left over make none.
        """
        for k, batch in enumerate(self.batches):
            whole = len(active) // batch
            union = active[: whole * batch].reshape(whole, batch, *active.shape[1:]).any(axis=1)
            self.counts[layer, k] += union.sum(axis=(0, 1))
        later = active[:, 1:]
        self.repeats[layer] += (int((later & active[:, :-1]).sum()), int(later.sum()))

    def finish_group(self, text: str, sequences: int) -> None:
        """Enter that every layer of a group of the ``text`` with this SHA-256 was added."""
        self.steps += [sequences // batch * self.sequence for batch in self.batches]
        self.texts[text] = self.texts.get(text, 0) + sequences

    def merged(self, other: ActivationCounts, *, later: bool = False) -> ActivationCounts:
        """The counts of both, as if collected at once.  Raises FormatError if they do not go together.

        ``later``: what ``other`` has of a text lies behind what this has of it; else each text is in one.
        """
        if self.kind != other.kind:
            raise FormatError(
                "the statistics are of another model, or of other batch sizes, sequences or density",
                hint=MERGE_HINT,
            )
        both = set(self.texts) & set(other.texts)
        if both and not later:
            raise FormatError(f"text {min(both)[:12]} is in both statistics", hint="merge each text once")
        texts = {t: self.texts.get(t, 0) + other.texts.get(t, 0) for t in self.texts | other.texts}
        return ActivationCounts(
            self.model, self.sequence, self.batches,
            self.counts + other.counts, self.steps + other.steps,
            self.repeats + other.repeats, self.factors + other.factors,
            self.sketch.merged(other.sketch), texts, self.activity,
        )  # fmt: skip

    @property
    def kind(self) -> tuple[object, ...]:
        """What two counts must share to be merged."""
        return self.model, self.sequence, self.batches, self.counts.shape, self.activity
