"""Texts and models for the tests of relufication."""

import json

import numpy as np
from pi2.builtin.mmap_tier import MmapTier
from pi2.container import open_model
from pi2.container.layout import QuantPlan
from pi2.relufy import Settings, open_relufication
from pi2.relufy.sources import PiModelSource
from pi2.tensor import Tensor
from pi2.testing.models import RandomSource, toy_architecture

PROSE = "The quick brown fox jumps over the lazy dog while it rains, and nobody minds. "


def silu_source(seed=0, **changes):
    return RandomSource(toy_architecture(**{"activation": "silu", **changes}), seed)


class LoudSource(RandomSource):
    """A SiLU model whose FFNs matter more than in the kit's."""

    def __init__(self):
        super().__init__(toy_architecture(activation="silu"))

    def tensor(self, name):
        tensor = super().tensor(name)
        loud = name.endswith("ffn.down.weight")
        return Tensor.from_f32(tensor.to_f32() * np.float32(12)) if loud else tensor


def written(path):
    """A pi2 model as a source."""
    return PiModelSource(open_model(path, MmapTier()))


def quick(**changes):
    """Settings for a training of seconds."""
    given = {
        "tokens": 3000, "quant": QuantPlan.named("q8_0"), "sequence": 32, "refit_tokens": 512,
        "held_out": 192, "lr": 3e-3, "warm_up": 5, "threads": 1, "checkpoint_s": 1e9,
    }  # fmt: skip
    return Settings(**{**given, **changes})


def write_texts(folder):
    """A plain text and conversations."""
    plain, chat = folder / "plain.txt", folder / "chat.jsonl"
    plain.write_text("".join(f"{i} {PROSE}" for i in range(40)))
    talks = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i} is {i}."}]}
        for i in range(30)
    ]
    talks[3]["verbatim"] = True
    chat.write_text("\n".join(map(json.dumps, talks)) + "\n")
    return [plain, chat]


def run(destination, texts, settings=None, source=None, stop_after=None, keep=False, **options):
    """A whole relufication; the report, or None if it was stopped after so many steps."""
    source = source or silu_source()
    with open_relufication(source, texts, destination, settings or quick(), **options) as work:
        work.compare()
        work.refit()
        steps = 0

        def stopped():
            nonlocal steps
            steps += 1
            return stop_after is not None and steps > stop_after

        if not work.distil(stopped=stopped):
            return None
        work.write(keep=keep)
        return work.report
