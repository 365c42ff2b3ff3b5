"""Implementations with one mistake each, under the conformance kit; test_kit_catches.py runs this file.

Every class is right but for what its name says.
"""

from __future__ import annotations

import numpy as np
from hypothesis import Phase, settings

# Failing is enough here, so nothing is shrunk.  Set before the kit makes its settings.
settings.register_profile("fail_fast", phases=[Phase.generate], derandomize=True, database=None)
settings.load_profile("fail_fast")

from pi2.activations import hidden  # noqa: E402
from pi2.api import Backend, CachePolicy, Predictor, Probe, StorageTier  # noqa: E402
from pi2.builtin.lru_policy import LruPolicy  # noqa: E402
from pi2.builtin.mmap_tier import MmapTier  # noqa: E402
from pi2.builtin.numpy_backend import NumpyBackend  # noqa: E402
from pi2.errors import StorageError  # noqa: E402
from pi2.tensor import Tensor  # noqa: E402
from pi2.testing import BackendTests, CachePolicyTests, PredictorTests, StorageTierTests  # noqa: E402


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


class TestReadsShort(StorageTierTests):
    class plugin(MmapTier):  # noqa: N801
        def view(self, file, offset, nbytes):
            return self._files[file][1][max(offset, 0) :][:nbytes]

        def read(self, file, ranges, into):
            data = b"".join(self.view(file, at, n).tobytes() for at, n in ranges.tolist())
            into[: len(data)] = np.frombuffer(data, np.uint8)


class TestReadsInOrderOfOffset(StorageTierTests):
    class plugin(MmapTier):  # noqa: N801
        def read(self, file, ranges, into):
            super().read(file, ranges[np.argsort(ranges[:, 0], kind="stable")], into)


class TestReadsWholePages(StorageTierTests):
    class plugin(MmapTier):  # noqa: N801
        def read(self, file, ranges, into):
            pages = ranges.copy()
            pages[:, 0] -= pages[:, 0] % 512
            super().read(file, pages, into)


class TestGivesWritableViews(StorageTierTests):
    class plugin(MmapTier):  # noqa: N801
        def view(self, file, offset, nbytes):
            return super().view(file, offset, nbytes).copy()


class TestNamesNoFile(StorageTierTests):
    class plugin(MmapTier):  # noqa: N801
        def open_file(self, path):
            return super().open_file(path) if path.exists() else 99


class TestSharesOnePosition(StorageTierTests):
    """Seeks and reads as two steps, without a lock: right until two threads read at once."""

    class plugin(StorageTier):  # noqa: N801
        name = "seeking"

        def __init__(self):
            self.files = []
            self.at = 0

        @classmethod
        def probe(cls):
            return Probe(1, "for a test")

        def open_file(self, path):
            if not path.is_file():
                raise StorageError("not a file", path=path)
            self.files.append((path, path.read_bytes()))
            return len(self.files) - 1

        def read(self, file, ranges, into):
            path, data = self.files[file]
            filled = 0
            for self.at, n in ranges.tolist():
                if self.at < 0 or self.at + n > path.stat().st_size:  # the system call lets others run
                    raise StorageError("past the end", path=path, offset=self.at)
                into[filled : filled + n] = np.frombuffer(data[self.at : self.at + n], np.uint8)
                filled += n


class TestNamesNonResidents(CachePolicyTests):
    class plugin(LruPolicy):  # noqa: N801
        def evicted(self, keys):
            super().evicted(keys[:-1])


class TestForgetsByBeingAsked(CachePolicyTests):
    class plugin(LruPolicy):  # noqa: N801
        def victims(self, ffn, n):
            victims = super().victims(ffn, n)
            self.evicted(victims)
            return victims


class TestNamesTooFewVictims(CachePolicyTests):
    class plugin(LruPolicy):  # noqa: N801
        def victims(self, ffn, n):
            return super().victims(ffn, min(n, 5))


class TestKeepsKeysInThirtyTwoBits(CachePolicyTests):
    class plugin(CachePolicy):  # noqa: N801
        name = "narrow"

        def __init__(self):
            self.inner = LruPolicy()

        @classmethod
        def probe(cls):
            return Probe(1, "for a test")

        def touch(self, ffn, keys):
            self.inner.touch(ffn, keys & 0xFFFFFFFF)

        def victims(self, ffn, n):
            return self.inner.victims(ffn, n)

        def evicted(self, keys):
            self.inner.evicted(keys & 0xFFFFFFFF)


class GatePredictor(Predictor):
    """Right: asks the gate, generously, in float64; of a model without a gate it names all neurons."""

    name = "gate"
    lossless = True

    @classmethod
    def probe(cls):
        return Probe(1, "for a test")

    def attach(self, model, backend):
        self.model, self.backend = model, backend

    def predict(self, ffn, x):
        neurons = self.model.geometry.unpack(self.model.bundles(ffn))
        if neurons.gate is None or not self.model.architecture.sparse:
            return None
        gate, x64 = neurons.gate.astype(np.float64), x.astype(np.float64)
        doubt = self.backend.tolerance * (np.abs(x64) @ np.abs(gate).T)
        return np.flatnonzero(((x64 @ gate.T) > -doubt).any(axis=0)).astype(np.int32)


class TestPlainPredictor(PredictorTests):
    plugin = GatePredictor


class TestMissesANeuron(PredictorTests):
    class plugin(GatePredictor):  # noqa: N801
        def predict(self, ffn, x):
            ids = super().predict(ffn, x)
            return ids if ids is None else ids[1:]


class TestNamesNeuronsOutOfOrder(PredictorTests):
    class plugin(GatePredictor):  # noqa: N801
        def predict(self, ffn, x):
            ids = super().predict(ffn, x)
            return ids if ids is None else ids[::-1]


class TestNamesNeuronsThatAreNotThere(PredictorTests):
    class plugin(GatePredictor):  # noqa: N801
        def predict(self, ffn, x):
            return np.arange(1000, dtype=np.int32)


class TestRaisesInProbe(BackendTests):
    class plugin(Backend):  # noqa: N801
        name = "raising"
        place = linear = place_ffn = ffn = None

        @classmethod
        def probe(cls):
            raise OSError("no such device")
