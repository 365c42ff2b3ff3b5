"""Perplexity against density of the thresholds in a pi2 model, on held-out texts.

python tests/benchmarks/threshold.py MODEL TEXT... [--tokens 2048] [--speed 64]

The model must be calibrated (``pi2 collect MODEL TEXT``) on other texts.  Perplexity in sequences of 512
tokens, FFNs in float32; with --speed also tokens/s of decoding so many tokens on the default backend, in
turns, three times.  Prints one JSON object; published and earlier figures stand beside the new ones.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from pi2.builtin.threshold_predictor import model_thresholds
from pi2.decoder import Decoder
from pi2.engine import Engine
from pi2.evaluate import Likelihood
from pi2.kv_cache import KvCache
from pi2.probed_backend import ProbedBackend
from pi2.stats import versions
from pi2.thresholds import Choice

SEQUENCE = 512
DENSITIES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
REFERENCES = {
    "TEAL, Llama-3-8B, all matrices (arXiv 2408.14690): density -> loss": {"0.6": 0.058, "0.5": 0.136},
    "SmolLM2-135M, |act(gate) * up|, the same share in every layer: density -> loss (wiki, book)": {
        "0.7": [0.004, 0.005], "0.5": [0.034, 0.033], "0.3": [0.172, 0.165]},
    "SmolLM2-135M, |act(gate)| (CATS), the same share in every layer: density -> loss (wiki, book)": {
        "0.7": [0.088, 0.057], "0.5": [0.40, 0.257]},
}  # fmt: skip


class Cutter:
    """Leaves out what is below the cuts, and counts what is not."""

    def __init__(self, rule: str, choice: Choice, weights: np.ndarray[Any, Any]) -> None:
        self.rule, self.choice, self.weights = rule, choice, weights
        self.kept = self.seen = 0

    def __call__(self, ffn: int, gate: Any, other: Any, h: Any) -> Any:
        scores = np.abs(h) if self.rule == "product" else np.abs(gate) * self.weights[ffn]
        out = scores < self.choice.cuts[ffn]
        h[out] = 0
        self.kept += out.size - int(out.sum())
        self.seen += out.size
        return h


def perplexity(engine: Engine, ids: list[int], visit: Any) -> float:
    backend = ProbedBackend(visit)
    decoder = Decoder(engine.model, backend, engine.decoder.predictor)
    likelihood = Likelihood()
    for start in range(0, len(ids) - 1, SEQUENCE):
        part = np.array(ids[start : start + SEQUENCE], np.int64)
        logits = decoder.forward(part, KvCache(decoder.arch, len(part)), all_logits=True)
        likelihood.add(logits[:-1], part[1:])
    return likelihood.perplexity


def curves(engine: Engine, text: Path, tokens: int) -> dict[str, Any]:
    found = model_thresholds(engine.model)
    ids = engine.tokenizer.encode(text.read_text(), bos=False)[:tokens]
    dense = perplexity(engine, ids, lambda ffn, gate, other, h: h)
    print(f"{text.name}: dense {dense:.3f}", file=sys.stderr, flush=True)
    result: dict[str, Any] = {"tokens": len(ids), "dense_perplexity": dense}
    for rule, curve in found.curves.items():
        points = []
        for density in DENSITIES:
            if density < curve.densities[curve.judged - 1] - 1e-9:
                break
            choice = curve.at_density(density)
            cutter = Cutter(rule, choice, found.weights)
            got = perplexity(engine, ids, cutter)
            points.append(
                {"density": density, "measured_density": cutter.kept / cutter.seen, "perplexity": got,
                 "loss": got / dense - 1, "stated_loss": choice.loss}
            )  # fmt: skip
            print(f"{text.name}: {rule} {json.dumps(points[-1])}", file=sys.stderr, flush=True)
        result[rule] = points
    return result


def decode_speed(model: str, predictor: str, tokens: int) -> float:
    with Engine.open(model, predictor=predictor) as engine:
        session = engine.session()
        session.forward(engine.encode("The history of the town begins with a bridge over the river"))
        start = time.perf_counter()
        for token in range(1000, 1000 + tokens):
            session.forward([token])
        return tokens / (time.perf_counter() - start)


def speeds(model: str, tokens: int) -> dict[str, Any]:
    predictors = ("exact", "threshold", "threshold:rule=gate", "threshold:density=0.4,max_loss=9")
    repeats: dict[str, list[float]] = {p: [] for p in predictors}
    for _ in range(3):
        for predictor, rates in repeats.items():
            rates.append(decode_speed(model, predictor, tokens))
    medians = {p: statistics.median(rates) for p, rates in repeats.items()}
    return {"tokens_s": repeats, "median_tokens_s": medians}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--speed", type=int, default=0)
    asked = parser.parse_args()
    with Engine.open(asked.model) as engine:
        found = model_thresholds(engine.model)
        stated = {rule: {"density": c.at_loss(0.01).density, "stated_loss": c.at_loss(0.01).loss}
                  for rule, c in found.curves.items()}  # fmt: skip
        result = {
            "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
            "versions": versions(), "setup": engine.setup(), "sequence": SEQUENCE,
            "calibrated_on_tokens": found.tokens, "at_1_percent": stated,
            "texts": {text.name: curves(engine, text, asked.tokens) for text in asked.texts},
            "beside": REFERENCES,
        }  # fmt: skip
    if asked.speed:
        result["speed"] = speeds(asked.model, asked.speed)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
