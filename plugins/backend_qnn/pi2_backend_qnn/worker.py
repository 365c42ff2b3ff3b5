"""The process that has QNN in it: ``python -m pi2_backend_qnn.worker SOCKET MEMORY``, inherited descriptors.

It can crash, prints on stdout and knows one SoC for life, so it is kept apart (``pi2_backend_qnn.client`` is
the other side).  Requests and replies are JSON lines on the socket, each with its ticket; arrays lie in the
shared memory.  One thread answers, another one makes graphs that are asked for ahead of time, and the first
only listens: once nobody is there any more, the process ends, whatever it computes.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import platform
import queue
import socket
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
import onnxruntime_qnn as provider
from numpy.typing import NDArray
from pi2.api import FfnSpec
from pi2.bundle import BundleGeometry
from pi2.memory import give_back_unused
from pi2.tensor import DType, Tensor
from pi2.threads import lock, run_together

from pi2_backend_qnn.errors import DAMAGED
from pi2_backend_qnn.requantise import BITS

if TYPE_CHECKING:
    from pi2_backend_qnn.graph import Graph

EP = "QNNExecutionProvider"
Requests = queue.SimpleQueue[dict[str, Any]]
_ARM = ("aarch64", "arm64")


class Worker:
    """Sessions by number, and how to make and run them."""

    def __init__(self, memory: int) -> None:
        self._descriptor = memory
        self._map = mmap.mmap(memory, 0)
        self._sessions: dict[int, Any] = {}
        self._unwanted: set[int] = set()  # dropped before they were made
        self._devices: list[Any] = []
        self._options: dict[str, str] = {}

    def hello(self, library: str | None, options: dict[str, str]) -> dict[str, Any]:
        """Register the provider.  Returns what kind of device it found, and versions."""
        ort.register_execution_provider_library(EP, provider.get_library_path())
        self._devices = [d for d in ort.get_ep_devices() if d.ep_name == EP]
        self._options = {"backend_path": library or provider.get_qnn_htp_path(), **options}
        npu = any(d.device.type == ort.OrtHardwareDeviceType.NPU for d in self._devices)
        device = npu and platform.machine().lower() in _ARM
        return {
            "kind": "htp-device" if device else "htp-emulator-x86",
            "versions": {"onnxruntime": ort.__version__, "onnxruntime-qnn": provider.__version__},
        }

    def linear(
        self, number: int, rows: int, data: dict[str, Any], dtype: DType, cols: int, exponent: int,
        weights: str, save: str | None,
    ) -> None:  # fmt: skip
        """Compile the product with a Tensor."""
        from pi2_backend_qnn.graph import linear_graph

        tensor = Tensor(self._array(data), dtype, cols)
        self._compile(number, linear_graph(_graph(rows, weights), tensor, exponent), save)

    def ffn(
        self, number: int, rows: int, bundles: dict[str, Any], spec: dict[str, Any], cluster: int,
        exponents: dict[str, Any], weights: str, save: str | None,
    ) -> None:  # fmt: skip
        """Compile an FFN of all neurons in ``bundles``."""
        from pi2_backend_qnn.graph import ffn_graph

        geometry = BundleGeometry.from_dict(spec["geometry"])
        described = FfnSpec(geometry, spec["activation"], spec["up_relu"])
        graph = _graph(rows, weights)
        self._compile(number, ffn_graph(graph, self._array(bundles), described, cluster, exponents), save)

    def attention(
        self, number: int, rows: int, context: int, shape: dict[str, Any], formats: dict[str, Any],
        exponents: dict[str, int], save: str | None, **arrays: dict[str, Any],
    ) -> None:  # fmt: skip
        """Compile an attention block of so many tokens behind so many older ones."""
        from pi2_backend_qnn.attention_graph import AttentionGraph
        from pi2_backend_qnn.placed import AttentionShape

        found = {name: self._array(where) for name, where in arrays.items()}
        weights = {name: Tensor(found.pop(name), *formats[name]) for name in formats}
        graph = AttentionGraph(rows, context, AttentionShape(**shape), weights, found, exponents)
        self._compile(number, graph.build(), save)

    def load(self, number: int, path: str, files: dict[str, str]) -> None:
        """Take over a context that was compiled before.  ``files``: path -> sha256, which QNN has not."""
        for name, wanted in files.items():
            try:
                with Path(name).open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as e:
                raise ValueError(f"{DAMAGED}{name} cannot be read, {e.strerror}") from None
            if found != wanted:
                raise ValueError(f"{DAMAGED}the checksum of {name} is not the manifest's")
        self._keep(number, self._session(path))

    def run(self, number: int, inputs: dict[str, Any], outputs: list[Any]) -> None:
        session = self._sessions[number]
        fed = {name: self._array(where) for name, where in inputs.items()}
        for result, where in zip(session.run(None, fed), outputs, strict=True):
            self._array(where)[...] = result

    def numbers(self) -> dict[str, Any]:
        """Of the graphs that are kept."""
        return {"numbers": list(self._sessions)}

    def drop(self, numbers: list[int]) -> None:
        for number in numbers:
            if self._sessions.pop(number, None) is None:
                self._unwanted.add(number)

    def _keep(self, number: int, session: Any) -> None:
        """Called by either thread."""
        self._sessions[number] = session
        if number in self._unwanted:
            del self._sessions[number]

    def _compile(self, number: int, model: bytes, save: str | None) -> None:
        """A session of the graph; ``save``: a file to write its context beside, and nothing to run."""
        if save is None:
            self._keep(number, self._session(model))
            give_back_unused()
            return
        entries = {"context_enable": "1", "context_file_path": save, "context_embed_mode": "0"}
        self._session(model, {f"ep.{key}": value for key, value in entries.items()})

    def _session(self, model: bytes | str, entries: dict[str, str] | None = None) -> Any:
        """A session all of whose nodes are QNN's.  Raises whatever ONNX Runtime raises."""
        options = ort.SessionOptions()
        options.log_severity_level = 2
        options.intra_op_num_threads = 1  # nothing is the CPU's; else each session starts threads
        entries = {
            "session.disable_cpu_ep_fallback": "1",
            "session.record_ep_graph_assignment_info": "1",
            **(entries or {}),
        }
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        options.add_provider_for_devices(self._devices, self._options)
        session = ort.InferenceSession(model, options, enable_fallback=0)
        owners = {part.ep_name for part in session.get_provider_graph_assignment_info()}
        if owners != {EP}:
            raise RuntimeError(f"nodes were given to {', '.join(sorted(owners))}")
        return session

    def _array(self, where: dict[str, Any]) -> NDArray[Any]:
        """A view of the shared memory: offset, dtype, shape."""
        dtype, shape = np.dtype(where["dtype"]), where["shape"]
        end = where["offset"] + dtype.itemsize * int(np.prod(shape))
        if end > len(self._map):
            self._map = mmap.mmap(self._descriptor, 0)
        return np.ndarray(shape, dtype, self._map, where["offset"])


