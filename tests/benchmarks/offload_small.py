"""Decode of a real model with room for a share of its neurons: pi2, LLM in a Flash, all in memory, in turns.

python tests/benchmarks/offload_small.py MODEL TEXT [--share 0.5] [--predictor lowrank] [--repeats 3]

For models that are smaller than the least budget of a process, so that ``offload.py`` cannot limit their
memory: the neuron cache has so many slots, the rest of the process is not counted.  Every run decodes the
same tokens of TEXT behind a prompt (nothing is sampled); the first --settle fill the cache and do not count.
Prints one JSON object: every repeat, medians and extremes, and ratios within a repeat.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from decode import machine
from pi2.bench import MODES
from pi2.engine import Engine
from pi2.offload_options import OffloadOptions
from pi2.stats import versions

PROMPT = 64
NAMES = ("memory", "pipeline", "cache", "flash")
Found = dict[str, float]


def run(name: str, options: argparse.Namespace, slots: int) -> Found:
    """Tokens/s of one mode, and what it read."""
    offload = None
    if (changes := MODES[name].offload) is not None:
        offload = OffloadOptions(slots=slots, **changes)
    with Engine.open(options.model, predictor=options.predictor, context=2048, offload=offload) as engine:
        ids = engine.encode(options.text.read_text())[: PROMPT + options.settle + options.decode]
        session, counted = engine.session(), []
        session.forward(ids[:PROMPT])
        for at, token in enumerate(ids[PROMPT:]):
            if at == options.settle:
                start = time.perf_counter()
            session.forward([token])
            if engine.offloaded is not None:
                counted.append(engine.offloaded.take_count())
        seconds = time.perf_counter() - start
    found = {"tokens_s": options.decode / seconds}
    if last := counted[-options.decode :]:
        found["hit_rate"] = sum(c.present for c in last) / sum(c.wanted for c in last)
        found["reads_per_token"] = sum(c.stream.reads for c in last) / len(last)
        found["io_wait_share"] = sum(c.stream.wait_s for c in last) / seconds
    return found


def spread(values: list[float]) -> Found:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main(options: argparse.Namespace) -> None:
    with Engine.open(options.model) as engine:
        arch, setup = engine.model.architecture, engine.setup()["config"]
    slots = int(options.share * arch.n_layers * arch.n_neurons)
    repeats = [{name: run(name, options, slots) for name in NAMES} for _ in range(options.repeats)]
    result: dict[str, Any] = {
        "machine": machine(),
        "versions": versions(),
        "config": {**vars(options), "text": str(options.text), "slots": slots, **setup},
        "repeats": repeats,
    }
    for name in NAMES:
        result[name] = {key: spread([each[name][key] for each in repeats]) for key in repeats[0][name]}
        ratios = [each["pipeline"]["tokens_s"] / each[name]["tokens_s"] for each in repeats]
        result[name]["pipeline_over_it"] = spread(ratios)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--predictor", default="lowrank")
    parser.add_argument("--settle", type=int, default=64)
    parser.add_argument("--decode", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    main(parser.parse_args())
