"""Seeded random models in memory, for the tests of the container and of conversion."""

import hashlib
import json

import numpy as np
from pi2.architecture import Architecture, Rope
from pi2.container.writer import JOURNAL
from pi2.tensor import Tensor
from pi2.testing import models

TOKENIZER = json.dumps(
    {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
)


def tiny(**changes):
    """A description of a model of a few kilobytes."""
    given = {
        "family": "llama", "vocab_size": 50, "d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2,
        "head_dim": 16, "n_neurons": 70, "max_context": 32, "activation": "relu",
        "rope": Rope(theta=10000.0, dims=16), "attn_scale": 0.25, "eos_ids": (1, 2),
    }  # fmt: skip
    return Architecture(**(given | changes))


class RandomSource(models.RandomSource):
    """The kit's random model with weights in the format ``dtype``, and without a real tokenizer."""

    def __init__(self, architecture, seed=0, dtype="f32", template=None):
        super().__init__(architecture, seed)
        self.provenance = {"format": "random", "name": f"seed {seed}", "dtype": dtype}
        self.dtype, self.template = dtype, template

    def tensor(self, name):
        return Tensor.from_f32(super().tensor(name).to_f32(), self.dtype)

    def tokenizer_json(self):
        return TOKENIZER

    def chat_template(self):
        return self.template


class ConstantSource(RandomSource):
    """Every weight is ``weight``."""

    def __init__(self, architecture, weight):
        super().__init__(architecture)
        self.weight = np.float32(weight)

    def tensor(self, name):
        return Tensor.from_f32(np.full(super().tensor(name).shape, self.weight))


class Counting(RandomSource):
    """Remembers which matrices were asked for, and can fail at the n-th."""

    def __init__(self, architecture, fail_at=None, error=KeyboardInterrupt, **kw):
        super().__init__(architecture, **kw)
        self.asked, self.fail_at, self.error = [], fail_at, error

    def tensor(self, name):
        if len(self.asked) == self.fail_at:
            raise self.error
        self.asked.append(name)
        return super().tensor(name)


def contents(path):
    """Checksum of every file of a model."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in path.iterdir() if p.name != JOURNAL}
