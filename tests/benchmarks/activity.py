"""How sparse a ReLU model really is: density, skew and overlap of its active neurons on a text.

python tests/benchmarks/activity.py MODEL TEXT [--tokens 4096] [--density 0.1]

Every figure is given for the gates as they are, and for a threshold per FFN that leaves the share
``--density`` of the (token, neuron) pairs above it (FATReLU): so a measure can be carried from a model of
one density over to another.  Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pi2.activity import gate_values
from pi2.engine import Engine

LAGS = (1, 2, 4, 8, 16, 32, 64)
TOP = (0.1, 0.2, 0.5)
Figures = dict[str, Any]


def gates(engine: Engine, ids: list[int]) -> list[NDArray[np.float32]]:
    """The value before the activation of every neuron, (tokens, neurons) float32, one array an FFN."""
    inputs: dict[int, list[NDArray[np.float32]]] = {}
    engine.decoder.observer = lambda ffn, x: inputs.setdefault(ffn, []).append(x.copy())
    engine.session().forward(ids)
    engine.decoder.observer = None
    return [gate_values(engine.model, ffn, np.concatenate(inputs[ffn])) for ffn in sorted(inputs)]


def figures(active: NDArray[np.bool_]) -> Figures:
    """Of one FFN, from (tokens, neurons), tokens in the order of the text."""
    often = np.sort(active.mean(axis=0))[::-1]  # frequency of each neuron
    per_token = active.mean(axis=1)
    total = max(often.sum(), 1e-12)
    return {
        "density": float(often.mean()),
        # how much the active share differs from token to token
        "density_spread": float(per_token.std() / max(per_token.mean(), 1e-12)),
        "top": {str(share): float(often[: round(share * len(often))].sum() / total) for share in TOP},
        # were tokens independent, a token's active neurons would be active in another one with this share
        "overlap_independent": float((often**2).sum() / total),
        "overlap": {
            str(lag): float((active[lag:] & active[:-lag]).sum() / max(active[lag:].sum(), 1))
            for lag in LAGS
            if lag < len(active)
        },
    }


def mean(rows: list[Figures]) -> Figures:
    """Figure by figure, over FFNs."""
    first = rows[0]
    return {
        key: mean([row[key] for row in rows])
        if isinstance(first[key], dict)
        else float(np.mean([row[key] for row in rows]))
        for key in first
    }


def measure(values: list[NDArray[np.float32]], density: float | None = None) -> Figures:
    """Mean over FFNs and each of them; ``density``: above a threshold that leaves this share active."""
    cuts = [0.0 if density is None else np.quantile(v, 1 - density) for v in values]
    rows = [figures(v > cut) for v, cut in zip(values, cuts, strict=True)]
    return {"mean": mean(rows), "density_by_ffn": [row["density"] for row in rows]}


def main(options: argparse.Namespace) -> None:
    with Engine.open(options.model) as engine:
        ids = engine.encode(options.text.read_text())[: options.tokens]
        values = gates(engine, ids)
        report = {
            "model": engine.model.path.name,
            "text": options.text.name,
            "tokens": len(ids),
            "as_it_is": measure(values),
            f"cut_to_{options.density:g}": measure(values, options.density),
        }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--density", type=float, default=0.1)
    main(parser.parse_args())
