"""Python's threads: a deputy waits for what may never end."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pi2.threads import Deputy


@pytest.fixture
def deputy():
    one = Deputy()
    yield one
    one.close()


def test_what_a_call_raises_is_not_the_deputys_affair(deputy):
    def fails():
        raise ValueError

    assert deputy.wait(fails, 60)
    assert deputy.wait(lambda: None, float("inf"))


def test_a_deputy_that_is_closed_ends_and_can_be_asked_again(deputy):
    running = []
    for _ in range(2):
        assert deputy.wait(lambda: running.append(threading.current_thread()), 60)
        deputy.close()
        running[-1].join(60)
        assert not running[-1].is_alive()


@settings(deadline=None, max_examples=10)
@given(st.lists(st.booleans(), max_size=4))
def test_a_call_that_does_not_return_in_time_keeps_others_out_until_it_has(hangs):
    deputy, called = Deputy(), []
    for number, hang in enumerate(hangs):
        if hang:
            gate = threading.Event()
            assert not deputy.wait(gate.wait, 0.001)
            assert not deputy.wait(lambda: called.append(-1), 60)  # soon
            gate.set()
            while not deputy.wait(lambda: None, 60):
                pass  # a busy machine
        assert deputy.wait(lambda number=number: called.append(number), 60)
    assert called == list(range(len(hangs)))
    deputy.close()
