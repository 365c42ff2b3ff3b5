"""``pi2 train-head``: the low-rank estimate that ``--sparse-head`` needs."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from pi2.cli import options as o
from pi2.cli.output import human_bytes, print_json, print_table, say
from pi2.cli.progress import progress_bar

Rank = Annotated[
    int | None, typer.Option("--rank", min=1, help="Of the estimate; without it a third of d_model.")
]
Tokens = Annotated[int, typer.Option("--tokens", min=1, help="Use so many tokens at most.")]


def command(
    model: o.ModelArgument,
    texts: o.Texts,
    rank: Rank = None,
    tokens: Tokens = 5120,
    backend: o.Backend = None,
    storage: o.Storage = None,
    json: o.Json = False,
) -> None:
    """Make a low-rank estimate of the LM head, for --sparse-head.

    It goes into the model. A fifth of the text is only measured on: how often the token that the exact
    head finds likeliest is among the K best of the estimate.
    """
    from pi2.container import replace_file
    from pi2.container.head import HEAD
    from pi2.train_head import train_head

    start = time.perf_counter()
    with o.open_engine(model, backend=backend, storage=storage) as engine:
        with progress_bar(lambda n: f"{n} steps") as progress:
            estimate = train_head(engine, texts, rank=rank, tokens=tokens, progress=progress)
        replace_file(engine.model.path, HEAD, estimate.save)
    shares = {str(k): share for k, share in estimate.agreement.items()}
    if json:
        figures = {"rank": estimate.rank, "bytes": estimate.nbytes, "tokens": estimate.tokens}
        print_json({**figures, "agreement": shares, "seconds": time.perf_counter() - start})
        return
    print_table([["candidates", *shares], ["agreement", *(f"{share:.2%}" for share in shares.values())]])
    say(f"{human_bytes(estimate.nbytes)} of rank {estimate.rank}, measured on {estimate.tokens} tokens")
    say("next: pi2 run --sparse-head 512, or the number of candidates that is good enough")
