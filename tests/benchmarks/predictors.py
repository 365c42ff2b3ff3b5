"""Tokens/s of a pi2 model in memory with several predictors, in turns, beside the dense model.

python tests/benchmarks/predictors.py MODEL TEXT [--predictors exact lowrank lookahead oracle] [--repeats 5]

Decode of given tokens of a real text behind a prompt (nothing is sampled).  "dense" is the same weights
with SiLU in place of the model's activation: no zeros, so that every row of every matrix is read.
Prints one JSON object: every repeat, medians and extremes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

from decode import machine, summary
from pi2.decoder import Decoder
from pi2.engine import Engine
from pi2.stats import versions

DENSE = "dense"


def open_engine(options: argparse.Namespace, predictor: str) -> Engine:
    engine = Engine.open(
        options.model,
        backend=options.backend,
        predictor="exact" if predictor == DENSE else predictor,
        context=options.prompt + options.decode,
    )
    if predictor == DENSE:
        engine.model.architecture = dataclasses.replace(engine.model.architecture, activation="silu")
        engine.decoder = Decoder(engine.model, engine.backend, engine.decoder.predictor)
    return engine


def tokens_per_s(engine: Engine, ids: Any, prompt: int) -> dict[str, float]:
    decoder = engine.decoder
    cache = decoder.new_cache(len(ids))
    decoder.forward(ids[:prompt], cache)
    start = time.perf_counter()
    for at in range(prompt, len(ids)):
        decoder.forward(ids[at : at + 1], cache)
    return {"decode_tokens_s": (len(ids) - prompt) / (time.perf_counter() - start)}


def main(options: argparse.Namespace) -> None:
    import numpy as np

    engines = {name: open_engine(options, name) for name in [DENSE, *options.predictors]}
    first = engines[DENSE]
    text = options.text.read_text()
    ids = np.array(first.tokenizer.encode(text, special=False, bos=True), np.int64)
    ids = ids[: options.prompt + options.decode]
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    before = machine()
    for engine in engines.values():
        tokens_per_s(engine, ids[: options.prompt + 8], options.prompt)  # warm: pages, caches, bytecode
    for _ in range(options.repeats):
        for name, engine in engines.items():
            rows[name].append(tokens_per_s(engine, ids, options.prompt))
    report = {
        "what": f"decode of {options.decode} tokens behind {options.prompt}, weights in memory",
        "machine": before,
        "load_average_after": os.getloadavg(),
        "versions": versions(),
        "setup": {name: engine.setup() for name, engine in engines.items()},
        "medians": {name: summary(found) for name, found in rows.items()},
        "repeats": rows,
    }
    print(json.dumps(report, indent=1, default=str))
    for engine in engines.values():
        engine.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--predictors", nargs="+", default=["exact", "lowrank", "lookahead", "oracle"])
    parser.add_argument("--backend")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--decode", type=int, default=64)
    main(parser.parse_args())
