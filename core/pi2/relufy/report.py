"""What a relufication has found so far: kept beside its checkpoints, told in the model's notes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from pi2.container.safetensors_file import parse_json
from pi2.errors import FormatError, StorageError

REPORT = "report.json"
STAGES = {
    "original": "original",
    "swapped": "ReLU, nothing trained",
    "started": "twin to begin with",
    "refitted": "W_down refitted",
    "twin": "distilled",
}
"""What is measured, in order."""


@dataclass(slots=True)
class Report:
    """Measures by stage (as ``Measure.to_dict``), and what the training took."""

    fingerprint: str
    activation: str
    texts: list[dict[str, Any]]
    held_out_tokens: int
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    refit_s: float = 0.0
    tokens: int = 0
    steps: int = 0
    lost_steps: int = 0
    train_s: float = 0.0

    def save(self, workplace: Path) -> None:
        """Replace the report in ``workplace``."""
        fresh = workplace / f"{REPORT}.new"
        try:
            fresh.write_text(json.dumps(asdict(self)))
            fresh.replace(workplace / REPORT)
        except OSError as e:
            raise StorageError(e.strerror or str(e), path=fresh, hint="make room, then go on") from None

    @classmethod
    def load(cls, workplace: Path) -> Self | None:
        """The report in ``workplace``, None if there is none.  Raises FormatError if it is damaged."""
        path = workplace / REPORT
        if not path.exists():
            return None
        try:
            return cls(**parse_json(path.read_bytes(), str(path)))
        except TypeError:
            hint = f"begin again with --restart, which deletes {workplace}"
            raise FormatError(f"{path} is no report of a relufication", hint=hint) from None

    def to_dict(self) -> dict[str, Any]:
        """The object of ``--json``."""
        found = asdict(self)
        del found["fingerprint"]
        return found

    def notes(self) -> list[str]:
        """For the manifest."""
        stages = [(label, self.stages[name]) for name, label in STAGES.items() if name in self.stages]
        measured = ", ".join(f"{label} {found['perplexity']:.2f}" for label, found in stages)
        names = ", ".join(text["name"] for text in self.texts)
        zeros = ", ".join(f"{label} {found['zeros']:.1%}" for label, found in stages[1:])
        return [
            f"relufied from {self.activation}: distilled on {self.tokens} tokens in {self.steps} steps",
            f"perplexity on {self.held_out_tokens} held-out tokens of {names}: {measured}",
            f"exact zeros there: {zeros}",
        ]
