"""Optional powers of backends that compute beside the CPU, as ``pi2.powers`` has those of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pi2.api import FfnSpec
from pi2.tensor import F32, U8, Tensor


@dataclass(frozen=True, slots=True)
class GraphSwap:
    """A graph that was used for the first time: how long, in seconds of ``time.perf_counter``, it took to get
    ready, and how many seconds of that a call had to wait for (§4.1.3: none).
    """

    start: float
    end: float
    wait_s: float


@dataclass(frozen=True, slots=True)
class FfnDone:
    """What ``finish_ffn`` tells: (token, neuron) pairs that were active, and when the device computed,

    from ``start`` to ``end``, in seconds of ``time.perf_counter``, as nearly as the backend knows.
    ``swaps``: where graphs are static, those that this call was the first to use.
    """

    active: int
    start: float
    end: float
    swaps: Sequence[GraphSwap] = ()


@runtime_checkable
class SupportsAsyncFfn(Protocol):
    """Optional power of a backend that computes an FFN while its caller computes something else: hot
    clusters on an accelerator, cold neurons on the CPU (PowerInfer-2 §4.1.2).

    ``place_ffn`` was given the neurons hottest first; a call is for the first ``count`` of them, dense.
    One ticket is open at a time, and between ``begin_ffn`` and its end no other method is called.
    """

    def prepare_ffn(self, ffn: Any, tokens: int, count: int) -> bool:
        """A hint, given while attention computes: ``begin_ffn`` of this shape comes next (§4.1.3: graphs).

        Starts what makes it quick and does not wait; what was not prepared is computed all the same.
        False: not ready yet, ``begin_ffn`` would wait, and who can does better to go on with another count.
        """
        ...

    def begin_ffn(self, ffn: Any, x: F32, count: int) -> object:
        """Start ``Backend.ffn`` for ``x`` (n, d) over the first ``count`` neurons; both are at least 1.

        ``x`` is not changed until the ticket's end: one ``finish_ffn`` or ``cancel_ffn``.  Raises Pi2Error;
        then nothing was started.
        """
        ...

    def finish_ffn(self, ticket: Any, out: F32) -> FfnDone:
        """Wait for the result and overwrite ``out`` (n, d) with it: what ``Backend.ffn`` gives, within
        ``tolerance``; the same bits for the same call.

        Raises Pi2Error if the device fails or does not answer: never waits for ever.  Either way the
        ticket is spent, and the next ``begin_ffn`` is tried as if nothing had happened.
        """
        ...

    def cancel_ffn(self, ticket: Any) -> None:
        """Give up; raises nothing.  Afterwards nobody reads ``x``, and the ticket is spent."""
        ...


@runtime_checkable
class SupportsOtherProcesses(Protocol):
    """Optional power of a backend part of whose memory is other processes': a budget bounds that, too."""

    def outside_bytes(self) -> int:
        """Resident in other processes now."""
        ...

    def outside_bytes_for(self, weights: int) -> int:
        """At most, once it computes with so many bytes of weights and bundles; never less than now."""
        ...


@dataclass(frozen=True, slots=True)
class ToPlace:
    """What ``place`` and ``place_ffn`` of a backend will be given when a model runs."""

    matrices: Sequence[Tensor]
    ffns: Sequence[Callable[[], U8]]
    """Each returns bundles (neurons, stride) in the order in which they will be placed."""
    spec: FfnSpec
    source: Mapping[str, str]
    """What identifies the model: names of its files and their sha256."""


@runtime_checkable
class SupportsCompile(Protocol):
    """Optional power of a class of backends that does ahead of time what it would do at first use
    (PowerInfer-2 §4.1.3, §6), also for a device that is not here.
    """

    @classmethod
    def compile(
        cls,
        weights: ToPlace,
        destination: Path,
        options: Mapping[str, str],
        progress: Callable[[str, int, int], None],
    ) -> Mapping[str, Any]:
        """Make the folder ``destination``, which ``open`` can be pointed to by an option.

        ``options`` are those of ``open``.  The folder is complete or does not exist; when stopped, the same
        call goes on.  ``progress`` hears (what, done, in all).  Returns what was made, for ``--json``; "use"
        is how to name it with ``--backend``.  Raises Pi2Error.
        """
        ...
