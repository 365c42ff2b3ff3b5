"""Storage tiers, cache policies and predictors with one mistake each; test_kit_catches.py runs this file.

Every class is right but for what its name says.
"""

from __future__ import annotations

import time

import fail_fast  # noqa: F401  (before the kit makes its settings)
import numpy as np
from pi2.api import CachePolicy, Predictor, Probe, StorageTier
from pi2.builtin.lfu_policy import LfuPolicy
from pi2.builtin.lru_policy import LruPolicy
from pi2.builtin.mmap_tier import MmapTier
from pi2.errors import StorageError
from pi2.testing import CachePolicyTests, PredictorTests, StorageTierTests


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


class TestAnswersBeforeItHasRead(StorageTierTests):
    class plugin(MmapTier):  # noqa: N801
        tickets = 0

        def submit(self, file, ranges, into, priority=0):
            self.tickets += 1
            if not priority:
                self.read(file, ranges, into)
            return self.tickets

        def poll(self, ticket):
            return True

        def wait(self, ticket): ...

        def cancel(self, ticket): ...


class TestWritesAfterACancel(StorageTierTests):
    class plugin(MmapTier):  # noqa: N801
        def __init__(self):
            super().__init__()
            self.reads = []

        def submit(self, file, ranges, into, priority=0):
            self.reads.append((file, ranges, into))
            return len(self.reads) - 1

        def poll(self, ticket):
            return True

        def wait(self, ticket):
            for read in self.reads:
                self.read(*read)

        def cancel(self, ticket): ...


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
                if self.at < 0 or self.at + n > len(data):
                    raise StorageError("past the end", path=path, offset=self.at)
                time.sleep(1e-5)  # the mistake, made sure to show: others run between the two steps
                into[filled : filled + n] = np.frombuffer(data[self.at : self.at + n], np.uint8)
                filled += n


class TestNamesNonResidents(CachePolicyTests):
    class plugin(LruPolicy):  # noqa: N801
        def evicted(self, keys):
            super().evicted(keys[:-1])


class TestForgetsWhatWasGuessed(CachePolicyTests):
    class plugin(LfuPolicy):  # noqa: N801
        def guessed(self, keys):
            pass


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
