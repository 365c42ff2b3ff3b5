"""Backends with one mistake each, under the conformance kit; test_kit_catches.py runs this file.

Every class is right but for what its name says.
"""

from __future__ import annotations

import fail_fast  # noqa: F401  (before the kit makes its settings)
import numpy as np
from pi2.activations import hidden
from pi2.api import Backend
from pi2.builtin.numpy_backend import NumpyBackend
from pi2.tensor import Tensor
from pi2.testing import BackendTests


class PlainBackend(NumpyBackend):
    """Right, and easier to spoil: one dense formula for any number of tokens."""

    def neurons(self, ffn, rows):
        return ffn.neurons if rows is None else ffn.neurons[rows]

    def h(self, ffn, x, n):
        gate = None if n.gate is None else self.add(np.vecdot(n.gate, x[:, None]), n.gate_bias)
        return hidden(ffn.spec, gate, self.add(np.vecdot(n.up, x[:, None]), n.up_bias))

    def add(self, x, bias):
        return x if bias is None else x + bias

    def total(self, h, down):
        """One token after the other, its own active rows only."""
        out = np.zeros((len(h), down.shape[1]), np.float32)
        for t, row in enumerate(h):
            active = np.flatnonzero(row)
            np.dot(row[active], down[active], out=out[t])
        return out

    def count(self, h):
        return int(np.count_nonzero(h))

    def ffn(self, ffn, x, out, rows=None):
        n = self.neurons(ffn, rows)
        h = self.h(ffn, x, n)
        out[...] = self.total(h, n.down)
        return self.count(h)


class TestPlain(BackendTests):
    plugin = PlainBackend


class TestLeavesAnElementUnwritten(BackendTests):
    class plugin(PlainBackend):  # noqa: N801
        def linear(self, weight, x, out, rows=None):
            last = out.ravel()[-1:].copy()
            super().linear(weight, x, out, rows)
            out.ravel()[-1:] = last


class TestWritesBehindTheOutput(BackendTests):
    class plugin(PlainBackend):  # noqa: N801
        def linear(self, weight, x, out, rows=None):
            super().linear(weight, x, out, rows)
            np.lib.stride_tricks.as_strided(out, (out.size + 1,), (4,))[-1] = 0


class TestAddsToTheOutput(BackendTests):
    class plugin(PlainBackend):  # noqa: N801
        def ffn(self, ffn, x, out, rows=None):
            before = out.copy()
            count = super().ffn(ffn, x, out, rows)
            out += before
            return count


class TestChangesItsInput(BackendTests):
    class plugin(PlainBackend):  # noqa: N801
        def ffn(self, ffn, x, out, rows=None):
            count = super().ffn(ffn, x, out, rows)
            x *= 2
            return count


class TestIgnoresRowsOfLinear(BackendTests):
    class plugin(PlainBackend):  # noqa: N801
        def linear(self, weight, x, out, rows=None):
            super().linear(weight[: out.shape[1]], x, out)


class TestIgnoresRowsOfFfn(BackendTests):
    class plugin(PlainBackend):  # noqa: N801
        def neurons(self, ffn, rows):
            return ffn.neurons


class TestDropsTheBias(BackendTests):
    class plugin(PlainBackend):  # noqa: N801
        def add(self, x, bias):
            return x


class TestSwapsTheNibbles(BackendTests):
    class plugin(PlainBackend):  # noqa: N801
        def place(self, weight):
            if weight.dtype != "q4_0":
                return super().place(weight)
            data, split = weight.data.copy(), weight.cols // 2
            data[:, :split] = data[:, :split] >> 4 | data[:, :split] << 4
            return super().place(Tensor(data, "q4_0", weight.cols))


class TestSwallowsNan(BackendTests):
    class plugin(PlainBackend):  # noqa: N801
        def h(self, ffn, x, n):
            return np.nan_to_num(super().h(ffn, x, n))


class TestSpreadsNan(BackendTests):
    class plugin(PlainBackend):  # noqa: N801
        def total(self, h, down):
            return super().total(h, down) + np.float32(0) * h.sum()


class TestForgetsTheReluOfUp(BackendTests):
    class plugin(PlainBackend):  # noqa: N801
        def h(self, ffn, x, n):
            gate, up = (np.vecdot(w, x[:, None]) if w is not None else None for w in (n.gate, n.up))
            gate = gate if gate is None else self.add(gate, n.gate_bias)
            spec = type(ffn.spec)(ffn.spec.geometry, ffn.spec.activation, False)
            return hidden(spec, gate, self.add(up, n.up_bias))


class TestMistakesOneGeluForTheOther(BackendTests):
    class plugin(PlainBackend):  # noqa: N801
        def place_ffn(self, bundles, spec):
            swapped = {"gelu": "gelu_tanh"}.get(spec.activation, spec.activation)
            return super().place_ffn(bundles, type(spec)(spec.geometry, swapped, spec.up_relu))


class TestCountsEveryNeuron(BackendTests):
    class plugin(PlainBackend):  # noqa: N801
        def count(self, h):
            return h.size


class TestSumsInAnOrderThatDependsOnTheRows(BackendTests):
    class plugin(PlainBackend):  # noqa: N801
        def total(self, h, down):
            halves = (slice(0, h.shape[1] // 2), slice(h.shape[1] // 2, None))
            parts = [super(type(self), self).total(h[:, half], down[half]) for half in halves]
            return parts[0] + parts[1]


class TestIsLessExactThanItSays(BackendTests):
    class plugin(PlainBackend):  # noqa: N801
        def place(self, weight):
            return super().place(weight).astype(np.float16).astype(np.float32)


class TestIsNotDeterministic(BackendTests):
    class plugin(PlainBackend):  # noqa: N801
        def __init__(self):
            self.calls = 0

        def linear(self, weight, x, out, rows=None):
            super().linear(weight, x, out, rows)
            self.calls += 1
            out *= np.float32(1 + 2**-23 * (self.calls % 2))


class TestReleasesAllHandles(BackendTests):
    class plugin(PlainBackend):  # noqa: N801
        def __init__(self):
            self.handles = []

        def place(self, weight):
            self.handles.append(super().place(weight).copy())
            return self.handles[-1]

        def release(self, handle):
            for weight in self.handles:
                weight.fill(np.nan)


class TestClaimsTooCoarseATolerance(BackendTests):
    class plugin(PlainBackend):  # noqa: N801
        tolerance = 0.5


class TestDecodesASlabOnce(BackendTests):
    class plugin(PlainBackend):  # noqa: N801
        def place_slab(self, slab, neurons, spec):
            return [super().place_slab(slab, neurons, spec)]

        def slab_ffn(self, slab, neurons, slots, x, out):
            if len(slab) == 1:
                slab.append(type(slab[0])(slab[0].bundles.copy(), slab[0].spec))
            return super().slab_ffn(slab[1], neurons, slots, x, out)


class TestTakesNeuronsForSlots(BackendTests):
    class plugin(PlainBackend):  # noqa: N801
        def slab_ffn(self, slab, neurons, slots, x, out):
            return super().slab_ffn(slab, neurons, np.sort(slots), x, out)


class TestRaisesInProbe(BackendTests):
    class plugin(Backend):  # noqa: N801
        name = "raising"
        place = linear = place_ffn = ffn = None

        @classmethod
        def probe(cls):
            raise OSError("no such device")
