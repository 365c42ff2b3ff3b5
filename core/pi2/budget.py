"""One hard budget for all memory of a run, and what it is shared out to (PowerInfer-2 §4.2)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pi2.accelerator import SupportsOtherProcesses
from pi2.api import Backend
from pi2.architecture import Architecture
from pi2.bundle import BundleGeometry
from pi2.errors import BudgetError
from pi2.ffns import RANGE_BYTES
from pi2.kv_cache import KvDType, kv_bytes
from pi2.prefill import BUFFERS

DEFAULT_CONTEXT = 2048
"""Tokens of the KV cache under a budget, if nobody says how many: all that a model can may be gigabytes."""
GROUP = 4
"""Chunks of a prompt that go through the layers together when every layer is read from flash."""
_SLACK = 16 << 20  # bytes: Python objects, sampling, text; what the allocator keeps
_SLOT_TABLES = 8 + 4 + 1 + 1  # bytes of a slot's entries in the neuron cache
_KEY_TABLES = 4 + 5 * 8  # of a neuron's there and in a cache policy


@dataclass(frozen=True, slots=True)
class Regions:
    """Bytes of the regions that add up to the budget."""

    budget: int
    fixed: int
    hot: int
    cold: int

    def to_json(self) -> dict[str, int]:
        return {"fixed": self.fixed, "hot": self.hot, "cold": self.cold}


def slots_within(memory: int, arch: Architecture, g: BundleGeometry, fixed: int) -> int:
    """Slots that the budget has room for beside the ``fixed`` region, at most one for every neuron.

    Raises BudgetError below one whole FFN, which a token may want all of.
    """
    neurons = arch.n_layers * arch.n_neurons
    slots = (memory - fixed) // (g.stride + _SLOT_TABLES)
    if slots < arch.n_neurons:
        raise too_small(memory, fixed + arch.n_neurons * (g.stride + _SLOT_TABLES))
    return min(neurons, slots)


def too_small(memory: int, minimum: int, hint: str | None = None) -> BudgetError:
    """What to raise for a budget below ``minimum``."""
    needed = -(-minimum // 10**6)
    return BudgetError(
        f"a budget of {memory / 10**6:.0f} MB is too small: this model needs at least {needed} MB",
        hint=hint or f"--memory {needed}M, or less with a smaller --context",
    )


def to_come(arch: Architecture, context: int, kv: KvDType) -> int:
    """Bytes that the fixed region will grow by once tokens are computed, one by one."""
    logits = 3 * arch.vocab_size * 8  # float64 while sampling
    tables = arch.n_layers * arch.n_neurons * _KEY_TABLES
    return kv_bytes(arch, context, kv) + logits + tables + _SLACK


def batch_bytes(arch: Architecture, g: BundleGeometry, tokens: int, chunk: int) -> int:
    """And by how much for a while, when so many are computed together, in chunks."""
    if tokens == 1:
        return 0
    chunk = min(tokens, chunk)
    ranges = BUFFERS * min(RANGE_BYTES, arch.n_neurons * g.stride)
    states = 6 * tokens * arch.d_model * 4  # residual stream, inputs and results, before and after
    heads = 4 * chunk * arch.n_heads * arch.head_dim * 4
    hidden = 10 * chunk * min(arch.n_neurons, max(64, RANGE_BYTES // g.stride))  # two floats and a place
    return ranges + states + heads + hidden


class Outside:
    """Other processes that compute for this one: their memory is a part of the budget."""

    def __init__(self, parts: Iterable[tuple[Backend, int]]) -> None:
        """Backends, and how many bytes of weights each will have."""
        self._parts = [(each, weights) for each, weights in parts if isinstance(each, SupportsOtherProcesses)]

    def __call__(self) -> int:
        """Bytes that they have now."""
        return sum(each.outside_bytes() for each, _ in self._parts)

    def planned(self) -> int:
        """Bytes that they will have."""
        return sum(each.outside_bytes_for(weights) for each, weights in self._parts)


class Room:
    """What the regions are, by how many tokens are computed together: they share the budget out anew."""

    def __init__(
        self, arch: Architecture, g: BundleGeometry, *, chunk: int, fixed: int, memory: int | None,
        slots: int, elsewhere: int = 0, outside: Outside | None = None,
    ) -> None:  # fmt: skip
        """``memory`` None: always ``slots``.  ``fixed``: bytes of that region when tokens come one by one.

        ``elsewhere``: of these, what hot neurons take that are an accelerator's.  ``outside``: of these, what
        other processes take.
        """
        self._arch, self._g, self._chunk = arch, g, chunk
        self._fixed, self._memory, self._slots = fixed, memory, slots
        self._elsewhere = elsewhere
        self.outside = outside or Outside(())

    @property
    def alone(self) -> bool:
        """Whether no accelerator, and no other process, may still take what it was promised."""
        return self._elsewhere == 0 and self.outside.planned() == 0

    def slots(self, tokens: int) -> int:
        """Of the neuron cache.  Raises BudgetError if that is less than an FFN."""
        if self._memory is None:
            return self._slots
        needed = self._fixed + batch_bytes(self._arch, self._g, tokens, self._chunk)
        return min(self._slots, slots_within(self._memory, self._arch, self._g, needed))

    def correct(self, nbytes: int) -> None:
        """The fixed region turned out to be larger by so much."""
        self._fixed += nbytes

    def regions(self, capacity: int, hot: int) -> Regions:
        """With so many slots, ``hot`` of which are for hot neurons."""
        stride = self._g.stride
        budget = self._memory or self._fixed + capacity * stride
        kept, cold = self._elsewhere + hot * stride, (capacity - hot) * stride
        return Regions(budget, budget - kept - cold, kept, cold)
