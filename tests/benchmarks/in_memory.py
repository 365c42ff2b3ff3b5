"""Decode and prefill in memory: pi2 dense and sparse, llama.cpp and ik_llama.cpp, in turns on the same shape.

PYTHONPATH=tests python tests/benchmarks/in_memory.py DIRECTORY... [--engines dense exact llama.cpp]

A DIRECTORY is one of ``make_model.py``'s; the first has the GGUF, and the others other densities.

    dense         pi2 with SiLU in place of ReLU: every neuron counts (the weights are hard links)
    exact         pi2, every gate computed, then only what is not zero
    given         pi2, the active sets known beforehand: a perfect predictor that costs nothing
    lowrank       pi2, the model's own predictor, its cost included
    llama.cpp, ik_llama.cpp    the GGUF, SiLU, repacked as they like it

Ratios are taken within a repeat.  ``roofline``: the bytes that a token must read, at the speed at which the
same number of threads just read memory, over the time it took.  Prints one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from contenders import Contender
from decode import READ_BYTES, machine, read_speed
from pi2.architecture import Architecture
from pi2.container import read_manifest
from pi2.container.manifest import MANIFEST, describe_member
from pi2.container.predictors import PREDICTORS
from pi2.stats import versions
from pi2.tensor import row_bytes

SPARSE = ("exact", "given", "lowrank")
PEERS = ("llama.cpp", "ik_llama.cpp")
Rows = dict[str, list[dict[str, Any]]]


def dense_twin(model: Path) -> Path:
    """The same weights with SiLU, beside ``model``: hard links, another config.json."""
    twin = model.with_name(f"{model.name}-dense")
    if not twin.exists():
        manifest = read_manifest(model)
        twin.mkdir()
        names = [name for name in manifest.files if name not in ("config.json", PREDICTORS)]
        for name in names:
            (twin / name).hardlink_to(model / name)
        config = json.loads((model / "config.json").read_text()) | {"activation": "silu"}
        (twin / "config.json").write_text(json.dumps(config, indent=1))
        files = {name: manifest.files[name] for name in names}
        files["config.json"] = describe_member(twin, "config.json")
        (twin / MANIFEST).write_text(dataclasses.replace(manifest, files=files).to_yaml())
    return twin


def architecture(model: Path) -> Architecture:
    return Architecture.from_dict(json.loads((model / "config.json").read_text()))


def token_bytes(model: Path, engine: str, density: float, context: int, kv_item: int = 2) -> int:
    """What one decoded token must read, at least: weights of q4_0, the KV cache, the predictor."""
    manifest, arch = read_manifest(model), architecture(model)
    q4 = row_bytes("q4_0", arch.d_model)
    kv_rows = 2 * arch.n_kv_heads
    heads = (arch.n_heads + kv_rows) * arch.head_dim
    attention = heads * q4 + arch.d_model * row_bytes("q4_0", arch.n_heads * arch.head_dim)
    cache = kv_rows * arch.head_dim * context * kv_item
    neurons = {"exact": 1 + 2 * density, "given": 3 * density, "lowrank": 3 * density}.get(engine, 3)
    ffn = neurons * arch.n_neurons * q4
    predictor = manifest.files[PREDICTORS].nbytes if engine == "lowrank" else 0
    return int(arch.n_layers * (attention + cache + ffn) + arch.vocab_size * q4 + predictor)


def contenders(options: argparse.Namespace, stack: ExitStack) -> dict[str, tuple[Contender, Path, float]]:
    """Name -> process, model, density."""
    found: dict[str, tuple[Contender, Path, float]] = {}
    context = options.prompt + options.decode + 8
    mine = {"backend": f"cpu:threads={options.threads}", "context": context}
    theirs = {"threads": options.threads, "context": context}
    first = options.directories[0]

    def add(name: str, kind: str, path: Path, density: float, **more: Any) -> None:
        found[name] = (stack.enter_context(Contender(kind, path, **more)), path, density)

    for engine in options.engines:
        if engine == "dense":
            add(engine, "pi2", dense_twin(first / "model"), 1.0, **mine)
        elif engine in PEERS:
            add(engine, engine, first / "model.gguf", 1.0, **theirs)
            found[engine] = (found[engine][0], first / "model", 1.0)  # whose sizes are counted
    for directory in options.directories:
        shape = json.loads(read_manifest(directory / "model").source["shape"])
        for engine in options.engines:
            if engine in SPARSE:
                predictor = "lowrank:max_loss=1" if engine == "lowrank" else "exact"
                name = f"{engine} {shape['density']:.0%}"
                add(name, "pi2", directory / "model", shape["density"], predictor=predictor, **mine)
    return found


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(rows: Rows, memory: list[float], running: Any, options: argparse.Namespace) -> dict[str, Any]:
    """By contender: speeds, share of the roofline, and ratios to the peers and to pi2's own dense decode."""

    def decode(name: str) -> list[float]:
        return [1 / statistics.mean(row["token_s"]) for row in rows[name]]

    def prefill(name: str) -> list[float]:
        return [options.prompt / row["prefill_s"] for row in rows[name]]

    report = {}
    context = options.prompt + options.decode // 2
    for name, (contender, model, density) in running.items():
        kv_item = contender.setup["kv_item_bytes"]
        needed = token_bytes(model, name.split()[0], density, context, kv_item)
        rate = [needed * speed / 1e9 for speed in decode(name)]
        report[name] = {
            "decode_tokens_s": spread(decode(name)),
            "fastest_token_s": min(min(row["token_s"]) for row in rows[name]),
            "prefill_tokens_s": spread(prefill(name)),
            "gb_per_token": needed / 1e9,
            "gb_s": spread(rate),
            "roofline": spread([r / m for r, m in zip(rate, memory, strict=True)]),
        }
        for other in ("dense", *PEERS):
            if other in rows and other != name:
                pairs = zip(decode(name), decode(other), strict=True)
                report[name][f"decode_over_{other}"] = spread([a / b for a, b in pairs])
                pairs = zip(prefill(name), prefill(other), strict=True)
                report[name][f"prefill_over_{other}"] = spread([a / b for a, b in pairs])
    return report


