"""Perplexity and exact zeros of a pi2 model on a text: ``python perplexity.py MODEL TEXT [TOKENS [CHUNK]]``.

The text is cut into chunks that each begin without context; every token but a chunk's first is predicted.
Prints one JSON object.  The figures in a model card come from here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from pi2.engine import Engine
from pi2.stats import versions


def losses(engine: Engine, ids: list[int], chunk: int) -> np.ndarray:
    """Negative log likelihood of every predicted token, in nats."""
    found = []
    for start in range(0, len(ids) - 1, chunk):
        part = ids[start : start + chunk]
        logits = engine.session().logits(part)[:-1].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        chosen = logits[np.arange(len(logits)), part[1:]]
        found.append(np.log(np.exp(logits).sum(axis=1)) - chosen)
    return np.concatenate(found)


def main(model: str, text: str, tokens: int = 2048, chunk: int = 512) -> None:
    with Engine.open(model, backend="numpy") as engine:
        ids = engine.tokenizer.encode(Path(text).read_text(), bos=False)[:tokens]
        nats = losses(engine, ids, chunk)
        count = engine.decoder.ffn_count
        result = {
            "model": model,
            "text": text,
            "tokens": len(ids),
            "chunk": chunk,
            "perplexity": float(np.exp(nats.mean())),
            "standard_error_nats": float(nats.std() / np.sqrt(len(nats))),
            "exact_zeros": 1 - count.active / count.total,
            "setup": engine.setup(),
            "versions": versions(),
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:5]))
