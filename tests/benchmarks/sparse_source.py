"""Random weights whose FFN gates open as seldom, as unevenly and as steadily as wanted, by construction.

The hidden state has three kinds of elements.  32 *constant* ones are set by the embedding and written by
no layer.  A quarter is *slow*: only attention (and, weakly, FFNs) writes there, an average over the tokens
before.  The others are *fast*: the token's own embedding, and what FFNs add.

    gate_i . x  =  a_i . (B x)  +  noise  -  tau_i        a_i of ``rank`` numbers, B shared by an FFN

B reads fast and slow elements so that B x is normal with deviation 1 and the slow ones make the share
``slow`` of its variance; the weights on the constant elements make tau_i.  RMSNorm scales all three alike,
so whether a gate is above zero does not depend on it.  tau_i is normal over the neurons with deviation
``skew`` and the mean that gives ``density``.  Queries and keys see little but the constants: attention
falls with the distance as its power ``-decay``, through RoPE's own frequencies, so nothing is positioned
by hand.  Weights are q4_0 of one scale per matrix; zeros in a matrix are whole blocks of 32.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.random import SFC64, Generator
from numpy.typing import NDArray
from pi2 import inventory
from pi2.api import ModelSource
from pi2.architecture import Architecture, Rope
from pi2.rope import inverse_frequencies
from pi2.tensor import BLOCK, F32, U8, Tensor, join_row
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

# Sixteen random nibbles become quants of mean 0: -7..-1, 0 twice, 1..7; stored with an offset of 8.
_QUANTS = np.array([*range(-7, 0), 0, 0, *range(1, 8)], np.int8)
_DEVIATION = float(_QUANTS.std())
_NIBBLES = (_QUANTS + 8).astype(np.uint8)
_BYTES = (_NIBBLES[np.arange(256) & 15] | _NIBBLES[np.arange(256) >> 4] << 4).astype(np.uint8)
_NORMAL = NormalDist()
_CHUNK = 1024  # gate rows made at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Dimensions of the model, and what its activations shall be like.

    The defaults of the second group were fitted to ``activity.py`` on the real ReLU model, whose gates
    were cut to a density of 10 %: its figures are in the report of ``make_model.py --check``.
    """

    d_model: int = 4096
    neurons: int = 14336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 32000
    context: int = 4096
    seed: int = 0

    activation: str = "relu"
    density: float = 0.1
    skew: float = 1.05
    """Deviation of the neurons' thresholds; 0: all are equally often active."""
    slow: float = 0.5
    """Share of a gate's variance that changes slowly along the text."""
    decay: float = 0.75
    """Attention falls as this power of the distance."""
    rank: int = 128
    noise: float = 0.05
    """Share of a gate's variance that is not of low rank: no predictor of this rank sees it."""
    spectrum: float = 0.5
    """Variance of the j-th of the ``rank`` directions falls as this power of j."""
    together: float = 0.2
    """Part of each gate that is the same for all neurons of an FFN: busy and idle tokens."""
    everywhere: float = 0.11
    """Part of each gate that is the same for all neurons of all FFNs."""
    attention_write: float = 1.0
    """Variance of the slow elements after the last layer; that of the embedding is 1."""
    ffn_write: float = 0.3
    """Variance that all FFNs together add to fast and slow elements."""
    logits: float = 2.0
    """Deviation of the logits: sampled text wanders instead of repeating itself."""

    @property
    def slow_elements(self) -> int:
        return max(1, self.d_model // 4 // BLOCK) * BLOCK

    @property
    def fast_elements(self) -> int:
        return self.d_model - BLOCK - self.slow_elements

    def architecture(self) -> Architecture:
        return Architecture(
            family="llama", vocab_size=self.vocab, d_model=self.d_model, n_layers=self.layers,
            n_heads=self.heads, n_kv_heads=self.kv_heads, head_dim=self.head_dim, n_neurons=self.neurons,
            max_context=self.context, rope=Rope(theta=10_000.0, dims=self.head_dim),
            attn_scale=self.head_dim**-0.5, activation=self.activation,  # type: ignore[arg-type]
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Gates:
    """The gates of an FFN for RMSNorm's x: ``loads @ (directions @ x) - thresholds``, and noise."""

    loads: F32  # (neurons, rank), rows of length sqrt(1 - noise)
    directions: F32  # (rank, d), without the constant elements
    thresholds: F32  # (neurons,)
    noise: F32  # (d,): deviation of the weights of what is not of low rank
    constant: float  # value of the constant elements in x


class SparseSource(ModelSource):
    """The weights, a matrix at a time, by seed and name."""

    def __init__(self, shape: Shape) -> None:
        self.shape = s = shape
        self.architecture = arch = shape.architecture()
        self.provenance = {"format": "generated", "name": "sparse benchmark model", **_texts(shape)}
        self._sizes = inventory.dense_matrices(arch)
        for layer in range(s.layers):
            names = inventory.neuron_matrices(arch, layer).values()
            self._sizes |= dict.fromkeys(names, (s.neurons, s.d_model))
        self._fast = slice(BLOCK, BLOCK + s.fast_elements)
        self._slow = slice(BLOCK + s.fast_elements, s.d_model)
        self._amplitude, self._averaged = _attention_kernel(s)

    # What the hidden state is like.

    def fast_variance(self, layer: int) -> float:
        return 1 + layer * self.shape.ffn_write / self.shape.layers

    def slow_variance(self, layer: int, attended: bool) -> float:
        s = self.shape
        return ((layer + attended) * s.attention_write + layer * s.ffn_write) / s.layers

    def rms(self, layer: int, attended: bool) -> float:
        """Of the hidden state before the attention or (``attended``) before the FFN of ``layer``."""
        s = self.shape
        fast = s.fast_elements * self.fast_variance(layer)
        slow = s.slow_elements * self.slow_variance(layer, attended)
        return float(np.sqrt((BLOCK + fast + slow) / s.d_model))

    def gates(self, layer: int) -> Gates:
        """What the gate matrix of an FFN is made of."""
        s, rng = self.shape, self._rng(f"gates.{layer}")
        fast = np.sqrt((1 - s.slow) / self.fast_variance(layer))
        slow = np.sqrt(s.slow / self.slow_variance(layer, attended=True))
        directions = np.zeros((s.rank, s.d_model), np.float32)
        directions[:, self._fast] = fast * _directions(s.rank, s.fast_elements, self._rng("everywhere"), rng)
        directions[:, self._slow] = slow * _directions(s.rank, s.slow_elements, self._rng("slowly"), rng)
        noise = np.zeros(s.d_model, np.float32)
        noise[self._fast], noise[self._slow] = fast / s.fast_elements**0.5, slow / s.slow_elements**0.5
        rms = self.rms(layer, attended=True)
        mean = -_NORMAL.inv_cdf(s.density) * (1 + s.skew**2) ** 0.5
        thresholds = mean + s.skew * rng.standard_normal(s.neurons, np.float32)
        noise *= np.float32(rms * s.noise**0.5)
        return Gates(self._loads(rng), directions * np.float32(rms), thresholds, noise, 1 / rms)

    def _loads(self, rng: Generator) -> F32:
        """The first direction is that of all FFNs, the second that of all neurons of this one."""
        s = self.shape
        loads = rng.standard_normal((s.neurons, s.rank), np.float32)
        loads *= np.arange(1, s.rank + 1, dtype=np.float32) ** (-s.spectrum / 2)
        loads[:, :2] = 0
        rest = 1 - s.noise - s.everywhere**2 - s.together**2
        loads *= np.sqrt(rest) / np.linalg.norm(loads, axis=1, keepdims=True)
        loads[:, 0], loads[:, 1] = s.everywhere, s.together
        return loads

    # Matrices.

    def tensor(self, name: str) -> Tensor:
        rows, cols = self._sizes[name]
        layer, part = _place(name)
        if part == "ffn.gate":
            return self._gate(layer)
        quants = _BYTES[self._rng(name).integers(0, 256, (rows, cols // 2), np.uint8)]
        scales = np.zeros((rows, cols // BLOCK), np.float32)
        self._fill(part, layer, quants, scales)
        return Tensor(join_row(quants, scales.astype(np.float16)), "q4_0", cols)

    def _fill(self, part: str, layer: int, quants: U8, scales: F32) -> None:
        """Scales of a matrix of random quants; blocks that are left at 0 read nothing."""
        s, d = self.shape, self.shape.d_model
        fast = slice(self._fast.start // BLOCK, self._fast.stop // BLOCK)
        if part == "embed":
            scales[:, fast] = 1 / _DEVIATION
            _set_constant(quants, scales, np.ones(len(scales)))
        elif part in ("attn.q", "attn.k"):
            # a little of the token itself, so that no two tokens attend quite alike
            seen = self.fast_variance(layer) / self.rms(layer, attended=False) ** 2
            scales[:, fast] = 0.2 / _DEVIATION / np.sqrt(s.fast_elements * seen)
            first = np.arange(len(scales)) % s.head_dim < s.head_dim // 2  # RoPE pairs i and i + half
            _set_constant(quants, scales, first * self._amplitude * self.rms(layer, attended=False) / BLOCK)
        elif part == "attn.v":
            seen = self.fast_variance(layer) / self.rms(layer, attended=False) ** 2
            scales[:, fast] = 1 / _DEVIATION / np.sqrt(s.fast_elements * seen)
        elif part == "attn.o":
            inputs = s.heads * s.head_dim * self._averaged
            scales[self._slow] = np.sqrt(s.attention_write / s.layers / inputs) / _DEVIATION
        elif part == "ffn.up":
            scales[:] = d**-0.5 / _DEVIATION
        elif part == "ffn.down":
            energy = s.neurons * _relu_energy(s)
            scales[:, 1:] = np.sqrt(s.ffn_write / s.layers / energy) / _DEVIATION
        else:
            assert part == "head", part
            scales[:] = s.logits * d**-0.5 / _DEVIATION

    def _gate(self, layer: int) -> Tensor:
        gates, rng = self.gates(layer), self._rng(f"gate noise {layer}")
        rows = []
        for first in range(0, self.shape.neurons, _CHUNK):
            end = min(first + _CHUNK, self.shape.neurons)
            values = rng.standard_normal((end - first, self.shape.d_model), np.float32)
            values *= gates.noise
            values += gates.loads[first:end] @ gates.directions
            values[:, :BLOCK] = -(gates.thresholds[first:end] / (BLOCK * gates.constant))[:, None]
            rows.append(Tensor.from_f32(values, "q4_0").data)
        return Tensor(np.concatenate(rows), "q4_0", self.shape.d_model)

    def vector(self, name: str) -> F32:
        return np.ones(self.shape.d_model, np.float32)

    def tokenizer_json(self) -> str:
        return word_tokenizer(self.shape.vocab).to_str()

    def chat_template(self) -> str | None:
        return None

    def _rng(self, name: str) -> Generator:
        return Generator(SFC64([self.shape.seed, zlib.crc32(name.encode())]))


def word_tokenizer(vocab: int) -> Tokenizer:
    """One token a byte; the others are made-up words, which decode to text but are never encoded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:vocab]
    words = [f"Ġw{i}" for i in range(len(alphabet), vocab)]
    tokenizer = Tokenizer(BPE({text: i for i, text in enumerate(alphabet + words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _texts(shape: Shape) -> dict[str, str]:
    return {"shape": json.dumps(asdict(shape))}


def _place(name: str) -> tuple[int, str]:
    """``layers.3.ffn.up.weight`` -> (3, "ffn.up")."""
    parts = name.split(".")
    return (int(parts[1]), ".".join(parts[2:4])) if parts[0] == "layers" else (0, parts[0])


def _directions(rank: int, width: int, shared: Generator, own: Generator) -> F32:
    """(rank, width), orthonormal; the first row is the same whatever ``own``."""
    columns = np.empty((width, rank))
    columns[:, 0] = shared.standard_normal(width)
    columns[:, 1:] = own.standard_normal((width, rank - 1))
    q, r = np.linalg.qr(columns)
    return np.ascontiguousarray((q * np.sign(np.diag(r))).T, np.float32)


def _set_constant(quants: U8, scales: F32, values: NDArray[np.float64]) -> None:
    """Let all weights on the constant elements, the first block of a row, be ``values`` (rows,)."""
    quants[:, : BLOCK // 2] = 0  # -8 in both nibbles
    scales[:, 0] = -values / 8


@lru_cache
def _attention_kernel(s: Shape) -> tuple[float, float]:
    """What each paired element of queries and keys must be, and the sum of squares of the weights.

    A score is ``amplitude^2 / sqrt(head_dim) * sum_f cos(distance * frequency_f)``.  The frequencies are
    evenly spread over the powers of theta, so the mean cosine falls as the logarithm of the distance.
    """
    frequencies = inverse_frequencies(Rope(theta=10_000.0, dims=s.head_dim))
    distances = np.arange(min(256, s.context // 2))
    scores = s.decay * np.log(10_000.0) * np.cos(distances[:, None] * frequencies).mean(axis=1)
    weights = np.exp(scores - scores[0])
    weights /= weights.sum()
    pairs = len(frequencies)
    return float(np.sqrt(s.decay * np.log(10_000.0) * s.head_dim**0.5 / pairs)), float((weights**2).sum())


def _relu_energy(s: Shape) -> float:
    """Mean of relu(z)^2 for z normal with deviation sqrt(1 + skew^2), above 0 with probability density."""
    cut = -_NORMAL.inv_cdf(s.density)
    return (1 + s.skew**2) * ((1 + cut**2) * s.density - cut * _NORMAL.pdf(cut))
