"""What pi2 asks of its plugins: five small classes, and the values that pass between them.

These are the floor: what a plugin must write to be correct.  Optional powers are the Protocols of
``pi2.powers``.  Nothing here is called through pluggy per token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from pi2.bundle import BundleGeometry
from pi2.kv_cache import KvDType
from pi2.options import parse_options
from pi2.tensor import F32, U8, Ids, Tensor

if TYPE_CHECKING:
    from pi2.architecture import Activation, Architecture

API_VERSION = 1
"""A plugin's module states ``PI2_API_VERSION``, the version that it was written for."""

Ranges = NDArray[np.int64]
"""(n, 2): byte offset and length."""
Keys = NDArray[np.int64]
"""Neurons, unique in the model: ffn * neurons per FFN + neuron."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Whether an implementation can run on this machine.  Score 0: it cannot, and ``reason`` says why.

    The score comes from the device found, not from the class: 10 for a slow reference, 100 for native
    code on the CPU, more for an accelerator; an emulated device scores below the CPU.
    """

    score: int
    reason: str

    def __bool__(self) -> bool:
        return self.score > 0


@dataclass(frozen=True, slots=True)
class FfnSpec:
    """How the bundles of an FFN are laid out, and what the neurons compute (PowerInfer-2 §2.1)."""

    geometry: BundleGeometry
    activation: Activation
    up_relu: bool = False


class Plugin(ABC):
    """What every implementation has: a name to pick it by, a self-check, a way in and a way out."""

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def probe(cls) -> Probe:
        """Say whether this can run here.  Cheap, without side effects, never raises."""

    @classmethod
    def open(cls, options: Mapping[str, str] | None = None) -> Self:
        """Make one ready for use.  ``options`` are the keyword arguments of ``__init__``, as text.

        Raises OptionError for a name or value that ``__init__`` does not take, and Pi2Error with a hint
        if the device is not usable; never falls back silently.
        """
        return cls(**parse_options(cls, options or {}))

    def describe(self) -> str:
        """What this one resolved to, for people: device, kernels, threads, arithmetic."""
        return self.name

    def close(self) -> None:
        """Give back what ``open`` took.  Safe to call twice."""
        return None


class Backend(Plugin):
    """Computes on one device.  Knows nothing of files or caches.

    All arrays are float32 and C-contiguous; ``x`` is (n, cols), one row a token, n >= 0.  Rows of ``x``
    are independent: a non-finite value in one changes no other's results.  A NaN makes its row's results
    NaN, an infinity makes them non-finite, unless it switches every neuron of an FFN off.
    ``out`` overlaps nothing and is overwritten whole.  ``rows`` are ascending, without repeats.
    """

    tolerance: ClassVar[float] = 1e-5
    """Largest |error| of a result, as a share of the sum of the magnitudes of its terms."""
    kv_dtype: KvDType = np.float32
    """What ``attention`` wants keys and values in (pi2.powers.SupportsAttention): float32 or float16."""

    emulated: bool = False
    """A device is imitated by code of another one: how long a call takes says nothing, and is not shown."""

    lossy: str | None = None
    """What becomes of weights that are not computed with as they are in the model; None: they are."""

    @abstractmethod
    def place(self, weight: Tensor) -> object:
        """Make ``weight`` usable on this device; only this backend can read the handle."""

    @abstractmethod
    def linear(self, weight: Any, x: F32, out: F32, rows: Ids | None = None) -> None:
        """``out[t, j] = sum_c x[t, c] * weight[r, c]`` for every row r, or for r = ``rows[j]``."""

    @abstractmethod
    def place_ffn(self, bundles: U8, spec: FfnSpec) -> object:
        """Make the neurons in ``bundles`` (k, stride) usable: a cluster, or a whole FFN."""

    @abstractmethod
    def ffn(self, ffn: Any, x: F32, out: F32, rows: Ids | None = None) -> int:
        """``out[t] = sum_i h[t, i] * down_i`` over all neurons i of ``ffn``, or over ``rows``,

        where ``h[t, i] = act(gate_i . x[t] + bias) * (up_i . x[t] + bias)``, or without a gate
        ``act(up_i . x[t] + bias)`` (design: an FFN is a sum over its neurons, so over any partition).

        For n = 1 and an activation with exact zeros, neurons with h = 0 change no bit of the result:
        any superset of the active rows gives the same bits as the active rows alone.
        Returns the number of (t, i) pairs with h != 0.
        """

    def release(self, handle: Any) -> None:
        """Free what ``place`` or ``place_ffn`` took.  The default leaves it to the garbage collector."""
        return None


