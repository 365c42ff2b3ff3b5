"""``pi2 eval``: what a predictor is worth on a model and a text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pi2.cli import options as o
from pi2.cli.output import print_json, print_table, say
from pi2.cli.progress import progress_bar

if TYPE_CHECKING:
    from pi2.engine import Engine
    from pi2.evaluate import Evaluation, LayerScore

Sequence = Annotated[
    int | None,
    typer.Option("--sequence", min=2, help="Tokens of a sequence of the text; without it at most 256."),
]
EvalTokens = Annotated[int, typer.Option("--tokens", min=1, help="Use so many tokens at most.")]
Against = Annotated[
    Literal["dense", "nothing"], typer.Option("--against", help="Compare with the dense model, or do not.")
]


def command(
    model: o.ModelArgument,
    texts: o.Texts,
    predictor: o.Predictor = None,
    against: Against = "dense",
    tokens: EvalTokens = 2048,
    sequence: Sequence = None,
    backend: o.Backend = None,
    storage: o.Storage = None,
    memory: o.Memory = None,
    policy: o.Policy = None,
    hot: o.Hot = None,
    cold: o.Cold = None,
    hybrid: o.HybridDetails = None,
    offload: o.OffloadDetails = None,
    sparse_head: o.SparseHead = None,
    json: o.Json = False,
) -> None:
    """Judge a predictor on text: perplexity, agreement with the dense model, recall, cost.

    The text is read one token at a time, as in decoding, where the predictor is asked, and again with
    every neuron: the dense model; on the CPU, with the weights as they are, if the backend rounds them.
    Active is what a gate in float32 says: a backend that rounds to int8 decides otherwise near zero.
    With --memory the judge needs memory of its own on top of the budget: it decodes whole matrices.
    --sparse-head is judged beside the exact head, on the same tokens; all else is with the exact head.
    """
    from pi2.evaluate import evaluate
    from pi2.sparse_head import judge_head, open_sparse_head

    shared = o.parse_hybrid(backend, cold, hot, hybrid)
    placement = o.parse_offload(memory, policy, hot, offload, hybrid=shared)
    with (
        o.open_engine(
            model,
            backend=backend,
            storage=storage,
            predictor=predictor,
            offload=placement,
            hybrid=shared,
            cold=cold,
        ) as engine,
        _exact(engine) as exact,
    ):
        if sparse_head is not None:
            open_sparse_head(engine, sparse_head)  # now, if it cannot be, and not after minutes
        with progress_bar(lambda n: f"{n} tokens") as progress:
            found = evaluate(
                engine, texts, tokens=tokens, sequence=sequence,
                against_dense=against == "dense", exact=exact, progress=progress,
            )  # fmt: skip
        setup = engine.setup()
        head = None if sparse_head is None else judge_head(engine, texts, sparse_head, tokens)
    for loss in setup["config"].get("losses", ()):
        say(f"lossy: {loss}")
    if json:
        print_json({**describe(found, setup), "sparse_head": head and head.to_json()})
    else:
        _print(found, setup)
        if head is not None:
            print_table(head.table())


@contextmanager
def _exact(engine: Engine) -> Iterator[Engine | None]:
    """The same model with its weights as they are, if the engine's backend rounds them."""
    if not engine.rounded:
        yield None
        return
    with o.open_engine(str(engine.model.path), predictor="exact", context=engine.context) as exact:
        yield exact


def describe(found: Evaluation, setup: dict[str, Any]) -> dict[str, Any]:
    """The object of ``--json``.  No figures of speed where a device was emulated."""
    dense, timed = found.dense, not setup["emulated"]
    return {
        "sequence": found.sequence,
        "sequences": found.sequences,
        "scored_tokens": found.scored,
        "perplexity": _finite(found.sparse.perplexity),
        "dense_perplexity": None if dense is None else _finite(dense.perplexity),
        "perplexity_loss": None if found.loss is None else _finite(found.loss),
        "perplexity_loss_error": None if found.loss_error is None else _finite(found.loss_error),
        "agreement": found.agreement,
        "tokens_per_s": _rate(found) if timed else None,
        **_figures(found.overall(), timed=timed),
        "predictor_bytes": found.overall().nbytes,
        "layers": [
            {
                "layer": layer,
                **_figures(score, timed=timed),
                "width": score.width,
                "predictor_bytes": score.nbytes,
            }
            for layer, score in enumerate(found.layers)
        ],
        **setup,
    }


def _figures(score: LayerScore, *, timed: bool) -> dict[str, float | None]:
    """``predictor_s``: seconds of one call, which is one token in one layer."""
    return {
        "density": score.density,
        "predicted_density": score.predicted_density,
        "recall": score.recall,
        "precision": score.precision,
        "predictor_s": score.seconds / score.calls if timed else None,
    }


def _rate(found: Evaluation) -> float:
    return found.layers[0].calls / found.seconds


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _print(found: Evaluation, setup: dict[str, Any]) -> None:
    overall, timed = found.overall(), not setup["emulated"]
    trained = overall.nbytes > 0
    rows = [["layer", "density", "predicted", "recall", "precision", "predictor"]]
    rows[0] += ["width", "bytes"] if trained else []
    named = [*((str(i), s) for i, s in enumerate(found.layers)), ("mean", overall)]
    for name, score in named:
        shares = [f"{k:.2%}" for k in (score.density, score.predicted_density, score.recall, score.precision)]
        rows.append([name, *shares, f"{score.seconds / score.calls * 1e6:.0f} us" if timed else "-"])
        if trained:
            rows[-1] += [str(score.width or "-"), str(score.nbytes)]
    rows[-1][0] = "all" if trained else "mean"
    print_table(rows)
    print()
    lines = [
        ("predictor", setup["config"]["parts"]["predictor"]),
        ("lossless", "yes" if setup["lossless"] else f"no: {'; '.join(setup['config']['losses'])}"),
        ("tokens", f"{found.scored} foreseen, {found.sequences} sequences of {found.sequence}"),
        ("perplexity", f"{found.sparse.perplexity:.4f}"),
    ]
    if found.dense is not None:
        lost = f"lost {found.loss:+.3%} ± {found.loss_error:.3%}"
        lines.append(("dense", f"{found.dense.perplexity:.4f}, {lost}"))
        lines.append(("agreement", f"{found.agreement:.2%} of the likeliest tokens"))
    if timed:
        lines.append(("speed", f"{_rate(found):.1f} tokens/s on {setup['backend']}"))
    print_table(lines)
