"""Conformance tests of cache policies: a state machine against a dict that is assumed to be right."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from numpy.typing import NDArray

from pi2.api import CachePolicy, Keys
from pi2.powers import SupportsGuesses, SupportsPrior
from pi2.testing.plugin import PluginTests, examples

N_FFNS = 3
N_NEURONS = 40
FAR = 1 << 40
"""First key of the last FFN: keys of a large model do not fit into 32 bits."""

_ffns = st.integers(0, N_FFNS - 1)
_neurons = st.lists(st.integers(0, N_NEURONS - 1), unique=True, max_size=N_NEURONS)


def keys_of(ffn: int, neurons: list[int]) -> Keys:
    """Keys in the order given, unique in the model."""
    first = FAR if ffn == N_FFNS - 1 else ffn * N_NEURONS
    return np.array(neurons, np.int64) + first


class CachePolicyMachine(RuleBasedStateMachine):
    """Random touches and evictions; after each of them the victims are compared with the residents."""

    open_policy: ClassVar[Callable[[], CachePolicy]]

    def __init__(self) -> None:
        super().__init__()
        self.policy = type(self).open_policy()
        self.residents: set[int] = set()

    @initialize(shares=st.lists(st.floats(0, 1, width=32), min_size=N_NEURONS, max_size=N_NEURONS))
    def expect(self, shares: list[float]) -> None:
        """What is known of neurons beforehand makes none of them resident."""
        if isinstance(self.policy, SupportsPrior):
            self.policy.expect(keys_of(0, list(range(N_NEURONS))), np.array(shares, np.float32))

    @rule(ffn=_ffns, neurons=_neurons)
    def touch(self, ffn: int, neurons: list[int]) -> None:
        """Hits and admissions in one call, or nothing at all."""
        keys = keys_of(ffn, neurons)
        before = keys.copy()
        self.policy.touch(ffn, keys)
        self.residents.update(keys.tolist())
        assert np.array_equal(keys, before), "changed its argument"

    @rule(ffn=_ffns, neurons=_neurons)
    def guess(self, ffn: int, neurons: list[int]) -> None:
        """Admissions that nobody has used."""
        if isinstance(self.policy, SupportsGuesses):
            keys = keys_of(ffn, [n for n in neurons if keys_of(ffn, [n])[0] not in self.residents])
            self.policy.guessed(keys)
            self.residents.update(keys.tolist())

    @precondition(lambda self: self.residents)
    @rule(ffn=_ffns, n=st.integers(0, 10))
    def evict_victims(self, ffn: int, n: int) -> None:
        """The usual course: what the policy names really leaves."""
        self.leave(self.policy.victims(ffn, n))

    @precondition(lambda self: self.residents)
    @rule(data=st.data())
    def evict_others(self, data: st.DataObject) -> None:
        """The cache skipped the pinned, or a budget shrank: any resident may leave."""
        leaving = data.draw(st.sets(st.sampled_from(sorted(self.residents)), max_size=8))
        self.leave(np.array(sorted(leaving), np.int64))

    def leave(self, keys: Keys) -> None:
        self.policy.evicted(keys)
        self.residents.difference_update(keys.tolist())

    @invariant()
    def victims_are_residents(self) -> None:
        for ffn in range(N_FFNS):
            for n in (0, 1, 7, len(self.residents), len(self.residents) + 5):
                victims = self.policy.victims(ffn, n)
                assert victims.dtype == np.int64
                chosen = set(victims.tolist())
                assert chosen <= self.residents, f"not resident: {sorted(chosen - self.residents)}"
                assert len(chosen) == len(victims), "named a victim twice"
                assert len(victims) == min(n, len(self.residents))

    @invariant()
    def asking_changes_nothing(self) -> None:
        for ffn in range(N_FFNS):
            once, twice = self.policy.victims(ffn, 9), self.policy.victims(ffn, 9)
            assert np.array_equal(once, twice)


class CachePolicyTests(PluginTests):
    """Everything that ``pi2.api.CachePolicy`` promises.

    class TestMine(CachePolicyTests):
        plugin = MyPolicy
    """

    plugin: ClassVar[type[CachePolicy]]

    def test_victims_are_always_residents(self, runnable: type[CachePolicy]) -> None:
        machine = type("Machine", (CachePolicyMachine,), {"open_policy": lambda: runnable.open(self.options)})
        run_state_machine_as_test(machine, settings=examples(60))

    def test_a_new_policy_has_no_victims(self, runnable: type[CachePolicy]) -> None:
        assert len(runnable.open(self.options).victims(0, 10)) == 0

    def test_many_neurons_at_once_are_fine(self, runnable: type[CachePolicy]) -> None:
        policy, keys = runnable.open(self.options), np.arange(100_000, dtype=np.int64)
        policy.touch(0, keys)
        victims = policy.victims(0, 60_000)
        assert len(np.unique(victims)) == 60_000
        policy.evicted(victims)
        rest: NDArray[np.int64] = np.setdiff1d(keys, victims)
        assert np.array_equal(np.sort(policy.victims(0, len(keys))), rest)
