"""Weights that were placed: their graphs, one for each static shape, and how to have them made."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import numpy as np
from pi2.api import FfnSpec
from pi2.tensor import F32, U8, Tensor

from pi2_backend_qnn import norm_scaling, pack, requantise
from pi2_backend_qnn.client import Reply
from pi2_backend_qnn.scaling import Exponents, FfnScaling, down_powers, input_exponents

ROWS: Final = (1, 4, 8, 32, 128)
"""Tokens of a graph: 1 to 8 decode, 32 and 128 prefill; fewer tokens are padded with zeros."""
DECODE: Final = 8
"""Tokens of the largest graph for decoding; those for prompts are only made of whole handles."""
SHARES: Final = 4
"""A handle has so many graphs for each number of tokens: the first quarter of its clusters, half, ..."""

EXACT: Final = "exact"
"""The option ``weights`` of those that stay what they are."""

Shape = tuple[int, int]
"""Tokens, and clusters (1 for a matrix), of a graph."""


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What of an ``AttentionSpec`` a graph depends on beside its weights.

    ``dims``: numbers of a head that are rotated; ``norms``: "rms" or "layer" by "q" and "k", if there is one.
    """

    heads: int
    kv_heads: int
    head_dim: int
    dims: int
    softcap: float | None
    norms: Mapping[str, str]


def rows_for(tokens: int) -> int:
    """Tokens of the smallest graph that takes so many; of the largest, if none does."""
    return next((rows for rows in ROWS if tokens <= rows), ROWS[-1])


@dataclass(eq=False)
class Placed:
    """What matrices and FFNs share.  ``graphs``: number of a graph in the worker, by shape."""

    graphs: dict[Shape, int] = field(default_factory=dict)
    building: dict[Shape, int] = field(default_factory=dict)
    """Tickets of graphs that were asked for ahead of time."""
    made: dict[Shape, Reply] = field(default_factory=dict)
    """How graphs were made that nobody has run yet."""
    generation: int = 0
    """Of the worker that ``graphs`` are in."""
    weights: str = EXACT
    """EXACT, or how they are rounded: a key of ``requantise.BITS``."""

    def forget(self, generation: int) -> None:
        """The graphs are gone."""
        self.graphs, self.building, self.made = {}, {}, {}
        self.generation = generation

    @property
    def digest(self) -> str:
        """Of all that a graph is made of, but its shape."""
        raise NotImplementedError

    def request(self, shape: Shape) -> tuple[dict[str, Any], dict[str, U8]]:
        """What to ask the worker for, and the arrays that go with it."""
        raise NotImplementedError

    def weight_bytes(self, shape: Shape) -> int:
        """Of the weights that a graph has, as QNN stores them."""
        raise NotImplementedError


@dataclass(eq=False)
class Matrix(Placed):
    weight: Tensor = field(kw_only=True)

    def __str__(self) -> str:
        return f"a {self.weight.dtype} matrix of {self.weight.rows} rows"

    @cached_property
    def exponent(self) -> int:
        sizes = pack.sizes_of(self.weight.data, self.weight.dtype)
        return pack.exponent(sizes.largest) if self.weights == EXACT else norm_scaling.linear_exponent(sizes)

    def exponents(self, x: F32) -> Exponents:
        """By which powers of two tokens (n, cols) are divided."""
        return input_exponents(x) if self.weights == EXACT else norm_scaling.norm_exponents(x)

    @cached_property
    def digest(self) -> str:
        return _digest(self.weight.data, f"linear {self.weight.dtype} {self.weight.cols} {self.weights}")

    def request(self, shape: Shape) -> tuple[dict[str, Any], dict[str, U8]]:
        asked = {"do": "linear", "rows": shape[0], "dtype": self.weight.dtype, "cols": self.weight.cols}
        asked |= {"exponent": self.exponent, "weights": self.weights}
        return asked, {"data": np.ascontiguousarray(self.weight.data)}

    def weight_bytes(self, shape: Shape) -> int:
        if self.weights != EXACT:
            return requantise.weight_bytes(self.weight.rows * self.weight.cols, self.weights)
        return self.weight.data.nbytes // pack.SHRINKS.get(self.weight.dtype, 1)


