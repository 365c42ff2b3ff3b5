"""Seeded random models in memory, for the tests of the container and of conversion."""

import hashlib
import json
import zlib

import numpy as np
from pi2 import inventory
from pi2.api import ModelSource
from pi2.architecture import Architecture, Rope
from pi2.container.writer import JOURNAL
from pi2.tensor import Tensor

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


class RandomSource(ModelSource):
    """Weights that depend on the seed and the tensor's name only, in the format ``dtype``."""

    def __init__(self, architecture, seed=0, dtype="f32", template=None, scale=0.1):
        self.architecture = architecture
        self.provenance = {"format": "random", "name": f"seed {seed}", "dtype": dtype}
        self.seed, self.dtype, self.template, self.scale = seed, dtype, template, scale
        self.shapes = inventory.dense_matrices(architecture)
        self.lengths = inventory.dense_vectors(architecture)
        for layer in range(architecture.n_layers):
            for name in inventory.neuron_matrices(architecture, layer).values():
                self.shapes[name] = (architecture.n_neurons, architecture.d_model)
            for name in inventory.neuron_biases(architecture, layer):
                self.lengths[name] = architecture.n_neurons

    def _values(self, name, shape):
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        return rng.standard_normal(shape, np.float32) * np.float32(self.scale)

    def tensor(self, name):
        return Tensor.from_f32(self._values(name, self.shapes[name]), self.dtype)

    def vector(self, name):
        return self._values(name, self.lengths[name])

    def tokenizer_json(self):
        return TOKENIZER

    def chat_template(self):
        return self.template


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