def _graph(rows: int, weights: str) -> Graph:
    """An empty one for such weights."""
    from pi2_backend_qnn.graph import Graph
    from pi2_backend_qnn.integer_graph import IntegerGraph

    return IntegerGraph(rows, BITS[weights]) if weights in BITS else Graph(rows)


class Server:
    """Answers requests, those that are ahead of time in a thread of their own."""

    def __init__(self, control: socket.socket, worker: Worker) -> None:
        self._control, self._worker = control, worker
        self._now: Requests = queue.SimpleQueue()
        self._ahead: Requests = queue.SimpleQueue()
        self._lock = lock()

    def run(self) -> None:
        """Until the other side goes away."""
        run_together([self._listen, partial(self._serve, self._now), partial(self._serve, self._ahead)])

    def _listen(self) -> None:
        try:
            for line in self._control.makefile("rb"):
                request = json.loads(line)
                (self._ahead if request.pop("ahead", False) else self._now).put(request)
        finally:
            os._exit(0)  # QNN's own clean-up may abort

    def _serve(self, requests: Requests) -> None:
        while True:
            self._answer(requests.get())

    def _answer(self, request: dict[str, Any]) -> None:
        ticket, start = request.pop("ticket"), time.perf_counter()
        try:
            reply = getattr(self._worker, request.pop("do"))(**request) or {}
        except Exception as e:  # whatever QNN and its wrapper raise is told to the other side
            reply = {"error": str(e) or type(e).__name__}
        end = time.perf_counter()
        with self._lock:
            self._control.sendall(
                json.dumps(reply | {"ticket": ticket, "start": start, "end": end}).encode() + b"\n"
            )


def main() -> None:
    server = Server(socket.socket(fileno=int(sys.argv[1])), Worker(int(sys.argv[2])))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # QNN prints there
    server.run()


if __name__ == "__main__":
    main()
