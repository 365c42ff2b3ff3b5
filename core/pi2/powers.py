"""Optional powers of plugins: Protocols that the engine asks for once, with ``isinstance``, when it starts.

Every power has its slow twin in the floor (``pi2.api``), and a property test that both agree.  Those of
accelerators are in ``pi2.accelerator``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pi2.api import Backend, FfnSpec, Keys, ModelView, Ranges
from pi2.attention import AttentionSpec
from pi2.kv_cache import Kv
from pi2.tensor import F32, U8, Ids


class SlotState(IntEnum):
    """What a slot of the neuron cache holds; one uint8 a slot, shared with native code."""

    EMPTY = 0
    LOADING = 1
    """A prefetch is under way: the bytes belong to the storage tier."""
    GATE = 2
    """The gate is there, up and down are not: two-phase loading stopped at a gate of zero."""
    PRESENT = 3


class Stage(IntEnum):
    """Stages of the cluster pipeline (PowerInfer-2 §4.3)."""

    GATE_READ = 0
    GATE_COMPUTE = 1
    UP_DOWN_READ = 2
    UP_DOWN_COMPUTE = 3
    HOT = 4
    """Hot clusters, on an accelerator; not of the pipeline, but beside it."""
    COLD = 5
    """All that the CPU does for an FFN meanwhile."""
    GRAPH = 6
    """An accelerator got the graph of another shape ready."""


SPANS = np.dtype(
    [("ffn", "i4"), ("cluster", "i4"), ("stage", "u1"), ("thread", "u1"), ("neurons", "i4"),
     ("start", "f8"), ("end", "f8")],
    align=True,
)  # fmt: skip
"""What a pipeline did: seconds of ``time.perf_counter``; ``thread`` 255 is the storage tier's."""
Spans = NDArray[np.void]


@dataclass(frozen=True, slots=True)
class FfnPlace:
    """Where the bundles of FFN number ``ffn`` lie: a handle of the tier, the byte offset of bundle 0."""

    ffn: int
    path: Path
    file: int
    offset: int


@dataclass(slots=True)
class StreamCount:
    """What one streamed FFN cost.  Seconds of wall clock, but the stages: of threads, added up."""

    active: int = 0
    present: int = 0
    """Of the candidates, those whose slot was PRESENT at first."""
    reads: int = 0
    bytes_read: int = 0
    wall_s: float = 0.0
    wait_s: float = 0.0
    """No thread computed: all waited for the storage."""
    gate_s: float = 0.0
    up_down_s: float = 0.0


@runtime_checkable
class SupportsSlab(Protocol):
    """Optional power of a backend that computes neurons out of a slab whose bytes change between calls."""

    def place_slab(self, slab: U8, neurons: int, spec: FfnSpec) -> object:
        """``slab`` (slots, stride) holds neurons of any FFN of the model, each of which has ``neurons``.

        The bytes stay the caller's: a call sees what they are then.
        """
        ...

    def slab_ffn(self, slab: Any, neurons: Ids, slots: Ids, x: F32, out: F32) -> int:
        """``Backend.ffn`` over ``neurons`` (ascending, without repeats), of which i lies in ``slots[i]``.

        The same bits as ``ffn`` of a handle with all neurons of that FFN and ``rows = neurons``.
        """
        ...


@runtime_checkable
class SupportsStreaming(SupportsSlab, Protocol):
    """Optional power of a backend with a native cluster pipeline: it computes what is there while the rest
    is being read (PowerInfer-2 §4.3).  A stream serves one call at a time.
    """

    def open_stream(
        self, slab: Any, states: U8, storage: int, *, two_phase: bool, cluster: int, trace: bool,
        overlap: bool = True, bundled: bool = True,
    ) -> object:  # fmt: skip
        """For a ``place_slab`` handle.  ``states`` (slots,) are ``SlotState``, read and written by calls.

        ``storage`` is a ``SupportsStorageAbi.abi_address``.  ``two_phase``: read gates first, up and down
        only where the gate is not zero.  ``cluster``: neurons that are computed as one unit.
        For comparison: without ``overlap`` nothing is computed while something is being read; not
        ``bundled``, and not in two phases, each row is a read, one matrix after the other.
        """
        ...

    def stream_ffn(
        self, stream: Any, place: FfnPlace, neurons: Ids, slots: Ids, x: F32, out: F32,
        meanwhile: Callable[[], None] | None = None,
    ) -> StreamCount:  # fmt: skip
        """``slab_ffn`` for one token, x (1, d), where slots that are not PRESENT are read first or meanwhile.

        Slots that are LOADING are waited for.  Afterwards all are PRESENT, or GATE with a gate of zero.
        The same bits as ``slab_ffn`` of a full slab.  ``meanwhile`` is called once, best when the reads
        have begun: it may ask the backend for products, prefetch into other slots and settle such.
        Raises StorageError with path and offset; slots that were not read are EMPTY then, and nobody
        writes to them.
        """
        ...

    def stream_prefetch(self, stream: Any, place: FfnPlace, neurons: Ids, slots: Ids) -> None:
        """Start to read whole bundles into ``slots``, EMPTY before, as a guess; they become LOADING."""
        ...

    def stream_settle(self, stream: Any, slots: Ids | None = None, *, cancel: bool = False) -> int:
        """Until none of ``slots`` (all) is LOADING: PRESENT, or EMPTY if the read failed or was cancelled.

        Returns the bytes that were read.
        """
        ...

    def stream_spans(self, stream: Any) -> Spans:
        """(n,) ``SPANS`` since the last call, if opened with ``trace``."""
        ...

    def close_stream(self, stream: Any) -> None:
        """Wait for all reads and free the stream.  The slab is the caller's again."""
        ...


