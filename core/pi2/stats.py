"""What a generation did, as data; printing is the command line's business."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import pi2
from pi2.decoder import FfnCount
from pi2.memory import rss_peak_bytes
from pi2.offload_count import OffloadCount


@dataclass(slots=True)
class RunStats:
    """Figures of one generation.  Times are seconds of wall clock; rates are tokens per second."""

    prompt_tokens: int = 0
    prefilled_tokens: int = 0
    """Prompt tokens that were really computed: those in the KV cache already are not."""
    prefill_s: float = 0.0
    ttft_s: float | None = None
    """Time to first token: from the call to the first sampled token, prefill included."""
    token_times_s: list[float] = field(default_factory=list)
    """One per decoded token after the first: forward pass and sampling, not the consumer's time."""
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    decode_ffn: FfnCount = field(default_factory=FfnCount)
    reads: list[OffloadCount] = field(default_factory=list)
    """With weights on flash: what prefill and every decoded token read and waited for, in this order."""
    stop_reason: str | None = None
    """"eos", "stop" (a stop string), "length" (max_tokens), "context" (no room left)."""

    @property
    def prefill_tps(self) -> float | None:
        return self.prefilled_tokens / self.prefill_s if self.prefill_s > 0 else None

    @property
    def decode_tps(self) -> float | None:
        total = sum(self.token_times_s)
        return len(self.token_times_s) / total if total > 0 else None

    @property
    def density(self) -> float | None:
        """Share of (token, neuron) pairs of decoding whose activation was not zero."""
        return self.decode_ffn.active / self.decode_ffn.total if self.decode_ffn.total else None

    def add_read(self, count: OffloadCount | None, *, decoding: bool) -> None:
        """Enter what a prefill, the first, or a token read; None: nothing is on flash."""
        if count is not None and decoding == bool(self.reads):
            self.reads.append(count)

    def latency(self) -> dict[str, float] | None:
        """Mean and percentiles of ``token_times_s``."""
        if not self.token_times_s:
            return None
        p50, p90, p99 = np.percentile(self.token_times_s, (50, 90, 99)).tolist()
        return {"mean": float(np.mean(self.token_times_s)), "p50": p50, "p90": p90, "p99": p99}

    def to_json(self, setup: dict[str, Any]) -> dict[str, Any]:
        """The object of ``pi2 run --json``; ``setup`` is ``Engine.setup()``.

        None where a figure does not apply: nothing was decoded, no budget was set, no plan was given, or a
        device was emulated, of whose speed seconds say nothing.
        """
        speed = {
            "ttft_s": self.ttft_s,
            "prefill_tps": self.prefill_tps,
            "decode_tps": self.decode_tps,
            "token_latency_s": self.latency(),
        }
        return {
            "text": self.text,
            "tokens": self.tokens,
            "stop_reason": self.stop_reason,
            "prompt_tokens": self.prompt_tokens,
            **(dict.fromkeys(speed) if setup["emulated"] else speed),
            "rss_peak_bytes": rss_peak_bytes(),
            "budget_bytes": None,
            "policy": None,  # no neuron cache: all weights are resident
            "offload": None,
            "hybrid": None,
            "density": self.density,
            "hit_rate": None,
            "bytes_read": None,
            "io_wait_share": None,
            "predicted_tps": None,
            **setup,
            **offload_figures(self.reads, sum(self.token_times_s)),
            "versions": versions(),
        }


def versions() -> dict[str, str]:
    """What ran: interpreter, pi2, NumPy."""
    return {"pi2": pi2.__version__, "python": platform.python_version(), "numpy": np.__version__}


def offload_figures(reads: Sequence[OffloadCount], seconds: float) -> dict[str, Any]:
    """What ``to_json`` says of weights on flash; nothing for a resident model.

    ``reads``: of prefill, and of every decoded token, which took ``seconds`` together.
    """
    if not reads:
        return {}
    tokens = reads[1:]
    missed = [1 - count.present / count.wanted for count in tokens if count.wanted]
    waited = sum(count.stream.wait_s for count in tokens)
    guessed, useful = sum(c.guessed for c in tokens), sum(c.useful for c in tokens)
    wanted, present = sum(c.wanted for c in tokens), sum(c.present for c in tokens)
    mean, p99 = (float(np.mean(missed)), float(np.percentile(missed, 99))) if missed else (None, None)
    return {
        "hit_rate": present / wanted if wanted else None,
        "bytes_read": sum(count.bytes_read for count in reads),
        "io_wait_share": waited / seconds if seconds else None,
        "offload": {
            "miss_rate": {"mean": mean, "p99": p99},
            "candidates_per_token": wanted / len(tokens) if tokens else None,
            "bytes_read": {
                "prefill": reads[0].bytes_read,
                "decode": sum(count.bytes_read for count in tokens),
            },
            "reads": sum(count.stream.reads for count in tokens),
            "prefetch": {"guessed": guessed, "useful_share": useful / guessed if guessed else None},
            "prefill_io_wait_s": reads[0].stream.wait_s,
            "decode_s": {
                "ffn": sum(count.stream.wall_s for count in tokens),
                "io_wait": waited,
                "gate": sum(count.stream.gate_s for count in tokens),
                "up_down": sum(count.stream.up_down_s for count in tokens),
            },
        },
    }
