"""Engines that are compared, each in a process of its own that waits while another one is measured.

python contenders.py KIND MODEL OPTIONS    reads requests as lines of JSON, writes answers

Libraries that clash (llama.cpp and its forks export the same names) never meet, and each process can be put
into a memory cgroup before it touches a byte of its model.  Tokens are given, not sampled: all contenders do
the same work, but for what their activation functions make of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

Answer = dict[str, Any]
HERE = Path(__file__).parent


class Contender:
    """The far end of ``serve``.  ``run``: ``prompt`` of the ``ids`` at once, then the others one by one."""

    def __init__(self, kind: str, model: Path, *, cgroup: Path | None = None, **options: Any) -> None:
        options |= {"cgroup": None if cgroup is None else str(cgroup)}
        command = [sys.executable, str(Path(__file__)), kind, str(model), json.dumps(options)]
        path = os.pathsep.join(filter(None, (str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        self.kind = kind
        self.setup = self._answer()

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, ids: list[int], prompt: int, **more: Any) -> Answer:
        return self.ask(op="run", ids=ids, prompt=prompt, **more)

    def ask(self, **request: Any) -> Answer:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Answer:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise RuntimeError(f"{self.kind} ended with status {self._process.returncode}")
        answer: Answer = json.loads(line)
        return answer

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait()

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Pi2:
    """pi2 with the keyword arguments of ``Engine.open``; ``given``: the true active sets cost nothing."""

    def __init__(self, model: Path, offload: dict[str, Any] | None = None, **options: Any) -> None:
        from pi2.engine import Engine

        if offload is not None:
            from pi2.offload_options import OffloadOptions

            options["offload"] = OffloadOptions(**offload)
        self._engine = Engine.open(model, **options)
        self._given: dict[str, list[Any]] = {}
        kv_item = np.dtype(self._engine.decoder._backend.kv_dtype).itemsize
        self.about = self._engine.setup() | {"kv_item_bytes": kv_item}

    def run(self, ids: list[int], prompt: int, given: bool = False) -> Answer:
        decoder = self._engine.decoder
        predictor = decoder.predictor
        if given:
            key = json.dumps([ids, prompt])
            if key not in self._given:
                self._given[key] = self._active_sets(ids, prompt)
            decoder.predictor = _Given(self._given[key])
        session = self._engine.session()
        count, active, reads = decoder.ffn_count, [decoder.ffn_count.active], []
        take = decoder.ffns.take_count if getattr(self._engine, "offloaded", None) else lambda: None
        take()

        def finished() -> None:
            active.append(count.active)
            reads.append(take())

        answer = timed(session.forward, ids, prompt, finished)
        decoder.predictor = predictor
        arch = self._engine.model.architecture
        density = np.diff(active[1:]) / (arch.n_layers * arch.n_neurons)
        return answer | {"density": density.tolist(), "reads": [r and asdict(r) for r in reads]}

    def _active_sets(self, ids: list[int], prompt: int) -> list[Any]:
        """Active neurons of every decoded token and FFN, in the order of the calls."""
        from pi2.activity import active_neurons

        inputs: dict[int, list[Any]] = {}
        self._engine.decoder.observer = lambda ffn, x: inputs.setdefault(ffn, []).append(x.copy())
        session = self._engine.session()
        session.forward(ids[:prompt])
        inputs.clear()
        for token in ids[prompt:]:
            session.forward([token])
        self._engine.decoder.observer = None
        sets = [active_neurons(self._engine.model, f, np.concatenate(inputs[f])) for f in sorted(inputs)]
        return [
            np.flatnonzero(rows[token]).astype(np.int32) for token in range(len(sets[0])) for rows in sets
        ]


class _Given:
    """A predictor that was told: the calls come in the order in which the sets were made."""

    def __init__(self, sets: list[Any]) -> None:
        self._sets = iter(sets)

    def predict(self, ffn: int, x: Any) -> Any:
        return next(self._sets)


class LlamaCpp:
    """llama.cpp by the xllamacpp wheel; without ``repack`` the weights stay in the mapped file."""

    def __init__(self, model: Path, *, threads: int, context: int, repack: bool = True) -> None:
        from parity import llama_cpp

        self._lib = lib = llama_cpp._library()
        # use_extra_bufts, in one word with vocab_only, check_tensors and no_host
        params = llama_cpp._with(lib.llama_model_default_params(), {72: (1 << 16, repack << 16)})
        self._model = lib.llama_model_load_from_file(str(model).encode(), params)
        assert self._model, f"llama.cpp cannot load {model}"
        # n_ctx, n_ubatch stays 512, n_threads and n_threads_batch: (expected default, value) at their offsets
        fields = {0: (512, context), 28: (4, threads), 32: (4, threads)}
        self._params = llama_cpp._with(lib.llama_context_default_params(), fields)
        self.about = {"threads": threads, "repack": repack, "mmap": True, "kv_item_bytes": 2}

    def run(self, ids: list[int], prompt: int) -> Answer:
        lib = self._lib
        context = lib.llama_init_from_model(self._model, self._params)
        batch = lib.llama_batch_init(prompt, 0, 1)
        seen = 0

        def forward(tokens: list[int]) -> None:
            nonlocal seen
            fill(batch, tokens, seen, sequence=1)
            assert lib.llama_decode(context, batch) == 0
            seen += len(tokens)

        def finished() -> None:
            assert np.isfinite(lib.llama_get_logits(context)[0])  # waits for them

        forward(ids[:1])  # its first call warms up, in place 0 and a sequence of its own
        answer = timed(forward, ids, prompt, finished)
        lib.llama_batch_free(batch)
        lib.llama_free(context)
        return answer


class IkLlamaCpp:
    """ik_llama.cpp by the ik-llama-cpp-python wheel; ``repack``: rows in its own order, made when loading."""

    def __init__(self, model: Path, *, threads: int, context: int, repack: bool = True) -> None:
        import ik_llama_cpp._ctypes_api as api

        self._api = api
        api.llama_backend_init()
        params = api.llama_model_default_params()
        params.use_mmap, params.repack_tensors = not repack, repack
        self._model = api.llama_model_load_from_file(str(model).encode(), params)
        assert self._model, f"ik_llama.cpp cannot load {model}"
        self._params = api.llama_context_default_params()
        self._params.n_ctx = self._params.n_batch = context
        self._params.n_threads = self._params.n_threads_batch = threads
        self.about = {"threads": threads, "repack": repack, "kv_item_bytes": 2}

    def run(self, ids: list[int], prompt: int) -> Answer:
        api, seen = self._api, 0
        context = api.llama_init_from_model(self._model, self._params)
        batch = api.llama_batch_init(prompt, 0, 1)

        def forward(tokens: list[int]) -> None:
            nonlocal seen
            fill(batch, tokens, seen, sequence=0)
            assert api.llama_decode(context, batch) == 0
            seen += len(tokens)

        def finished() -> None:
            assert np.isfinite(api.llama_get_logits_ith(context, -1)[0])

        forward(ids[:1])
        answer = timed(forward, ids, prompt, finished)
        api.llama_batch_free(batch)
        api.llama_free(context)
        return answer


def fill(batch: Any, tokens: list[int], start: int, sequence: int) -> None:
    """llama.cpp's batch for ``tokens`` at positions from ``start``; logits of the last one."""
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, start + i, 1
        batch.seq_id[i][0], batch.logits[i] = 0, i == len(tokens) - 1


def timed(forward: Any, ids: list[int], prompt: int, finished: Any) -> Answer:
    """Seconds of the prefill, and of every decoded token."""
    stamps = [time.perf_counter()]
    for tokens in (ids[:prompt], *([token] for token in ids[prompt:])):
        forward(tokens)
        finished()
        stamps.append(time.perf_counter())
    seconds = np.diff(stamps).tolist()
    return {"prefill_s": seconds[0], "token_s": seconds[1:]}


KINDS: dict[str, Any] = {"pi2": Pi2, "llama.cpp": LlamaCpp, "ik_llama.cpp": IkLlamaCpp}


def serve(kind: str, model: Path, options: dict[str, Any]) -> None:
    if cgroup := options.pop("cgroup"):
        (Path(cgroup) / "cgroup.procs").write_text(str(os.getpid()))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    engine = KINDS[kind](model, **options)
    print(json.dumps(engine.about), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(engine, request.pop("op"))(**request)), file=answers, flush=True)
    os._exit(0)  # libraries of other people sometimes hang in their destructors


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
