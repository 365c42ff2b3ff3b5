"""What weights on flash cost: hits, reads and waiting, added up."""

from __future__ import annotations

from dataclasses import dataclass, field

from pi2.powers import StreamCount


@dataclass(slots=True)
class OffloadCount:
    """What was read, hit and waited for, added up over FFNs.  Seconds of wall clock, but the stages'."""

    wanted: int = 0
    """Candidates: neurons that the predictor named."""
    guessed: int = 0
    """Neurons that look-ahead asked to be read."""
    useful: int = 0
    """Of those, wanted."""
    wasted_bytes: int = 0
    """Read for guesses that nobody waited for."""
    stream: StreamCount = field(default_factory=StreamCount)

    @property
    def present(self) -> int:
        """Of those wanted, in memory when they were."""
        return self.stream.present

    @property
    def bytes_read(self) -> int:
        return self.stream.bytes_read + self.wasted_bytes

    def add(self, count: StreamCount) -> None:
        total = self.stream
        total.active += count.active
        total.present += count.present
        total.reads += count.reads
        total.bytes_read += count.bytes_read
        total.wall_s += count.wall_s
        total.wait_s += count.wait_s
        total.gate_s += count.gate_s
        total.up_down_s += count.up_down_s
