"""Optional powers of backends with one mistake each, under the kit; test_kit_catches.py runs this.

Every class is right but for what its name says.
"""

from __future__ import annotations

import fail_fast  # noqa: F401  (before the kit makes its settings)
import numpy as np
from pi2.attention import attend
from pi2.builtin.numpy_backend import NumpyBackend
from pi2.slot_tables import NumpySlots
from pi2.testing import BackendTests


class AttendingBackend(NumpyBackend):
    """Right: an attention block in one call, by the formulas of pi2.attention."""

    name = "attending"
    tolerance = 1e-5

    def place_attention(self, spec):
        return spec

    def heads(self, spec, x, name, start):
        bias = getattr(spec, f"{name}_bias")
        y = x @ getattr(spec, name).to_f32().T + (0 if bias is None else bias)
        y = y.reshape(len(x), -1, spec.head_dim)
        norm = None if name == "v" else getattr(spec, f"{name}_norm")
        y = (y if norm is None else norm(y)).swapaxes(0, 1).astype(np.float32)
        return spec.rope.rotate(y, start) if spec.rope and name != "v" else y

    def window(self, spec):
        return spec.window

    def attention(self, spec, x, keys, values, start, out):
        if not len(x):
            return
        y, end = x if spec.norm is None else spec.norm(x), start + len(x)
        q, keys[:, start:end], values[:, start:end] = (self.heads(spec, y, name, start) for name in "qkv")
        options = {"scale": spec.scale, "window": self.window(spec), "softcap": spec.softcap}
        y = attend(q, keys[:, :end], values[:, :end], **options) @ spec.o.to_f32().T
        y = y if spec.o_bias is None else y + spec.o_bias
        y = x + (y if spec.post_norm is None else spec.post_norm(y))
        out[...] = y if spec.sum_norm is None else spec.sum_norm(y)


class TestAttending(BackendTests):
    plugin = AttendingBackend


class TestForgetsTheWindow(BackendTests):
    class plugin(AttendingBackend):  # noqa: N801
        def window(self, spec):
            return None


class TestStartsEveryCallAtPositionZero(BackendTests):
    class plugin(AttendingBackend):  # noqa: N801
        def heads(self, spec, x, name, start):
            return super().heads(spec, x, name, 0)


class TestWritesBehindTheTokens(BackendTests):
    class plugin(AttendingBackend):  # noqa: N801
        def attention(self, spec, x, keys, values, start, out):
            super().attention(spec, x, keys, values, start, out)
            keys[:, start + len(x)] = 0


class TestForgetsTheResidualConnection(BackendTests):
    class plugin(AttendingBackend):  # noqa: N801
        def attention(self, spec, x, keys, values, start, out):
            super().attention(spec, x, keys, values, start, out)
            if spec.sum_norm is None:
                out -= x


class AskedBackend(NumpyBackend):
    """Right: a low-rank predictor in one call."""

    name = "asked"

    def exceeds(self, scores, bounds):
        return ~(scores <= bounds)

    def low_rank(self, inner, bias, outer, bounds, x):
        hidden, scores = np.empty((1, len(bias)), np.float32), np.empty((1, len(bounds)), np.float32)
        self.linear(inner, x, hidden)
        self.linear(outer, np.maximum(hidden + bias, 0), scores)
        named = np.flatnonzero(self.exceeds(scores[0], bounds)).astype(np.int32)
        return named, scores[0, named] - bounds[named]


class TestAsked(BackendTests):
    plugin = AskedBackend


class TestNamesWhatOnlyReachesItsBound(BackendTests):
    class plugin(AskedBackend):  # noqa: N801
        def exceeds(self, scores, bounds):
            return ~(scores < bounds)


class TestNamesNothingThatIsNoNumber(BackendTests):
    class plugin(AskedBackend):  # noqa: N801
        def exceeds(self, scores, bounds):
            return scores > bounds


class TestForgetsTheBiasOfAPredictor(BackendTests):
    class plugin(AskedBackend):  # noqa: N801
        def low_rank(self, inner, bias, outer, bounds, x):
            return super().low_rank(inner, np.zeros_like(bias), outer, bounds, x)


class SearchingBackend(NumpyBackend):
    """Right: searches the tables of a neuron cache."""

    name = "searching"
    search = NumpySlots

    def slot_search(self, tables):
        return self.search(tables)


class TestSearching(BackendTests):
    plugin = SearchingBackend


class Forgetful(NumpySlots):
    """Leaves one of the tables as it was."""

    table: str

    def seat(self, ffn, neurons, slots):
        table = getattr(self._tables, self.table)
        before = table.copy()
        seated = super().seat(ffn, neurons, slots)
        table[:] = before
        return seated


class TestForgetsWhoseTheSlotIs(BackendTests):
    class plugin(SearchingBackend):  # noqa: N801
        search = type("Search", (Forgetful,), {"table": "key_of"})


class TestGivesASlotThatIsNotEmpty(BackendTests):
    class plugin(SearchingBackend):  # noqa: N801
        search = type("Search", (Forgetful,), {"table": "states"})


class TestFindsTheNeighboursSlot(BackendTests):
    class plugin(SearchingBackend):  # noqa: N801
        class search(NumpySlots):  # noqa: N801
            def find(self, ffn, neurons):
                return super().find((ffn + 1) % len(self._tables.slot_of), neurons)
