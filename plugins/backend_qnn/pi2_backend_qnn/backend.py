"""The backend ``qnn``: checks its options, starts the worker, and computes through static graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
from pi2.api import Backend, FfnSpec, Probe
from pi2.errors import OptionError
from pi2.tensor import BLOCK, F32, U8, Ids, Tensor

from pi2_backend_qnn import host, targets
from pi2_backend_qnn.client import Client
from pi2_backend_qnn.contexts import FORMAT, Contexts
from pi2_backend_qnn.errors import NoDevice
from pi2_backend_qnn.placed import Ffn, Matrix, rows_for
from pi2_backend_qnn.probe import describe_npu, find_npu, probe
from pi2_backend_qnn.programs import Programs, Run
from pi2_backend_qnn.scaling import input_exponents, scaled

_EMULATED_SOC = "SM8650"
DEVICE, EMULATOR = "htp-device", "htp-emulator-x86"


class QnnBackend(Backend):
    """Static graphs for the Hexagon NPU, in fp16 with weights of 4 or 8 bits, in a process of their own.

    ``emulator`` "on": Qualcomm's emulator in place of a device, for tests; very slow.  ``soc``: the chip, by
    Qualcomm's name; the device's own by default.  ``contexts``: a folder that ``pi2 compile`` made; without
    it, graphs are compiled when first needed.  ``cluster``: neurons of a cluster.  ``deadline``: seconds
    until an answer of the NPU is given up.  ``library``: another libQnnHtp.so than the package's.
    The others are QNN's: see its documentation.
    """

    name = "qnn"
    tolerance = 1e-2  # fp16 products; measured 4e-4 for one matrix and up to 4e-3 through an FFN

    @classmethod
    def probe(cls) -> Probe:
        return probe()

    def __init__(
        self,
        emulator: str = "off",
        soc: str | None = None,
        contexts: str | None = None,
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
        if not BLOCK <= cluster <= 1 << 14 or cluster % BLOCK:
            raise OptionError(
                f"a cluster cannot have {cluster} neurons", hint="a multiple of 32, up to 16384"
            )
        if not 0 < deadline <= 3600:
            raise OptionError(f"deadline cannot be {deadline:g} s", hint="more than 0, at most 3600")
        targets.check_packages(targets.installed())
        self._soc = _choose_soc(emulator == "on", soc)
        options = targets.provider_options(self._soc, performance, priority, vtcm_mb, rpc_latency_us)
        self._cluster = cluster
        self._client = Client(library, options, deadline)
        try:
            self._client.start()
            self.kind = self._client.about["kind"]
            if self.kind == EMULATOR and emulator == "off":
                raise NoDevice("the QNN provider finds no NPU", hint="--backend qnn:emulator=on emulates one")
            self._about = self._describe_contexts(options)
            self._contexts = None if contexts is None else Contexts.open(contexts, self._about)
            self._programs = Programs(self._client, self._contexts)
        except BaseException:
            self._client.close()
            raise

    def _describe_contexts(self, options: dict[str, str]) -> dict[str, Any]:
        """What compiled contexts depend on, beside weights; some options can change afterwards."""
        fixed = {name: value for name, value in options.items() if name in ("soc_model", "vtcm_mb")}
        return {
            "format": FORMAT,
            "soc": self._soc.name,
            "arch": self._soc.arch,
            "versions": dict(self._client.about["versions"]),
            "options": {**fixed, "cluster": self._cluster},
        }

    def describe(self) -> str:
        what = "EMULATED by x86 code, no measure of speed" if self.kind == EMULATOR else "NPU"
        versions = self._client.about["versions"]
        compiled = "compiled ahead" if self._contexts else "compiled when needed"
        return (
            f"Hexagon {self._soc.arch} of {self._soc.name}, {what}, ONNX Runtime {versions['onnxruntime']} with"
            f" QNN {versions['onnxruntime-qnn']}, fp16, graphs {compiled}, single rows of matrices by NumPy"
        )

    def close(self) -> None:
        self._client.close()

    def place(self, weight: Tensor) -> Matrix:
        return Matrix(weight=weight)

    def linear(self, weight: Matrix, x: F32, out: F32, rows: Ids | None = None) -> None:
        if rows is not None:
            out[:] = host.linear(weight, x, rows)
            return
        if out.size == 0:
            return
        finite = np.isfinite(x).all(axis=1)
        for first, many in _pieces(len(x)):
            part = slice(first, first + many)
            fed = _finite(x[part], finite[part])
            e = input_exponents(fed)
            shape = rows_for(many)
            y = _padded_run(
                self._programs, weight, (shape, 1), {"x": scaled(fed, -e)}, [(1, shape, weight.weight.rows)]
            ).finish()[1][0]
            out[part] = scaled(y[0, :many], e + weight.exponent)
        if not finite.all():
            out[~finite] = host.linear(weight, x[~finite], None)

    def place_ffn(self, bundles: U8, spec: FfnSpec) -> Ffn:
        return Ffn(bundles=bundles, spec=spec, cluster=self._cluster)

    def ffn(self, ffn: Ffn, x: F32, out: F32, rows: Ids | None = None) -> int:
        mask = np.ones(ffn.neurons, np.float32)
        if rows is not None:
            mask[:] = 0
            mask[rows] = 1
        return self._ffn(ffn, x, out, mask)

    def _ffn(self, ffn: Ffn, x: F32, out: F32, mask: F32) -> int:
        """The neurons with a mask (k,) of 1; those with 0 are computed as well, and count for nothing."""
        if out.size == 0 or not mask.any():
            out[:] = 0
            return 0
        finite, active = np.isfinite(x).all(axis=1), 0
        for first, many in _pieces(len(x)):
            part = slice(first, first + many)
            e, fed = ffn.scaling.inputs(_finite(x[part], finite[part]), ffn.spec)
            run = self._begin(ffn, rows_for(many), ffn.clusters, fed, mask)
            _, (y, on) = run.finish()
            out[part] = ffn.scaling.outputs(y[0, :many], e)
            active += int(on[0, :many][finite[part]].sum(dtype=np.float64))
        if not finite.all():
            out[~finite], more = host.ffn(ffn, x[~finite], np.flatnonzero(mask).astype(np.int32))
            active += more
        return active

    def _begin(self, ffn: Ffn, rows: int, clusters: int, fed: dict[str, F32], mask: F32) -> Run:
        masks, first = {}, 0
        for number, size in enumerate(ffn.sizes(clusters)):
            padded = np.zeros((1, 1, -(-size // BLOCK) * BLOCK), np.float32)
            padded[0, 0, :size] = mask[first : first + size]
            masks[f"mask{number}"] = padded
            first += size
        outputs = [(1, rows, ffn.spec.geometry.d_model), (1, rows, clusters)]
        return _padded_run(self._programs, ffn, (rows, clusters), fed, outputs, masks)

    def release(self, handle: Any) -> None:
        self._programs.release(handle)


def _choose_soc(emulated: bool, name: str | None) -> targets.Soc:
    if emulated:
        return targets.soc_named(name or _EMULATED_SOC)
    npu = find_npu()
    if npu is None or not npu.usable:
        raise NoDevice(describe_npu(npu), hint="--backend qnn:emulator=on emulates one, for tests")
    if (name := name or npu.soc) is None:
        raise OptionError(
            "the kernel does not say which SoC this is", hint="say it: --backend qnn:soc=SM8650, for one"
        )
    return targets.soc_named(name)


def _pieces(tokens: int) -> list[tuple[int, int]]:
    """(first, how many) of the tokens that go through a graph together."""
    most = rows_for(tokens)
    return [(first, min(most, tokens - first)) for first in range(0, tokens, most)]


def _finite(x: F32, finite: Any) -> F32:
    """``x`` with rows of zeros in place of those that are not finite."""
    return x if finite.all() else np.where(finite[:, None], x, np.float32(0))


def _padded_run(
    programs: Programs, placed: Matrix | Ffn, shape: tuple[int, int], tokens: dict[str, F32],
    outputs: list[tuple[int, ...]], others: dict[str, F32] | None = None,
) -> Run:  # fmt: skip
    """Run a graph on ``tokens`` (n, cols) each, padded with zeros to its rows."""
    fed = dict(others or {})
    for name, values in tokens.items():
        fed[name] = np.zeros((1, shape[0], values.shape[1]), np.float32)
        fed[name][0, : len(values)] = values
    return programs.begin(placed, shape, fed, outputs)
