"""The backend ``qnn``: checks its options, starts the worker, and computes through static graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pi2.accelerator import FfnDone, ToPlace
from pi2.api import Backend, FfnSpec, Probe
from pi2.attention import AttentionSpec
from pi2.errors import OptionError
from pi2.kv_cache import Kv
from pi2.tensor import BLOCK, F32, U8, Ids, Tensor

from pi2_backend_qnn import attention, host, probe, requantise, targets
from pi2_backend_qnn.attention import Attention
from pi2_backend_qnn.client import Client
from pi2_backend_qnn.contexts import FORMAT, Contexts, bytes_of, compile_all
from pi2_backend_qnn.errors import NoDevice, QnnError
from pi2_backend_qnn.ffn import Call, begin
from pi2_backend_qnn.pack import outputs
from pi2_backend_qnn.placed import EXACT, Ffn, Matrix, rows_for
from pi2_backend_qnn.programs import KEPT, Programs
from pi2_backend_qnn.scaling import scaled
from pi2_backend_qnn.tokens import finite_rows, pad, pieces

_EMULATED_SOC = "SM8650"
EMULATOR = "htp-emulator-x86"
"""What the worker calls the emulator; a device is "htp-device"."""


_BASE = 250_000_000
"""Bytes of a worker with Qualcomm's libraries, and what it computes in."""
_COPY = {True: 18.0, False: 2.4}
"""Bytes in the worker for one of our weights and graph: emulated, and not."""
PlacedT = TypeVar("PlacedT", Matrix, Ffn)


@dataclass(frozen=True, slots=True)
class Matrices:
    """An attention block of which there are contexts."""

    spec: AttentionSpec
    placed: dict[str, Matrix]
    """q, k, v, o."""


