"""Seeded toy models, made in code: under a megabyte, nothing to download, sparse like the real ones."""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from pi2 import inventory
from pi2.api import ModelSource
from pi2.architecture import Architecture, Rope
from pi2.container.layout import QuantPlan
from pi2.convert import convert
from pi2.tensor import F32, Tensor

SPECIALS = ("<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_LIFT = 4.0
"""Element 0 of every hidden state, in standard deviations of the others: what gates lean on."""
_THRESHOLD = {False: 0.84, True: 0.5}
"""How far below zero the mean gate lies, in standard deviations, by ``up_relu``: a normal variable is
above 0.84 for 20 % of the tokens, above 0.5 for 31 %, of which a ReLU on the up side leaves half."""


def toy_architecture(**changes: Any) -> Architecture:
    """A two-layer ReLU model in the manner of Llama; ``changes`` are fields of Architecture."""
    base = Architecture(
        family="llama",
        vocab_size=256 + len(SPECIALS),
        d_model=64,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=16,
        n_neurons=160,
        max_context=256,
        activation="relu",
        rope=Rope(theta=10_000.0, dims=16),
        attn_scale=0.25,
        tied=True,
        bos_id=256,
        eos_ids=(257,),
    )
    return dataclasses.replace(base, **changes)


def ffn_inputs(arch: Architecture, n: int, rng: Generator) -> F32:
    """(n, d): what the FFNs of a toy model see, normalised and with its first element lifted."""
    x = rng.normal(0, 1, (n, arch.d_model))
    x[:, 0] = _LIFT
    x /= np.sqrt(np.mean(np.square(x), axis=1, keepdims=True))
    return x.astype(np.float32)


class RandomSource(ModelSource):
    """Random weights for any architecture; the same ones for the same seed.

    With ReLU 10 to 30 % of the activations are not zero: nothing ever writes to element 0 of the hidden
    state, so that it stays positive, and every gate has a negative weight for it.
    """

    def __init__(self, architecture: Architecture, seed: int = 0) -> None:
        self.architecture = architecture
        self.provenance = {"format": "random", "name": f"toy model {seed}"}
        self._seed = seed
        self.shapes = inventory.dense_matrices(architecture)
        self.lengths = inventory.dense_vectors(architecture)
        for layer in range(architecture.n_layers):
            for name in inventory.neuron_matrices(architecture, layer).values():
                self.shapes[name] = (architecture.n_neurons, architecture.d_model)
            for name in inventory.neuron_biases(architecture, layer):
                self.lengths[name] = architecture.n_neurons

    def tensor(self, name: str) -> Tensor:
        rows, cols = self.shapes[name]
        values = self._rng(name).normal(0, cols**-0.5, (rows, cols)).astype(np.float32)
        part = name.split(".", 2)[-1]
        if name == "embed.weight":
            values *= np.float32(cols**0.5)  # the others' deviation becomes 1
            values[:, 0] = _LIFT / self.architecture.embed_scale
        elif name == "embed.positions":
            values[:, 0] = 0
        elif part == "attn.o.weight":
            values[0] = 0
        elif part == "ffn.down.weight":
            # neuron-major; a sum over n_neurons, and small, so that later layers see what the first did
            values *= np.float32(0.5 * (cols / rows) ** 0.5)
            values[:, 0] = 0
        elif self.architecture.sparse and part == f"ffn.{'gate' if self.architecture.gated else 'up'}.weight":
            values[:, 0] = -_THRESHOLD[self.architecture.up_relu] / _LIFT
        return Tensor.from_f32(values)

    def vector(self, name: str) -> F32:
        noise = self._rng(name).normal(0, 0.05, self.lengths[name]).astype(np.float32)
        if name.endswith("norm.weight"):
            return 1 + noise
        if name.endswith(("attn.o.bias", "ffn.down.bias", "post_norm.bias")):
            noise[0] = 0
        return noise

    def tokenizer_json(self) -> str:
        return toy_tokenizer().to_str()

    def chat_template(self) -> str | None:
        return CHAT_TEMPLATE

    def _rng(self, name: str) -> Generator:
        return np.random.default_rng([self._seed, zlib.crc32(name.encode())])


def toy_tokenizer() -> Tokenizer:
    """One token a byte, and SPECIALS behind them; puts ``<s>`` before a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def write_toy_model(
    path: Path, architecture: Architecture | None = None, *, quant: str = "q8_0", seed: int = 0
) -> Path:
    """Make a pi2 model at ``path`` (which must not exist) and return it."""
    source = RandomSource(architecture or toy_architecture(), seed)
    return convert(source, path, QuantPlan.named(quant))
