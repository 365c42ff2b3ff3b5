"""Whether a generated model behaves as it was made: on text that it decodes itself."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import activity
import numpy as np
from numpy.typing import NDArray
from pi2.activation_counts import ActivationCounts
from pi2.activity import gate_values
from pi2.activity_sketch import ActivitySketch
from pi2.api import Backend, Predictor
from pi2.builtin.lowrank_predictor import LowRankPredictor
from pi2.container.layout import NEURONS
from pi2.container.predictors import model_predictors
from pi2.engine import Engine
from pi2.sampling import Sampling
from pi2.statistics_file import Statistics

F32 = NDArray[np.float32]


def check(path: Path, *, prompt: int = 128, tokens: int = 256, backend: str | None = None) -> dict[str, Any]:
    """Decode ``tokens`` sampled tokens behind ``prompt`` random ones; what the FFNs saw meanwhile."""
    with Engine.open(path, backend=backend, context=prompt + tokens) as engine:
        ids = np.random.default_rng(1).integers(0, engine.model.architecture.vocab_size, prompt).tolist()
        inputs, generated, seconds = decoded_inputs(engine, ids, tokens)
        values = [gate_values(engine.model, ffn, x) for ffn, x in enumerate(inputs)]
        active = np.stack([(v > 0).mean(axis=1) for v in values]).mean(axis=0)  # (tokens,)
        return {
            "model": dict(engine.model.manifest.source),
            "tokens": {"decoded": len(generated), "distinct": len(set(generated)), "seconds": seconds},
            "activity": activity.measure(values),
            "density_spread_of_tokens": float(active.std() / active.mean()),
            "density_p99_to_mean": float(np.quantile(active, 0.99) / active.mean()),
            "predictor": judge(engine, inputs, values),
        }


def decoded_inputs(engine: Engine, ids: list[int], tokens: int) -> tuple[list[F32], list[int], float]:
    """The input of every FFN for every decoded token, (tokens - 1, d) each; the tokens; seconds."""
    inputs: dict[int, list[F32]] = {}

    def observe(ffn: int, x: F32) -> None:
        if len(x) == 1:
            inputs.setdefault(ffn, []).append(x[0].copy())

    engine.decoder.observer = observe
    generation = engine.generate(ids, Sampling(max_tokens=tokens, temperature=1.0, seed=1))
    for _ in generation:
        pass
    engine.decoder.observer = None
    stats = generation.stats
    return [np.stack(inputs[ffn]) for ffn in sorted(inputs)], stats.tokens, sum(stats.token_times_s)


def statistics(path: Path, tokens: int, sequence: int = 512) -> Statistics:
    """What ``pi2 collect`` counts, on random tokens: the made-up words of the vocabulary cannot be typed.

    Sequences are long, since attention averages little at the beginning of a text: gates vary more there,
    and are more often open.
    """
    sequence, rng = min(sequence, tokens), np.random.default_rng(2)
    with Engine.open(path, context=sequence) as engine:
        arch, texts = engine.model.architecture, max(1, tokens // sequence)
        counts = ActivationCounts.empty(
            engine.model.manifest.files[NEURONS].sha256, arch.n_layers, arch.n_neurons,
            sequence=sequence, batches=(1,),
        )  # fmt: skip
        inputs: dict[int, list[F32]] = {}
        engine.decoder.observer = lambda ffn, x: inputs.setdefault(ffn, []).append(x.copy())
        for _ in range(texts):
            engine.session().forward(rng.integers(0, arch.vocab_size, sequence).tolist())
        text, sets = hashlib.sha256(b"random tokens 2").hexdigest(), []
        for ffn in range(arch.n_layers):
            active = gate_values(engine.model, ffn, np.concatenate(inputs.pop(ffn))) > 0
            counts.add(ffn, active.reshape(texts, sequence, arch.n_neurons))
            sets.append(np.packbits(active, axis=1))
        counts.sketch = ActivitySketch.of_tokens(text, 0, np.stack(sets), arch.n_neurons)
        counts.finish_group(text, texts)
    return Statistics(counts)


def judge(engine: Engine, inputs: list[F32], values: list[F32]) -> dict[str, Any]:
    """Recall, precision and cost of the model's own low-rank predictor, asked token by token."""
    backend: Backend = engine.decoder._backend
    predictor: Predictor = LowRankPredictor(max_loss=1.0)
    predictor.attach(engine.model, backend)
    recall, precision, density, seconds = [], [], [], []
    for ffn, (x, value) in enumerate(zip(inputs, values, strict=True)):
        start = time.perf_counter()
        named = [predictor.predict(ffn, np.ascontiguousarray(row[None])) for row in x]
        seconds.append((time.perf_counter() - start) / len(x))
        found = np.zeros(value.shape, np.bool_)
        for row, ids in zip(found, named, strict=True):
            row[slice(None) if ids is None else ids] = True
        active = value > 0
        both = (found & active).sum()
        recall.append(float(both / max(active.sum(), 1)))
        precision.append(float(both / max(found.sum(), 1)))
        density.append(float(found.mean()))
    predictor.close()
    weights = model_predictors(engine.model.path, engine.model.architecture)
    return {
        "recall": float(np.mean(recall)),
        "precision": float(np.mean(precision)),
        "density": float(np.mean(density)),
        "recall_by_ffn": recall,
        "precision_by_ffn": precision,
        "bytes": weights.nbytes,
        "share_of_model": weights.nbytes / engine.model.nbytes,
        "ms_per_token": 1e3 * sum(seconds),
    }
