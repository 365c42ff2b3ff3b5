"""Distillation of the original into its ReLU twin, with a push towards sparsity.

The loss is that of ``Settings``: KL on the next token, the residual stream's error, cross-entropy on
answers, and a soft density (sigmoid of the gate values) whose weight ``DensityControl`` steers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pi2.errors import Pi2Error
from pi2.relufy.control import DensityControl
from pi2.relufy.corpus import VERBATIM, Row
from pi2.relufy.network import Network, Trace
from pi2.relufy.sampler import Drawn, Sampler
from pi2.relufy.settings import Settings
from pi2.relufy.twin import Twin
from pi2.tensor import F32
from pi2.threads import lock, run_together

_BETAS = (0.9, 0.985)
_VERBATIM_WEIGHT = 0.5  # of cross-entropy where it stands for the KL
_MEMORY = 0.95  # of the running means that are shown
_LOST_STEPS = 20  # steps without finite gradients that end the training


@dataclass(slots=True)
class Progress:
    """How far a training has come.  JSON, but for the arrays, is all that a checkpoint holds of it."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    lost: int = 0
    means: dict[str, float] = field(default_factory=dict)


class Distiller:
    """Trains ``twin`` after ``original`` on the rows of ``sampler``."""

    def __init__(self, original: Network, twin: Twin, sampler: Sampler, settings: Settings) -> None:
        self.done = Progress()
        self.control = DensityControl(settings.density, settings.density_ramp, settings.density_push)
        self._original, self._twin, self._sampler, self._settings = original, twin, sampler, settings
        self._params = list(twin.masters.values())
        self._optimiser = torch.optim.Adam(self._params, lr=settings.lr, betas=_BETAS, fused=True)
        self._depths = _depths(twin.arch.n_layers)
        self._failed = False
        self._lock = lock()
        for p in self._params:  # at once, so that a checkpoint has its place for them
            self._optimiser.state[p] = {
                "step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)
            }  # fmt: skip

    @property
    def share(self) -> float:
        """How much of the budget is used, 0 to 1 and a little beyond."""
        s, used = self._settings, [0.0]
        if s.tokens is not None:
            used.append(self.done.tokens / s.tokens)
        if s.minutes is not None:
            used.append(self.done.seconds / (60 * s.minutes))
        return max(used)

    def run(
        self,
        progress: Callable[[str, int, int], None] = lambda what, done, total: None,
        stopped: Callable[[], bool] = lambda: False,
        checkpoint: Callable[[], None] = lambda: None,
    ) -> bool:
        """Train until the budget is used up, or ``stopped``; whether it is used up.

        ``checkpoint`` is called now and then, between two steps.
        """
        clock = saved = time.monotonic()

        def after_step() -> None:
            nonlocal clock, saved
            now = time.monotonic()
            self.done.seconds += now - clock
            clock = now
            if now - saved > self._settings.checkpoint_s:
                checkpoint()
                saved = time.monotonic()
            progress(self._line(), min(1000, int(1000 * self.share)), 1000)

        def work() -> None:
            network, leaves = self._twin.replica()
            try:
                while self.share < 1 and not stopped() and not self._failed:
                    self._step(network, leaves, after_step)
            except BaseException:
                self._failed = True  # the other workers need not go on
                raise

        run_together([work] * self._settings.workers)
        return self.share >= 1

    def state(self) -> dict[str, Any]:
        """All that a checkpoint must hold beside :meth:`arrays`."""
        return {
            "done": asdict(self.done),
            "control": asdict(self.control),
            "drawn": asdict(self._sampler.drawn),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; the arrays have been filled already."""
        self.done = Progress(**state["done"])
        self._sampler.drawn = Drawn(**state["drawn"])
        wanted = {"target": self._settings.density, "ramp": self._settings.density_ramp}
        self.control = DensityControl(**{**state["control"], **wanted})
        for p in self._params:
            self._optimiser.state[p]["step"].fill_(self.done.steps - self.done.lost)
        self._twin.show()

    def arrays(self) -> dict[str, F32]:
        """Weights and moments of the optimiser, on the same memory."""
        arrays = dict(self._twin.arrays())
        for name, p in self._twin.masters.items():
            arrays[f"{name}:mean"] = self._optimiser.state[p]["exp_avg"].numpy()
            arrays[f"{name}:square"] = self._optimiser.state[p]["exp_avg_sq"].numpy()
        return arrays

    def _step(self, network: Network, leaves: dict[str, Tensor], after: Callable[[], None]) -> None:
        with self._lock:
            number, weight = self._sampler.drawn.rows, self.control.weight
            row = self._sampler.next()
        rng = np.random.default_rng([self._settings.seed, 2, number])
        with torch.autocast("cpu", torch.bfloat16, enabled=self._settings.bf16):
            loss, found = self._loss(network, row, rng, weight)
        # torch leaves backward() untyped
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no type for it
        with self._lock:
            self._apply(leaves, row, found)
            after()

    def _loss(
        self, network: Network, row: Row, rng: np.random.Generator, weight: float
    ) -> tuple[Tensor, dict[str, float]]:
        s = self._settings
        with torch.no_grad():
            theirs = self._original.trace(row)
        ours = network.trace(row)
        chosen = choose_positions(row, s.kl_positions, rng)
        kl, answers, text = self._foresight(network, theirs, ours, row, chosen)
        mse = torch.stack([_relative_error(ours.streams[d], theirs.streams[d]) for d in self._depths]).mean()
        soft, density = _density(ours, s.softness)
        loss = kl + s.mse_weight * mse + s.answer_weight * answers + s.text_weight * text + weight * soft
        return loss, {"kl": kl.item(), "mse": mse.item(), "answers": answers.item(), "density": density}

    def _foresight(
        self, network: Network, theirs: Trace, ours: Trace, row: Row, chosen: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean KL at the chosen positions, with cross-entropy where answers are learnt verbatim; and

        the mean cross-entropy of the chosen positions in answers, and of those elsewhere."""
        with torch.no_grad():
            wanted = F.log_softmax(self._original.logits(theirs.streams[-1][chosen]).float(), -1)
        found = F.log_softmax(network.logits(ours.streams[-1][chosen]).float(), -1)
        kl = (wanted.exp() * (wanted - found)).sum(-1)
        following = torch.from_numpy(np.roll(row.ids, -1)[chosen])
        nll = -found.gather(1, following[:, None])[:, 0]
        answers = torch.from_numpy(row.answers[chosen])
        kl = torch.where(answers == VERBATIM, _VERBATIM_WEIGHT * nll, kl)
        last = torch.from_numpy(np.diff(row.documents, append=-1)[chosen] != 0)  # what follows is another's
        return kl.mean(), _mean(nll, answers > 0), _mean(nll, (answers == 0) & ~last)

    def _apply(self, leaves: dict[str, Tensor], row: Row, found: dict[str, float]) -> None:
        """One step of the optimiser with the gradients of ``leaves``, which are used up."""
        s, done = self._settings, self.done
        norm = float(torch.nn.utils.clip_grad_norm_(leaves.values(), s.clip))
        done.steps += 1
        done.tokens += len(row.ids)
        if math.isfinite(norm):
            self._optimiser.param_groups[0]["lr"] = learning_rate(s, done.steps, self.share)
            for p, leaf in zip(self._params, leaves.values(), strict=True):
                p.grad = leaf.grad
            self._optimiser.step()
            self._twin.show()
            self.control.update(found["density"], self.share)
            for name, value in {**found, "norm": norm}.items():
                done.means[name] = _MEMORY * done.means.get(name, value) + (1 - _MEMORY) * value
        else:
            self._lose()
        for p, leaf in zip(self._params, leaves.values(), strict=True):
            p.grad = leaf.grad = None

    def _lose(self) -> None:
        """A step without finite gradients changes nothing; many of them end the training."""
        self.done.lost += 1
        if self.done.lost >= _LOST_STEPS:
            raise Pi2Error(
                f"the training has diverged: {self.done.lost} steps had no finite gradient",
                hint="begin again with --restart and a lower --lr",
            )

    def _line(self) -> str:
        means = self.done.means
        return f"density {means.get('density', 0):.3f} KL {means.get('kl', 0):.3f}"


def choose_positions(row: Row, share: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """So many of a row's positions, ascending: those of answers first, up to half, the others at random."""
    wanted = max(1, int(share * len(row.ids)))
    answers = rng.permutation(np.flatnonzero(row.answers > 0))[: wanted // 2]
    others = np.setdiff1d(np.arange(len(row.ids)), answers, assume_unique=True)
    return np.sort(np.concatenate((answers, rng.permutation(others)[: wanted - len(answers)])))


def learning_rate(settings: Settings, step: int, share: float) -> float:
    """Linear warm-up, then a cosine from ``lr`` to ``lr_end`` over the training."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    return (settings.lr_end + (settings.lr - settings.lr_end) * cosine) * min(1.0, step / settings.warm_up)


def _depths(n_layers: int) -> list[int]:
    """Five places of the residual stream, evenly spaced, the last one before the last layer."""
    return sorted({max(1, round(n_layers * k / 5)) for k in range(1, 5)} | {max(1, n_layers - 1)})


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    return (values * chosen).sum() / chosen.sum().clamp(min=1)


def _relative_error(ours: Tensor, theirs: Tensor) -> Tensor:
    squares = (ours - theirs).square().mean(-1) / (theirs.square().mean(-1) + 1e-6)
    return squares.mean()


def _density(ours: Trace, softness: float) -> tuple[Tensor, float]:
    """The soft density, which has gradients, and the true one."""
    soft = torch.stack([torch.sigmoid(g / (softness * g.detach().std() + 1e-9)).mean() for g in ours.gates])
    true = torch.stack([(g.detach() > 0).float().mean() for g in ours.gates])
    return soft.mean(), float(true.mean())
