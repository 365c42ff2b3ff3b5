"""Perplexity and zeros of a network on text that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from pi2.relufy.corpus import Row
from pi2.relufy.network import Network


@dataclass(frozen=True, slots=True)
class Measure:
    """What held-out texts say of a model."""

    perplexity: float
    """Of all texts together."""
    by_text: dict[str, float]
    zeros: float
    """Share of the activations that are exactly zero."""
    zeros_by_layer: list[float]

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def measure(
    network: Network, texts: Mapping[str, Sequence[Row]], on_tokens: Callable[[int], None] = lambda n: None
) -> Measure:
    """Read every row of ``texts``; each of its tokens but the first is foreseen."""
    arch = network.arch
    totals = dict.fromkeys(texts, (0.0, 0))
    zeros, tokens = torch.zeros(arch.n_layers, dtype=torch.float64), 0
    with torch.no_grad():
        for name, rows in texts.items():
            for row in rows:
                trace = network.trace(row)
                logits = network.logits(trace.streams[-1][:-1])
                target = torch.from_numpy(row.ids[1:])
                nll = float(F.cross_entropy(logits.double(), target, reduction="sum"))
                totals[name] = totals[name][0] + nll, totals[name][1] + len(target)
                if arch.sparse:
                    zeros += torch.stack([(gate <= 0).double().mean() for gate in trace.gates]) * len(row.ids)
                tokens += len(row.ids)
                on_tokens(len(row.ids))
    by_layer = (zeros / tokens).tolist()
    whole = math.exp(sum(nll for nll, _ in totals.values()) / sum(n for _, n in totals.values()))
    by_text = {name: math.exp(nll / n) for name, (nll, n) in totals.items()}
    return Measure(whole, by_text, sum(by_layer) / len(by_layer), by_layer)
