"""Accelerators with one mistake each, under the conformance kit; test_kit_catches.py runs this file."""

from __future__ import annotations

import fail_fast  # noqa: F401  (before the kit makes its settings)
from pi2.hybrid import OneAfterTheOther
from pi2.testing import BackendTests
from wrong_backends import PlainBackend


class SlowTwin(PlainBackend):
    """Right: the power out of the floor, as core has it."""

    def __init__(self):
        self.power = OneAfterTheOther(self)

    def prepare_ffn(self, ffn, tokens, count):
        return self.power.prepare_ffn(ffn, tokens, count)

    def begin_ffn(self, ffn, x, count):
        return self.power.begin_ffn(ffn, x, count)

    def finish_ffn(self, ticket, out):
        return self.power.finish_ffn(ticket, out)

    def cancel_ffn(self, ticket):
        self.power.cancel_ffn(ticket)


class TestSlowTwin(BackendTests):
    plugin = SlowTwin


class TestTakesOneNeuronTooMany(BackendTests):
    class plugin(SlowTwin):  # noqa: N801
        def begin_ffn(self, ffn, x, count):
            return super().begin_ffn(ffn, x, min(count + 1, len(ffn.neurons.up)))


class TestAnswersATicketThatWasGivenUp(BackendTests):
    class plugin(SlowTwin):  # noqa: N801
        given_up = None

        def cancel_ffn(self, ticket):
            self.given_up = ticket

        def finish_ffn(self, ticket, out):
            late, self.given_up = self.given_up, None
            same = late is not None and late[1].shape == out.shape
            return super().finish_ffn(late if same else ticket, out)


class TestAddsToWhatIsThere(BackendTests):
    class plugin(SlowTwin):  # noqa: N801
        def finish_ffn(self, ticket, out):
            before = out.copy()
            done = super().finish_ffn(ticket, out)
            out += before
            return done