@dataclass(eq=False)
class Ffn(Placed):
    """Neurons (k, stride) in clusters of ``cluster``, in their order."""

    bundles: U8 = field(kw_only=True)
    spec: FfnSpec = field(kw_only=True)
    cluster: int = field(kw_only=True)

    def __post_init__(self) -> None:
        geometry = self.spec.geometry
        sizes = {}
        for name in ("gate", "up", "down"):
            if (dtype := getattr(geometry, name)) is not None:
                offset, size = geometry.segments()[name]
                sizes[name] = pack.sizes_of(self.bundles[:, offset : offset + size], dtype)
        biases: F32 | None = geometry.unpack_segment(self.bundles, "bias") if geometry.biased else None
        if self.weights == EXACT:
            self.exponents: dict[str, Any] = {
                name: pack.exponent(each.largest) for name, each in sizes.items()
            }
            self.exponents["down"], self.exponents["hidden"] = down_powers(sizes["down"])
            self.scaling: FfnScaling = FfnScaling.of(self.spec, sizes, self.exponents, biases)
        else:
            powers = norm_scaling.Powers.of(self.spec, sizes, self.bundles, self.cluster)
            self.exponents = powers.all
            self.scaling = norm_scaling.NormScaling.of_norms(self.spec, powers, biases)

    def __str__(self) -> str:
        return f"these {self.neurons} neurons"

    @property
    def neurons(self) -> int:
        return len(self.bundles)

    @property
    def clusters(self) -> int:
        return -(-self.neurons // self.cluster)

    def shape_for(self, tokens: int, count: int) -> Shape:
        """The smallest graph that has the first ``count`` neurons."""
        rows, needed = rows_for(tokens), -(-count // self.cluster)
        if rows > DECODE:
            return rows, self.clusters
        return rows, next(n for n in self.prefixes() if n >= needed)

    def prefixes(self) -> list[int]:
        """Clusters of the graphs that there may be, ascending."""
        shares = range(1, SHARES + 1)
        return sorted({-(-self.clusters * share // SHARES) for share in shares})

    def sizes(self, clusters: int) -> list[int]:
        """Neurons of the first clusters, of which the last may be short."""
        return [min(self.cluster, self.neurons - c * self.cluster) for c in range(clusters)]

    @cached_property
    def digest(self) -> str:
        spec = self.spec
        what = f"ffn {spec.geometry.to_dict()} {spec.activation} {spec.up_relu} {self.cluster} {self.weights}"
        return _digest(self.bundles, what)

    def request(self, shape: Shape) -> tuple[dict[str, Any], dict[str, U8]]:
        rows, clusters = shape
        spec = {
            "geometry": self.spec.geometry.to_dict(),
            "activation": self.spec.activation,
            "up_relu": self.spec.up_relu,
        }
        asked = {"do": "ffn", "rows": rows, "spec": spec, "cluster": self.cluster, "weights": self.weights}
        return asked | {"exponents": self.exponents}, {"bundles": self.bundles[: clusters * self.cluster]}

    def weight_bytes(self, shape: Shape) -> int:
        geometry, parts = self.spec.geometry, ("gate", "up", "down")
        if self.weights != EXACT:
            matrices = sum(getattr(geometry, part) is not None for part in parts)
            count = matrices * geometry.d_model * sum(self.sizes(shape[1]))
            return requantise.weight_bytes(count, self.weights)
        sizes = [
            geometry.segments()[part][1] // pack.SHRINKS.get(dtype, 1)
            for part in parts
            if (dtype := getattr(geometry, part)) is not None
        ]
        return sum(sizes) * sum(self.sizes(shape[1]))


def _digest(data: U8, what: str) -> str:
    sha = hashlib.sha256(f"{what} {data.shape}\n".encode())
    sha.update(np.ascontiguousarray(data).data)
    return sha.hexdigest()