class QnnBackend(Backend):
    """Static graphs for the Hexagon NPU, in fp16 with weights of 4 or 8 bits, in a process of their own.

    ``emulator`` "on": Qualcomm's emulator in place of a device, for tests; very slow.  ``soc``: the chip, by
    Qualcomm's name; the device's own by default.  ``contexts``: a folder that ``pi2 compile`` made; without
    it, graphs are compiled when first needed.  ``weights``: "exact", "w8a16" (int8 by output channel) or
    "w4a16" (FFNs int4, outliers int8), both lossy, with numbers of 16 bits; attention as one graph is exact.
    ``cluster``: neurons of a cluster.  ``deadline``: seconds
    until an answer of the NPU is given up.  ``library``: another libQnnHtp.so than the package's.
    The others are QNN's: see its documentation.
    """

    name = "qnn"
    tolerance = 1e-2  # fp16 products; measured 4e-4 for one matrix and up to 4e-3 through an FFN

    @classmethod
    def probe(cls) -> Probe:
        return probe.probe()

    def __init__(
        self,
        emulator: str = "off",
        soc: str | None = None,
        contexts: str | None = None,
        weights: str = EXACT,
        cluster: int = 512,
        deadline: float = 120.0,
        library: str | None = None,
        performance: str = "burst",
        priority: str = "normal",
        vtcm_mb: int | None = None,
        rpc_latency_us: int | None = None,
    ) -> None:
        if emulator not in ("on", "off"):
            raise OptionError(f"emulator is on or off, not {emulator!r}")
        if weights != EXACT and weights not in requantise.BITS:
            known = ", ".join((EXACT, *requantise.BITS))
            raise OptionError(f"weights cannot be {weights!r}", hint=f"weights is one of {known}")
        if not BLOCK <= cluster <= 1 << 14 or cluster % BLOCK:
            raise OptionError(
                f"a cluster cannot have {cluster} neurons", hint="a multiple of 32, up to 16384"
            )
        if not 0 < deadline <= 3600:
            raise OptionError(f"deadline cannot be {deadline:g} s", hint="more than 0, at most 3600")
        targets.check_packages(targets.installed())
        self._soc = _choose_soc(emulator == "on", soc)
        options = targets.provider_options(self._soc, performance, priority, vtcm_mb, rpc_latency_us)
        self._cluster, self._weights = cluster, weights
        self.lossy = requantise.WORDS.get(weights)
        self._trouble: QnnError | None = None  # of preparing, to be raised when the graph is needed
        self._client = Client(library, options, deadline)
        try:
            self._client.start()
            self.kind = self._client.about["kind"]
            self.emulated = self.kind == EMULATOR
            if self.emulated and emulator == "off":
                raise NoDevice("the QNN provider finds no NPU", hint="--backend qnn:emulator=on emulates one")
            self.about = self._about(options)
            self._contexts = None if contexts is None else Contexts.open(contexts, self.about)
            self._programs = Programs(self._client, self._contexts)
        except BaseException:
            self._client.close()
            raise

    def _about(self, options: dict[str, str]) -> dict[str, Any]:
        """What compiled contexts depend on, beside weights; the other options can change afterwards."""
        fixed = {name: value for name, value in options.items() if name in ("soc_model", "vtcm_mb")}
        return {
            "format": FORMAT,
            "soc": self._soc.name,
            "arch": self._soc.arch,
            "weights": self._weights,
            "versions": dict(self._client.about["versions"]),
            "options": {**fixed, "cluster": self._cluster},
        }

    def outside_bytes(self) -> int:
        """The worker's; what it shares with this process is counted in both."""
        return self._client.resident_bytes()

    def outside_bytes_for(self, weights: int) -> int:
        """Measured on the emulator (README.md); of a device nobody knows: as large as contexts become."""
        return max(self.outside_bytes(), _BASE + int(weights * KEPT * _COPY[self.emulated]))

    def describe(self) -> str:
        what = "EMULATED by x86 code, no measure of speed" if self.emulated else "NPU"
        versions = self.about["versions"]
        numbers = "fp16" if self._weights == EXACT else f"weights {self._weights}, fp16 between products"
        compiled = "compiled ahead" if self._contexts else "compiled when needed"
        return (
            f"Hexagon {self._soc.arch} of {self._soc.name}, {what}, {numbers}, graphs {compiled},"
            " single rows of matrices by NumPy;"
            f" QNN {versions['onnxruntime-qnn']}, ONNX Runtime {versions['onnxruntime']}"
        )

    @classmethod
    def compile(
        cls,
        weights: ToPlace,
        destination: Path,
        options: Mapping[str, str],
        progress: Callable[[str, int, int], None],
    ) -> dict[str, Any]:
        """Compile contexts on x86 or on the device itself; the emulator's compiler is the device's."""
        npu = probe.find_npu()
        backend = cls.open({**({} if npu and npu.usable else {"emulator": "on"}), **options})
        try:
            placed = [backend.place(matrix) for matrix in weights.matrices]
            ffns = (backend.place_ffn(bundles(), weights.spec) for bundles in weights.ffns)
            about = {**backend.about, "source": dict(weights.source)}
            total = len(placed) + len(weights.ffns)
            needed = sum(map(bytes_of, placed))
            if weights.ffns:  # all are as large as the first
                first = backend.place_ffn(weights.ffns[0](), weights.spec)
                needed += len(weights.ffns) * bytes_of(first)
            found = compile_all(
                backend._programs, chain(placed, ffns), total, about, destination, progress, needed
            )
        finally:
            backend.close()
        rounded = "" if backend._weights == EXACT else f",weights={backend._weights}"
        return {**found, "use": f"qnn:contexts={destination},soc={backend._soc.name}{rounded}"}

    def close(self) -> None:
        self._client.close()

    def place(self, weight: Tensor) -> Matrix:
        rounded = EXACT if self._weights == EXACT else requantise.MATRICES
        return self._known(Matrix(weight=weight, weights=rounded))

    def linear(self, weight: Matrix, x: F32, out: F32, rows: Ids | None = None) -> None:
        if rows is not None:
            out[:] = host.linear(weight, x, rows)
            return
        if out.size == 0:
            return
        x, bad = finite_rows(x)
        for part in pieces(len(x)):
            e, many = weight.exponents(x[part]), rows_for(len(x[part]))
            fed = {"x": pad(scaled(x[part], -e), many)}
            run = self._programs.begin(weight, (many, 1), fed, [(1, many, outputs(weight.weight.rows))])
            _, (y,) = run.finish()
            out[part] = scaled(y[0, : len(e), : weight.weight.rows], e + weight.exponent)
        if bad is not None:
            out[bad.rows] = host.linear(weight, bad.x, None)

    def place_ffn(self, bundles: U8, spec: FfnSpec) -> Ffn:
        return self._known(Ffn(bundles=bundles, spec=spec, cluster=self._cluster, weights=self._weights))

    def ffn(self, ffn: Ffn, x: F32, out: F32, rows: Ids | None = None) -> int:
        """All neurons are computed; those that are not among ``rows`` are multiplied by 0."""
        mask = np.ones(ffn.neurons, np.float32)
        if rows is not None:
            mask[:] = 0
            mask[rows] = 1
        if out.size == 0 or not mask.any():
            out[:] = 0
            return 0
        return begin(self._programs, ffn, x, mask, ffn.neurons).finish(out).active

    def place_attention(self, spec: AttentionSpec) -> Attention | Matrices:
        if self._contexts is None:
            return Attention(spec=spec)
        return Matrices(spec, {name: self.place(getattr(spec, name)) for name in "qkvo"})

    def attention(
        self, block: Attention | Matrices, x: F32, keys: Kv, values: Kv, start: int, out: F32
    ) -> None:
        """One graph; with contexts, which have the matrices only, those, and the rest by NumPy."""
        if isinstance(block, Attention):
            attention.run(self._programs, block, x, keys, values, start, out)
            return

        def multiply(name: str, y: F32) -> F32:
            made = np.empty((len(y), block.placed[name].weight.rows), np.float32)
            self.linear(block.placed[name], np.ascontiguousarray(y), made)
            return made

        if len(x):
            attention.host(block.spec, multiply, x, keys, values, start, out)

    def _known(self, placed: PlacedT) -> PlacedT:
        if self._contexts is not None:
            self._contexts.require(placed)
        return placed

    def prepare_ffn(self, ffn: Ffn, tokens: int, count: int) -> bool:
        shapes = {ffn.shape_for(part.stop - part.start, count) for part in pieces(tokens)}
        try:
            for shape in shapes:
                self._programs.prepare(ffn, shape)
            return all(self._programs.is_ready(ffn, shape) for shape in shapes)
        except QnnError as e:
            self._trouble = self._trouble or e
            return True  # to be told of it

    def begin_ffn(self, ffn: Ffn, x: F32, count: int) -> Call:
        """Raises what went wrong when the graph was prepared, too."""
        trouble, self._trouble = self._trouble, None
        if trouble is not None:
            raise trouble
        mask = (np.arange(ffn.neurons) < count).astype(np.float32)
        return begin(self._programs, ffn, x, mask, count)

    def finish_ffn(self, ticket: Call, out: F32) -> FfnDone:
        return ticket.finish(out)

    def cancel_ffn(self, ticket: Call) -> None:
        ticket.cancel()

    def release(self, handle: Any) -> None:
        for each in handle.placed.values() if isinstance(handle, Matrices) else [handle]:
            self._programs.release(each)


def _choose_soc(emulated: bool, name: str | None) -> targets.Soc:
    if emulated:
        return targets.soc_named(name or _EMULATED_SOC)
    npu = probe.find_npu()
    if npu is None or not npu.usable:
        raise NoDevice(probe.describe_npu(npu), hint="--backend qnn:emulator=on emulates one, for tests")
    if (name := name or npu.soc) is None:
        raise OptionError(
            "the kernel does not say which SoC this is", hint="say it: --backend qnn:soc=SM8650, for one"
        )
    return targets.soc_named(name)