@runtime_checkable
class SupportsExpiry(Protocol):
    """Optional power of a cache policy by which neurons leave although there is room."""

    def expire(self, ffn: int) -> Keys:
        """Another token comes to FFN number ``ffn``: residents of it that shall leave before that."""
        ...


@runtime_checkable
class SupportsPrior(Protocol):
    """Optional power of a cache policy that gains from knowing beforehand how often neurons are used."""

    def expect(self, keys: Keys, shares: F32) -> None:
        """Each of ``keys`` was active in this share of the tokens that ``pi2 collect`` saw.  Comes first."""
        ...


@runtime_checkable
class SupportsGuesses(Protocol):
    """Optional power of a cache policy that tells what is used from what was read ahead on a guess."""

    def guessed(self, keys: Keys) -> None:
        """These were admitted; if they are used, ``touch`` will say so.  Comes in place of ``touch``."""
        ...


@runtime_checkable
class SupportsOffload(Protocol):
    """Optional power of a predictor that answers None while all weights are resident.

    Offloaded, None means that a whole FFN is read for every token: it had better know more then.
    """

    def offloaded_bytes(self, model: ModelView) -> int:
        """Memory that ``attach_offloaded`` will take, for the budget."""
        ...

    def attach_offloaded(self, model: ModelView, backend: Backend) -> None:
        """``Predictor.attach`` for a model whose bundles stay on flash."""
        ...


@runtime_checkable
class SupportsAttention(Protocol):
    """Optional power of a backend that computes a whole attention block in one call."""

    def place_attention(self, spec: AttentionSpec) -> object:
        """Make the block usable on this device; only this backend can read the handle (``release``)."""
        ...

    def attention(self, block: Any, x: F32, keys: Kv, values: Kv, start: int, out: F32) -> None:
        """``out`` = the block of ``x``, both (n, d), for the tokens at positions start ... start + n - 1.

        ``keys`` and ``values`` (kv_heads, room, head_dim), C-contiguous, float32 or the backend's
        ``kv_dtype``, hold the ``start`` tokens before; those of ``x`` are written behind them, rounded to
        the nearest, nothing else is.  room >= start + n.
        """
        ...


@runtime_checkable
class SupportsView(Protocol):
    """Optional power of a storage tier whose bytes are addressable without copying."""

    def view(self, file: int, offset: int, nbytes: int) -> U8:
        """Read-only bytes of the file, valid until the tier is closed."""
        ...


@runtime_checkable
class SupportsAsyncRead(Protocol):
    """Optional power of a storage tier that reads while the caller does something else.  Thread-safe.

    A ticket is good for one ``wait`` or one ``cancel``; until then ``into`` belongs to the tier.
    """

    def submit(self, file: int, ranges: Ranges, into: U8, priority: int = 0) -> int:
        """Start what ``StorageTier.read`` does and return a ticket.

        What has not begun is served by priority, lowest first: 0 for what somebody waits for, 1 for a
        guess.  Raises StorageError for ranges outside of the file.
        """
        ...

    def poll(self, ticket: int) -> bool:
        """Whether ``wait`` would return at once."""
        ...

    def wait(self, ticket: int) -> None:
        """Until every byte is in ``into``, or StorageError with path and offset.  Never for ever."""
        ...

    def cancel(self, ticket: int) -> None:
        """Give up; what has not begun is not read.  Afterwards nobody writes to ``into``."""
        ...


@runtime_checkable
class SupportsStorageAbi(Protocol):
    """Optional power of a storage tier that native code can read through, without Python in between."""

    def abi_address(self) -> int:
        """Address of a ``pi2_storage_abi`` (include/pi2_abi.h), valid until the tier is closed."""
        ...


@runtime_checkable
class SupportsLowRank(Protocol):
    """Optional power of a backend that asks a low-rank predictor in one call."""

    def low_rank(self, inner: Any, bias: F32, outer: Any, bounds: F32, x: F32) -> tuple[Ids, F32]:
        """Rows of ``outer @ relu(inner @ x + bias)`` that exceed ``bounds``, ascending, and by how much.

        ``inner`` and ``outer`` are handles of ``place``, (width, d) and (n, width); x (1, d), ``bias``
        (width,), ``bounds`` (n,).  The bits of two calls of ``linear``; what is not a
        number exceeds every bound.
        """
        ...


@runtime_checkable
class SupportsConfidence(Protocol):
    """Optional power of a predictor that knows which of its answers are sure."""

    def rank(self, ffn: int, x: F32) -> tuple[Ids, F32] | None:
        """``Predictor.predict`` of one token, x (1, d), and how sure each is: more is surer."""
        ...


@runtime_checkable
class SupportsFootprint(Protocol):
    """Optional power of a predictor that holds weights of its own for an FFN."""

    def footprint(self, ffn: int) -> tuple[int, int]:
        """Width of its inner layer and bytes that a prediction reads; (0, 0) if it holds nothing."""
        ...
