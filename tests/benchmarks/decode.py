"""Tokens/s of a pi2 model on several backends, and of llama.cpp on a GGUF of the same weights, in turns.

PYTHONPATH=tests python tests/benchmarks/decode.py MODEL [--gguf FILE] [--threads 2] [--repeats 5]

Prefill of a prompt and decode behind it, of given tokens (nothing is sampled), and in every repeat the
speed at which memory is read.  Prints one JSON object: every repeat, medians and extremes.  On a machine
that is busy, `--threads 1 --clock cpu` counts the process's own time on a core, not the wall clock's.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from pi2.engine import Engine
from pi2.stats import versions

READ_BYTES = 1 << 28  # per thread: more than any cache holds
Speeds = dict[str, float]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def read_speed(buffers: list[np.ndarray[Any, Any]]) -> float:
    """GB/s at which one thread a buffer reads it: the C library's memchr, looking for what is not there."""
    memchr = ctypes.CDLL(None).memchr  # releases the GIL; vectors on every machine worth measuring
    memchr.argtypes, memchr.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], ctypes.c_void_p
    with ThreadPoolExecutor(len(buffers)) as pool:
        start = time.perf_counter()
        found = list(pool.map(lambda b: memchr(b.ctypes.data, 0, b.nbytes), buffers))
        elapsed = time.perf_counter() - start
    assert not any(found)
    return sum(b.nbytes for b in buffers) / elapsed / 1e9


def speeds(forward: Any, ids: list[int], prompt: int, clock: str) -> Speeds:
    """Prefill of the first ``prompt`` tokens in one go, the others one by one."""
    now = CLOCKS[clock]
    start = now()
    forward(ids[:prompt])
    middle = now()
    for token in ids[prompt:]:
        forward([token])
    end = now()
    decoded = len(ids) - prompt
    return {"prefill_tokens_s": prompt / (middle - start), "decode_tokens_s": decoded / (end - middle)}


def outside_backend(engine: Engine, ids: list[int], prompt: int) -> float:
    """Milliseconds a layer and decoded token that pass outside of calls of the backend: Python and NumPy."""
    backend: Any = engine.decoder._backend
    spent = 0.0

    def timed(call: Any) -> Any:
        def wrapped(*arguments: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            result = call(*arguments)
            spent += time.perf_counter() - start
            return result

        return wrapped

    names = [name for name in ("linear", "ffn", "attention") if hasattr(backend, name)]
    for name in names:
        setattr(backend, name, timed(getattr(backend, name)))
    session = engine.session()
    session.forward(ids[:prompt])
    start, spent = time.perf_counter(), 0.0
    for token in ids[prompt:]:
        session.forward([token])
    outside = time.perf_counter() - start - spent
    for name in names:
        delattr(backend, name)
    return 1e3 * outside / (len(ids) - prompt) / engine.model.architecture.n_layers


class LlamaCpp:
    """A GGUF in llama.cpp with its own defaults: KV cache in float16, flash attention where it chooses to."""

    def __init__(self, path: Path, context: int, threads: int) -> None:
        from parity import llama_cpp  # the parity tests' access to the xllamacpp wheel

        self._peer = peer = llama_cpp.LlamaCpp(path, context)
        self._lib = peer._lib
        # n_ctx, n_threads and n_threads_batch: (expected default, value) at their offsets
        fields = {0: (512, context), 28: (4, threads), 32: (4, threads)}
        self._params = llama_cpp._with(self._lib.llama_context_default_params(), fields)

    def speeds(self, ids: list[int], prompt: int, clock: str) -> Speeds:
        lib, seen = self._lib, 0
        context = lib.llama_init_from_model(self._peer._model, self._params)
        batch = lib.llama_batch_init(prompt, 0, 1)

        def forward(tokens: list[int]) -> None:
            nonlocal seen
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, seen + i, 1
                batch.seq_id[i][0], batch.logits[i] = 0, i == len(tokens) - 1
            assert lib.llama_decode(context, batch) == 0
            assert np.isfinite(lib.llama_get_logits(context)[0])  # waits for them
            seen += len(tokens)

        forward(ids[:1])  # its first call warms up; position 0 is then a token of its own
        result = speeds(forward, ids, prompt, clock)
        lib.llama_batch_free(batch)
        lib.llama_free(context)
        return result


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.partition(": ")[2] for line in info.splitlines() if "model name" in line), "")
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
        "load_average": os.getloadavg(),
    }


def summary(rows: list[Speeds]) -> dict[str, dict[str, float]]:
    """Median, least and most of every figure."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in columns.items()
    }


def main(options: argparse.Namespace) -> None:
    prompt, total = options.prompt, options.prompt + options.decode
    backends = [text.replace("THREADS", str(options.threads)) for text in options.backends]
    engines = {name: Engine.open(options.model, backend=name, context=total) for name in backends}
    vocab = next(iter(engines.values())).model.architecture.vocab_size
    ids = np.random.default_rng(0).integers(0, vocab, total).tolist()
    runs: dict[str, Any] = {
        name: lambda e=engine: speeds(e.session().forward, ids, prompt, options.clock)
        for name, engine in engines.items()
    }
    if options.gguf:
        peer = LlamaCpp(options.gguf, total + 1, options.threads)
        runs["llama.cpp"] = lambda: peer.speeds(ids, prompt, options.clock)
    buffers = [np.ones(READ_BYTES, np.uint8) for _ in range(options.threads)]
    memory: list[Speeds] = []
    rows: dict[str, list[Speeds]] = {name: [] for name in runs}
    before = machine()
    for run in runs.values():
        run()  # warm: pages, caches, bytecode
    for _ in range(options.repeats):
        memory.append({"1_thread": read_speed(buffers[:1]), "all_threads": read_speed(buffers)})
        for name, run in runs.items():
            rows[name].append(run())
    report = {
        "what": f"prefill of {prompt} tokens, decode of {options.decode}, {options.threads} threads",
        "clock": options.clock,
        "machine": before,
        "load_average_after": os.getloadavg(),
        "versions": versions() | {"xllamacpp": _version("xllamacpp") if options.gguf else None},
        "setup": {name: engine.setup() for name, engine in engines.items()},
        "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS", "as many as cores"),
        "gguf": str(options.gguf) if options.gguf else None,
        "memory_read_gb_s": summary(memory),
        "medians": {name: summary(found) for name, found in rows.items()},
        "outside_backend_ms_per_layer": {
            name: outside_backend(engine, ids, prompt) for name, engine in engines.items()
        },
        "repeats": [
            {"memory_read_gb_s": memory[i], **{name: found[i] for name, found in rows.items()}}
            for i in range(options.repeats)
        ],
    }
    print(json.dumps(report, indent=1))
    for engine in engines.values():
        engine.close()


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--backends", nargs="+", default=["cpu:threads=THREADS", "numpy"])
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    asked = parser.parse_args()
    if asked.clock == "cpu" and asked.threads != 1:
        parser.error("--clock cpu counts the time of all threads: it wants --threads 1")
    main(asked)
