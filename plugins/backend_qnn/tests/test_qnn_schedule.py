"""When graphs are swapped, on a simulated NPU in simulated time: no token waits for one."""

import dataclasses
import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from pi2.api import FfnSpec
from pi2.builtin.exact_predictor import ExactPredictor
from pi2.bundle import BundleGeometry
from pi2.hot import HotClusters, hottest_first
from pi2.hybrid import HybridFfns, HybridOptions
from pi2.testing.plugin import examples
from pi2_backend_qnn.backend import QnnBackend
from pi2_backend_qnn.client import Client, Reply
from pi2_backend_qnn.programs import Programs

D, NEURONS, CLUSTER, LAYERS = 32, 256, 32, 4


@dataclasses.dataclass(frozen=True)
class Device:
    """Seconds.  Attention, and both halves of an FFN of one token, are of a 7 B model on a phone."""

    load_s: float
    attention_s: float = 0.6e-3
    hot_s: float = 1.2e-3
    cold_s: float = 1.0e-3


class SimulatedNpu(Client):
    """Makes one graph at a time and runs one at a time, both beside the CPU, in ``clock``'s time."""

    def __init__(self, device):
        self.device, self.clock, self.generation = device, 0.0, 1
        self._tickets, self._done, self._free = itertools.count(1), {}, {"make": 0.0, "run": 0.0}

    process_id = 1

    def now(self):
        return self.clock

    def start(self):
        return None

    def ask(self, request, *, unseen=False):
        kind = "run" if request["do"] == "run" else "make"
        takes = {"run": self.device.hot_s, "make": self.device.load_s}[kind]
        if request["do"] == "drop":
            takes = 0.0
        start = max(self.clock, self._free[kind])
        ticket, self._free[kind] = next(self._tickets), start + takes
        self._done[ticket] = Reply({}, start, start + takes)
        return ticket

    def poll(self, ticket):
        return self._done[ticket].end <= self.clock

    def wait(self, ticket):
        reply = self._done.pop(ticket)
        self.clock = max(self.clock, reply.end)
        return reply

    def forget(self, ticket):
        self._done.pop(ticket, None)

    def reuse(self):
        return None

    def share(self, array):
        return None

    def room(self, shape, dtype=np.float32):
        return shape

    def view(self, where):
        return np.zeros(where, np.float32)


class Cpu:
    """Attention, and the cold half of an FFN."""

    def __init__(self, npu):
        self.npu = npu

    def expect(self, ffn, tokens):
        return None

    def sparse(self, ffn, x, predictor, out):
        self.npu.clock += self.npu.device.cold_s
        out[:] = 0
        return 0

    def take_count(self):
        return None


class Model:
    def __init__(self, device):
        self.npu = SimulatedNpu(device)
        backend = object.__new__(QnnBackend)
        backend._programs, backend._contexts = Programs(self.npu, None), None
        backend._trouble, backend._cluster, backend._weights = None, CLUSTER, "exact"
        self.swaps = []
        finish = backend.finish_ffn
        backend.finish_ffn = lambda ticket, out: self.seen(finish(ticket, out))
        spec = FfnSpec(BundleGeometry(D, "q4_0", "q4_0", "q4_0"), "relu")
        bundles = np.zeros((NEURONS, spec.geometry.stride), np.uint8)
        hot = HotClusters(hottest_first(None, LAYERS, NEURONS), CLUSTER)
        placed = [backend.place_ffn(bundles, spec) for _ in range(LAYERS)]
        options = HybridOptions(hot=0.25, most=1.0, cluster=CLUSTER, prefill="accelerator")
        self.ffns = HybridFfns(backend, placed, NEURONS, hot, Cpu(self.npu), options)

    def seen(self, done):
        self.swaps += done.swaps
        return done

    def step(self, tokens=1):
        """A forward pass.  Returns its seconds, and those that it waited for graphs."""
        start, x, self.swaps = self.npu.clock, np.ones((tokens, D), np.float32), []
        for layer in range(LAYERS):
            self.ffns.expect(layer, [tokens])
            self.npu.clock += self.npu.device.attention_s
            if tokens == 1:
                self.ffns.sparse(layer, x, ExactPredictor(), np.empty_like(x))
            else:
                self.ffns.dense(layer, [(x, np.empty_like(x))])
        return self.npu.clock - start, sum(swap.wait_s for swap in self.swaps)

    def counts(self):
        return {self.ffns.hot.count(layer) for layer in range(LAYERS)}


loads = st.floats(-5, 0).map(lambda power: 10.0**power)  # seconds to load a graph: from nothing to very slow
shares = st.lists(st.sampled_from((0.25, 0.5, 0.75, 1.0)), min_size=1, max_size=6)


@examples(100)
@given(load_s=loads, shares=shares)
def test_no_token_waits_for_the_graph_of_another_share(load_s, shares):
    """Growing and shrinking: the graphs before go on until the new ones are there, which then take over."""
    model = Model(Device(load_s))
    model.step()  # there is nothing yet to go on with
    for share in shares:
        model.ffns.set_share(share)
        for later in (0, 0, 0, LAYERS * load_s, 0):
            model.npu.clock += later
            took, waited = model.step()
            assert waited <= 0.01 * took
        assert model.counts() == {int(share * NEURONS)}


@examples(100)
@given(load_s=loads, tokens=st.lists(st.sampled_from((1, 5, 20, 100, 128)), max_size=12))
def test_the_graph_of_a_long_prompt_stands_in_for_those_of_short_ones(load_s, tokens):
    model = Model(Device(load_s))
    model.step(128)
    for many in tokens:
        took, waited = model.step(many)
        assert waited <= 0.01 * took


def test_swaps_are_seen_once_with_their_times():
    model = Model(Device(load_s=2e-3))
    model.step()
    assert [round(swap.wait_s, 6) for swap in model.swaps[:1]] == [1.4e-3]  # but for attention
    model.ffns.set_share(0.5)
    seen = []
    for _ in range(4):
        model.step()
        seen += model.swaps
    assert len(seen) == LAYERS
    assert [round(swap.end - swap.start, 6) for swap in seen] == [2e-3] * LAYERS
    assert sum(swap.wait_s for swap in seen) == 0