def main(options: argparse.Namespace) -> None:
    buffers = [np.ones(READ_BYTES, np.uint8) for _ in range(options.threads)]
    memory: list[float] = []
    with ExitStack() as stack:
        running = contenders(options, stack)
        vocab = architecture(options.directories[0] / "model").vocab_size
        ids = np.random.default_rng(0).integers(0, vocab, options.prompt + options.decode).tolist()
        rows: Rows = {name: [] for name in running}
        before = machine()
        for name, (contender, _, _) in running.items():  # warm, and the active sets to be given
            contender.run(ids, options.prompt, **_more(name))
        for _ in range(options.repeats):
            memory.append(read_speed(buffers))
            for name, (contender, _, _) in running.items():
                rows[name].append(contender.run(ids, options.prompt, **_more(name)))
        report = {
            "what": f"prefill of {options.prompt}, decode of {options.decode}, {options.threads} threads",
            "machine": before,
            "load_average_after": os.getloadavg(),
            "versions": versions(),
            "models": {str(d.name): read_manifest(d / "model").source["shape"] for d in options.directories},
            "setup": {name: contender.setup for name, (contender, _, _) in running.items()},
            "memory_read_gb_s": spread(memory),
            "summary": summary(rows, memory, running, options),
            "repeats": [{"memory_read_gb_s": memory[i]} | {n: r[i] for n, r in rows.items()}
                        for i in range(options.repeats)],
        }  # fmt: skip
    print(json.dumps(report, indent=1))


def _more(name: str) -> dict[str, bool]:
    return {"given": True} if name.startswith("given") else {}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directories", type=Path, nargs="+")
    parser.add_argument("--engines", nargs="+", default=["dense", *SPARSE, *PEERS])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--decode", type=int, default=24)
    main(parser.parse_args())
