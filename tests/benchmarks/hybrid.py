"""Decode of a model on the CPU alone, and with a share of every FFN on an accelerator beside it, in turns.

PYTHONPATH=tests python tests/benchmarks/hybrid.py [MODEL] [--backend opencl] [--hot 0.1 0.5] [--repeats 5]

Where both halves share the cores, as with OpenCL on a CPU, the hybrid cannot be faster: then this measures
what the split costs, and how much of the time both halves computed.  Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import ExitStack

import numpy as np
from decode import machine, summary
from pi2.engine import Engine
from pi2.hybrid import HybridOptions
from pi2.stats import versions

_SEED = 5


def ids_of(engine: Engine, n: int) -> list[int]:
    """The same ``n`` tokens for every contender."""
    rng = np.random.default_rng(_SEED)
    return [int(token) for token in rng.integers(0, engine.model.architecture.vocab_size, n)]


def measure(engine: Engine, prompt: int, tokens: int) -> dict[str, float]:
    """Decoded tokens a second, and seconds of the halves per token (zero where there are none)."""
    ids = ids_of(engine, prompt + tokens)
    session = engine.session()
    session.forward(ids[:prompt])
    names = ("hot_s", "cold_s", "overlap_s", "wait_s")
    count = None if engine.hybrid is None else engine.hybrid.count
    before = {name: getattr(count, name, 0.0) for name in names}
    start = time.perf_counter()
    for token in ids[prompt:]:
        session.forward([token])
    seconds = time.perf_counter() - start
    halves = {name: (getattr(count, name, 0.0) - before[name]) / tokens for name in names}
    return {"decode_tokens_s": tokens / seconds, **halves}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", help="directory or name; without it the only installed one")
    parser.add_argument("--backend", default="opencl")
    parser.add_argument("--cold", default="cpu", help="beside it, and alone")
    parser.add_argument("--hot", type=float, nargs="+", default=[0.1, 0.5])
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with ExitStack() as stack:
        engines = {"cpu only": stack.enter_context(Engine.open(options.model, backend=options.cold))}
        for share in options.hot:
            shared = HybridOptions(share)
            engine = Engine.open(options.model, backend=options.backend, cold=options.cold, hybrid=shared)
            engines[f"hot {share:g}"] = stack.enter_context(engine)
            if engine.setup()["emulated"]:
                parser.error(f"{options.backend} is emulated: its time says nothing of the device's")
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
        for _ in range(options.repeats):
            for name, engine in engines.items():
                rows[name].append(measure(engine, options.prompt, options.tokens))
        setups = {name: engine.setup() for name, engine in engines.items()}
    figures = {
        "machine": machine(),
        "versions": versions(),
        "options": vars(options),
        "setups": setups,
        "results": {name: summary(each) for name, each in rows.items()},
        "repeats": rows,
    }
    print(json.dumps(figures, indent=1, default=str))


if __name__ == "__main__":
    main()
