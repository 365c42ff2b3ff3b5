"""What a relufication is asked to do, and the checks of it."""

from __future__ import annotations

from dataclasses import dataclass

from pi2.container.layout import QuantPlan
from pi2.errors import OptionError


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to train.  The defaults are what worked for a model of 135 M parameters.

    The loss is KL to the original's next-token distribution at ``kl_positions`` of the positions (answers
    of conversations first), + ``mse_weight`` x the relative squared error of the residual stream at five
    depths, + ``answer_weight`` x cross-entropy on answers, + ``text_weight`` x that on plain text, + the push
    towards ``density``.
    """

    tokens: int | None = 300_000
    """Tokens to train on in all; None: until ``minutes`` are over."""
    minutes: float | None = None
    """Minutes of training in all, over every run; a run that this ends cannot be repeated exactly."""
    quant: QuantPlan
    """Formats that the twin will be stored in: training sees its weights rounded to them."""
    density: float = 0.25
    """Share of active neurons to reach."""
    density_ramp: float = 0.3
    """Share of the training in which the wanted density falls from where it starts to ``density``."""
    density_push: float = 1.0
    """The push at the start; from there a controller finds it."""
    softness: float = 0.15
    """Width of the sigmoid that stands for "active", in standard deviations of a layer's gate values."""
    lr: float = 1.5e-4
    lr_end: float = 4e-6
    warm_up: int = 40
    """Steps until the learning rate is reached."""
    kl_positions: float = 1.0
    mse_weight: float = 0.3
    answer_weight: float = 0.07
    text_weight: float = 0.0
    clip: float = 1.0
    """Largest norm of a step's gradient."""
    sequence: int = 256
    """Tokens of a step; every fourth step has twice as many."""
    shares: tuple[float, ...] = ()
    """Of each text in the mixture; empty: the same share for all."""
    refit_tokens: int = 16_384
    """Tokens that W_down is refitted on; 0: no refit."""
    ridge: float = 0.01
    """Pull of the refit towards the old W_down, as a share of the mean energy of a neuron."""
    held_out: int = 2048
    """Tokens of all texts together that are kept from training, to measure perplexity on."""
    workers: int = 1
    """Threads that train at the same time, each on a row of its own; more than one is not repeatable."""
    threads: int | None = None
    """Threads of each worker's arithmetic; None: all cores for one worker, else one."""
    bf16: bool = False
    """Whether matrices are multiplied in bfloat16: faster where the processor does that."""
    seed: int = 0
    checkpoint_s: float = 600.0
    """Seconds between two checkpoints."""

    def check(self, texts: int) -> None:
        """Raise OptionError unless the settings make sense for so many texts."""
        if self.tokens is None and self.minutes is None:
            raise OptionError("nothing says when to stop", hint="give --tokens or --minutes")
        positive = {"tokens": self.tokens, "minutes": self.minutes, "sequence": self.sequence,
                    "workers": self.workers, "held_out": self.held_out, "lr": self.lr}  # fmt: skip
        for name, value in positive.items():
            if value is not None and not value > 0:
                raise OptionError(f"{name} = {value} cannot be", hint="it must be more than 0")
        for name in ("density", "density_ramp", "kl_positions"):
            if not 0 < getattr(self, name) <= 1:
                raise OptionError(f"{name} = {getattr(self, name)} cannot be", hint="it is a share of 1")
        if self.sequence < 32:
            raise OptionError(f"steps of {self.sequence} tokens teach nothing", hint="32 or more")
        if self.held_out < 64 * texts:
            raise OptionError(f"{self.held_out} tokens are too few to measure on", hint="64 a text at least")
        if self.shares and (len(self.shares) != texts or min(self.shares) <= 0):
            raise OptionError(
                f"{len(self.shares)} shares for {texts} texts",
                hint="give a number above 0 for each text, for example --shares 0.4,0.6",
            )
