"""Tokens/s and agreement of sparse LM heads beside the exact one, in turns.

PYTHONPATH=tests python tests/benchmarks/sparse_head.py MODEL TEXT [--candidates 256,512] [--repeats 5]

MODEL needs the estimate of ``pi2 train-head``.  In every repeat each head decodes the same given tokens of
TEXT behind the same prompt (nothing is sampled); then every head is judged on the states of TEXT.  Use a
text that the estimate was not made of.  Prints one JSON object: every repeat, medians and extremes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from decode import machine, speeds
from pi2.engine import Engine
from pi2.sparse_head import judge_head, open_sparse_head
from pi2.stats import versions

PROMPT = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--candidates", default="256,512")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--judged", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--backend")
    options = parser.parse_args()
    with Engine.open(options.model, backend=options.backend) as engine:
        ids = engine.encode(options.text.read_text()[:20_000])[: PROMPT + options.tokens]
        sizes = [int(k) for k in options.candidates.split(",")]
        heads: dict[str, Any] = {"exact": None, **{str(k): open_sparse_head(engine, k) for k in sizes}}
        runs: dict[str, list[float]] = {name: [] for name in heads}
        for _ in range(options.repeats):
            for name, head in heads.items():
                engine.decoder.head = head
                session = engine.session()
                runs[name].append(speeds(session.forward, ids, PROMPT, "wall")["decode_tokens_s"])
        engine.decoder.head = None
        judged = [judge_head(engine, [options.text], k, options.judged).to_json() for k in sizes]
        result = {
            "machine": machine(),
            "versions": versions(),
            "config": {**vars(options), "text": str(options.text), **engine.setup()["config"]},
            "decode_tokens_s": {
                name: {"repeats": v, "median": statistics.median(v), "min": min(v), "max": max(v)}
                for name, v in runs.items()
            },
            "judged": judged,
        }
    print(json.dumps(result, indent=1, default=str))


if __name__ == "__main__":
    main()