class StorageTier(Plugin):
    """Reads ranges of files.  Knows nothing of models.  Thread-safe: reading ahead is allowed."""

    @abstractmethod
    def open_file(self, path: Path) -> int:
        """Open for reading and return a handle.  Raises StorageError."""

    @abstractmethod
    def read(self, file: int, ranges: Ranges, into: U8) -> None:
        """Fill ``into`` (sum of lengths) with the ranges in the order asked.

        All of it or StorageError with path and offset, never a short read.
        """


class Predictor(Plugin):
    """Guesses which neurons will fire.  A wrong guess costs time or quality, never a crash."""

    lossless: ClassVar[bool]
    """Whether ``predict`` always names every active neuron."""

    def attach(self, model: ModelView, backend: Backend) -> None:
        """Called once before the first ``predict``; load what is needed.  Pi2Error if it is missing."""
        return None

    @abstractmethod
    def predict(self, ffn: int, x: F32) -> Ids | None:
        """Neurons of FFN number ``ffn`` that may be active for any row of ``x`` (n, d), its input.

        Ascending, without repeats, deterministic; None means all of them.
        """


class CachePolicy(Plugin):
    """Orders resident neurons for eviction.  Holds keys only; the cache owns the bytes."""

    @abstractmethod
    def touch(self, ffn: int, keys: Keys) -> None:
        """These neurons of ``ffn`` were used; those not resident before were admitted.  No repeats."""

    @abstractmethod
    def victims(self, ffn: int, n: int) -> Keys:
        """The ``n`` residents (or all, if fewer) to give up first when ``ffn`` needs room.

        Changes nothing: the cache may skip the pinned, and reports with ``evicted`` what really left.
        """

    @abstractmethod
    def evicted(self, keys: Keys) -> None:
        """These have left; forget them."""


class ModelFormat(Plugin):
    """Imports models from one kind of file."""

    @classmethod
    @abstractmethod
    def recognises(cls, path: Path) -> bool:
        """Whether ``path`` looks like this format (by magic or names).  Never raises."""

    @abstractmethod
    def load(self, path: Path) -> ModelSource:
        """Open and check ``path``.  Reads no weights yet.  Raises FormatError, UnsupportedModel."""


class ModelSource(ABC):
    """A foreign model, seen through pi2's names (``pi2.inventory``)."""

    architecture: Architecture
    provenance: Mapping[str, str]  # format, name, and whatever identifies the source; for the manifest
    notes: Sequence[str] = ()  # what was not taken over bit for bit, for the user's eyes

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """A matrix by its canonical name, values exact: in its own format where pi2 has it, else f32.

        ``layers.N.ffn.down.weight`` is neuron-major: (neurons, d_model).
        """

    @abstractmethod
    def vector(self, name: str) -> F32:
        """A norm or bias by its canonical name, (n,)."""

    @abstractmethod
    def tokenizer_json(self) -> str:
        """The tokenizer in the format of the ``tokenizers`` library."""

    @abstractmethod
    def chat_template(self) -> str | None:
        """The Jinja template of a chat, if the model has one."""


class ModelView(Protocol):
    """What a predictor may see of an opened pi2 model."""

    architecture: Architecture
    path: Path

    @property
    def geometry(self) -> BundleGeometry:
        """Where the weights lie in a bundle."""
        ...

    def bundles(self, ffn: int) -> U8:
        """(neurons, stride) uint8, read-only."""
        ...

    def vector(self, name: str) -> F32:
        """A norm or bias outside the bundles by its canonical name (``pi2.inventory``), (n,)."""
        ...
