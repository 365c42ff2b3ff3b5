"""The neuron cache: which bundles are in memory, and where (PowerInfer-2 §4.2).

One slab of equal slots.  The first ``n_hot`` belong to the hot region and are never given up; the others
to the cold region, whose policy names what leaves.  Nothing is written back: weights are read-only.
"""

from __future__ import annotations

import copy
import mmap
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pi2.api import CachePolicy, Keys
from pi2.memory import ask_for_huge_pages
from pi2.powers import SlotState, SupportsExpiry, SupportsGuesses, SupportsPrior
from pi2.slot_tables import NumpySlots, SlotSearch, SlotTables
from pi2.tensor import F32, U8, Ids

_BATCH = 128  # evictions free at least a slot in so many, so that asking the policy is paid back


class NeuronCache:
    """Slots of ``stride`` bytes for neurons of FFNs that have ``neurons`` each.

    A neuron that is resident has a slot; what is in the slot, ``states`` say.  Slots that a call gives out
    stay with their neurons until the next call.  Holds keys and bytes, reads nothing.
    """

    def __init__(
        self, n_ffns: int, neurons: int, stride: int, slots: int, policy: CachePolicy,
        search: Callable[[SlotTables], SlotSearch] = NumpySlots, prior: F32 | None = None,
    ) -> None:  # fmt: skip
        """``prior`` (n_ffns * neurons,): the share of tokens that each was active in, if that was counted."""
        self.neurons = neurons
        self._fresh, self._prior = copy.deepcopy(policy), prior  # before it is told, it is small
        self._begin(policy)
        self._memory = mmap.mmap(-1, max(1, slots * stride), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        ask_for_huge_pages(self._memory)
        self.slab: U8 = np.frombuffer(self._memory, np.uint8, slots * stride).reshape(slots, stride)
        """(slots, stride), aligned to pages; a slot takes memory once something is in it."""
        self.states: U8 = np.zeros(slots, np.uint8)
        """(slots,) ``SlotState``, shared with whoever fills the slots."""
        self.n_hot = 0
        self.capacity = slots
        """Slots in use at most: the regions can shrink and grow again."""
        self._tables = t = SlotTables(
            np.full((n_ffns, neurons), -1, np.int32), np.full(slots, -1, np.int64), self.states,
            np.zeros(slots, np.bool_), np.arange(slots - 1, -1, -1, dtype=np.int32),
        )  # fmt: skip
        t.n_free[0] = slots
        self._search = search(t)
        self._by_key, self._key_of = t.slot_of.reshape(-1), t.key_of
        self._pinned = np.zeros(slots, np.bool_)
        self._untold: tuple[int, Ids, Ids, int] | None = None  # of acquire: FFN, neurons, slots, how many new

    def _begin(self, policy: CachePolicy) -> None:
        self.policy = policy
        self._expiry = policy if isinstance(policy, SupportsExpiry) else None
        self._guesses = policy if isinstance(policy, SupportsGuesses) else None
        if self._prior is not None and isinstance(policy, SupportsPrior):
            policy.expect(np.arange(len(self._prior), dtype=np.int64), self._prior)

    @property
    def resident(self) -> int:
        """Neurons that have a slot."""
        return self.capacity - self._n_free

    @property
    def untouched(self) -> int:
        """Slots in which nothing was yet, so that they take no memory."""
        return self.capacity - int(np.count_nonzero(self._tables.touched[: self.capacity]))

    def keys(self, ffn: int, neurons: Ids) -> Keys:
        """Unique in the model."""
        return neurons.astype(np.int64) + ffn * self.neurons

    def slots(self, ffn: int, neurons: Ids) -> Ids:
        """Where ``neurons`` are; -1 for those without a slot."""
        return self._search.find(ffn, neurons)[0]

    def keep(self, keys: Keys) -> Ids:
        """Make these neurons the hot region, while nothing is resident; their slots, EMPTY."""
        assert self.resident == 0
        hot = np.arange(len(keys), dtype=np.int32)
        self._by_key[keys], self._key_of[hot] = hot, keys
        self.states[hot], self._tables.touched[hot] = SlotState.EMPTY, True
        self.n_hot = len(keys)
        self._set_free(np.arange(self.capacity - 1, self.n_hot - 1, -1, dtype=np.int32))
        return hot

    def acquire(self, ffn: int, neurons: Ids) -> Ids:
        """Slots for all of ``neurons`` (ascending, without repeats), which count as used.

        Those that were not resident get slots that are EMPTY.  There is room as long as the cold region
        has a slot for every neuron of an FFN and no other FFN's slots are LOADING.  The policy hears of it
        with ``tell``, so that reads can begin before, or with the next call.
        """
        self._inform()
        if self._expiry is not None:
            old = self._by_key[self._expiry.expire(ffn)]
            self.drop(old[self.states[old] != SlotState.LOADING])
        slots, missing = self._search.find(ffn, neurons)
        if missing:
            self._reserve(ffn, missing, slots)
            seated = self._search.seat(ffn, neurons, slots)
            assert seated == missing, "the cold region is smaller than an FFN"
        self._untold = ffn, neurons, slots, missing
        return slots

    def tell(self) -> None:
        """Let the policy know what was acquired, and make room for as many as were missing."""
        if self._untold is not None:
            ffn, _, slots, missed = self._untold
            self._inform()
            self._reserve(ffn, missed, slots)

    def _inform(self) -> None:
        if self._untold is not None:
            (ffn, neurons, slots, _), self._untold = self._untold, None
            self.policy.touch(ffn, self.keys(ffn, neurons)[slots >= self.n_hot])

    def admit(self, ffn: int, neurons: Ids, spare: Ids) -> tuple[Ids, Ids]:
        """Slots for a guess: as many of ``neurons`` that are not resident as there is room for.

        Nothing in the slots ``spare`` leaves for them.  Returns the admitted neurons and their slots.
        """
        self._inform()
        slots, absent = self._search.find(ffn, neurons)
        if absent < len(neurons):
            neurons = neurons[slots < 0]
            slots = slots[slots < 0]
        self._reserve(ffn, absent, spare)
        seated = self._search.seat(ffn, neurons, slots)
        neurons, slots = neurons[:seated], slots[:seated]
        keys = self.keys(ffn, neurons)
        if self._guesses is None:
            self.policy.touch(ffn, keys)
        else:
            self._guesses.guessed(keys)
        return neurons, slots

    def drop(self, slots: Ids) -> None:
        """Give up what is in cold ``slots``; it may have gone already."""
        self._inform()
        slots = slots[self._key_of[slots] >= 0]
        if len(slots):
            self._evict(self._key_of[slots], slots)

    def reset(self) -> None:
        """Empty the cold region, whatever an interrupted call has left of the tables.  Nothing is LOADING."""
        hot = self.n_hot
        self._untold = None
        self._begin(copy.deepcopy(self._fresh))
        self._by_key[:] = -1
        self._by_key[self._key_of[:hot]] = np.arange(hot, dtype=np.int32)
        self._key_of[hot:] = -1
        self.states[hot:] = SlotState.EMPTY
        self._pinned[:] = False
        self._set_free(np.arange(self.capacity - 1, hot - 1, -1, dtype=np.int32))

    def resize(self, capacity: int) -> None:
        """Use so many slots; memory of those above goes back to the system.  Never into the hot region."""
        capacity = max(self.n_hot, min(capacity, len(self.states)))
        if capacity < self.capacity:
            above = np.arange(capacity, self.capacity, dtype=np.int32)
            self.drop(above)
            free = self._tables.free[: self._n_free]
            self._set_free(free[free < capacity])
            self._give_back(capacity)
        else:
            new = np.arange(capacity - 1, self.capacity - 1, -1, dtype=np.int32)
            self._set_free(np.concatenate((self._tables.free[: self._n_free], new)))
        self.capacity = capacity

    def _set_free(self, slots: Ids) -> None:
        self._tables.n_free[0] = len(slots)
        self._tables.free[: len(slots)] = slots

    def _give_back(self, first: int) -> None:
        start = -(-first * self.slab.shape[1] // mmap.PAGESIZE) * mmap.PAGESIZE
        self._tables.touched[first:] = False
        if start < len(self._memory) and hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED, start)

    @property
    def _n_free(self) -> int:
        return int(self._tables.n_free[0])

    def _reserve(self, ffn: int, n: int, spare: Ids) -> None:
        """Evict, if fewer than ``n`` slots are free, others than the cold slots ``spare``."""
        if self._n_free < n:
            spare = spare[spare >= 0]
            self._pinned[spare] = True
            try:
                self._make_room(ffn, n - self._n_free)
            finally:
                self._pinned[spare] = False

    def _make_room(self, ffn: int, n: int) -> None:
        wanted = n + self.capacity // _BATCH
        while True:
            keys = self.policy.victims(ffn, wanted)
            slots = self._by_key[keys]
            may = ~self._pinned[slots] & (self.states[slots] != SlotState.LOADING)
            if may.sum() >= n or len(keys) < wanted:
                break
            wanted *= 2  # the policy named what is in use: ask on
        self._evict(keys[may], slots[may])

    def _evict(self, keys: Keys, slots: Ids) -> None:
        self.policy.evicted(keys)
        self._by_key[keys] = -1
        self._key_of[slots] = -1
        self.states[slots] = SlotState.EMPTY
        first = self._n_free
        self._tables.free[first : first + len(slots)] = slots
        self._tables.n_free[0] = first + len(slots)


def hottest(counts: NDArray[np.int64], n: int) -> Keys:
    """The ``n`` neurons most often active, by ``counts`` (ffns, neurons): keys, ascending.

    Neurons that were never active are not hot.  Ties go to the smaller key.
    """
    flat = counts.reshape(-1)
    order = np.argsort(-flat, kind="stable")[:n]
    return np.sort(order[flat[order] > 0]).astype(np.int64)
