"""How a model is run whose FFN weights stay on flash."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pi2.errors import OptionError


@dataclass(frozen=True, slots=True)
class OffloadOptions:
    """All that can be chosen.  None of it changes a bit of the result."""

    memory: int | None = None
    """Bytes that the process may have resident; None: as many slots as ``slots`` says."""
    slots: int | None = None
    policy: str | None = None
    """Cache policy as ``name:key=value,...``; None: the best that there is."""
    hot: float | None = None
    """Share of each FFN, on average, that the model's statistics call hot and that never leaves the cache,

    as far as there is room beside one whole FFN; None: four fifths of that room."""
    pipeline: str = "auto"
    """"native": the backend's own; "python": its slow twin; "auto": native where there is one."""
    two_phase: str = "auto"
    """"on": read gates first, and the rest only where they are not zero; "auto": if that is faster here."""
    cluster: int = 64
    """Neurons that are read and computed as one unit."""
    overlap: bool = True
    """Off: nothing is computed while something is being read."""
    bundled: bool = True
    """Off: every row of a neuron is a read of its own, one matrix after the other."""
    keep: str = "frequent"
    """What is hot: "frequent", as the statistics say; "even": every so many-th neuron, whatever it does."""
    prefetch: str = "auto"
    """"on": guess the next layer's neurons while this one is computed; "auto": as long as it pays."""
    trace: Path | None = None
    """File to write what the pipeline did to, for Perfetto."""

    def __post_init__(self) -> None:
        switch = ("auto", "on", "off")
        choices = {"pipeline": ("auto", "native", "python"), "prefetch": switch, "two_phase": switch}
        for name, known in (choices | {"keep": ("frequent", "even")}).items():
            if (value := getattr(self, name)) not in known:
                says = f"{name} is {', '.join(known[:-1])} or {known[-1]}, not {value!r}"
                raise OptionError(says, hint=f"{name}={known[0]} is the default")
        if not self.bundled and self.two_phase == "on":
            raise OptionError("rows that are read one by one have no two phases", hint="leave two_phase out")
        if self.hot is not None and not 0 <= self.hot <= 1:
            raise OptionError(f"{self.hot:g} of an FFN cannot be hot", hint="0 to 1")
        if not 1 <= self.cluster <= 1 << 16:
            raise OptionError(f"a cluster of {self.cluster} neurons cannot be", hint="1 to 65536")
