"""``pi2 relufy``: the ReLU twin of a SiLU or GELU model."""

from __future__ import annotations

import contextlib
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pi2.cli import options as o
from pi2.cli.output import human_bytes, print_json, print_table, say
from pi2.cli.progress import progress_bar
from pi2.errors import BudgetError, OptionError

if TYPE_CHECKING:
    from pi2.api import ModelSource
    from pi2.relufy import Settings
    from pi2.relufy.run import Relufication

_FORMATS = "q4_0, q8_0, f16 or f32"

Source = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="pi2 model, GGUF file, or directory of Hugging Face's, with SiLU or GELU."
    ),
]
Texts = Annotated[
    list[Path],
    typer.Argument(
        metavar="TEXT...", help='UTF-8 files to train on, or .jsonl with {"messages": [...]} a line.'
    ),
]
Destination = Annotated[Path, typer.Argument(metavar="DST", help="Directory to make: a pi2 model.")]
From = Annotated[
    str | None,
    typer.Option("--from", metavar="TWIN", help="Train this twin of MODEL further, instead of making one."),
]
Tokens = Annotated[
    int | None, typer.Option("--tokens", min=1, help="Train on so many tokens [300000, without --minutes].")
]
Minutes = Annotated[float | None, typer.Option("--minutes", help="Train for so long, over all runs.")]
Density = Annotated[float, typer.Option("--density", help="Share of active neurons to train towards.")]
Quant = Annotated[str, typer.Option("--quant", help=f"Format of the twin's weights: {_FORMATS}.")]
QuantEmbed = Annotated[str | None, typer.Option("--quant-embed", help="Of embedding and head, if different.")]
QuantAttention = Annotated[str | None, typer.Option("--quant-attention", help="Of attention, if different.")]
QuantDown = Annotated[str | None, typer.Option("--quant-down", help="Of down columns, if different.")]
Shares = Annotated[
    str | None,
    typer.Option("--shares", metavar="S,S,...", help="Share of each text; without it all the same."),
]
RefitTokens = Annotated[
    int, typer.Option("--refit-tokens", min=0, help="Tokens of the closed-form refit; 0 leaves it out.")
]
HeldOut = Annotated[int, typer.Option("--held-out", help="Tokens to measure on, never trained on.")]
Sequence = Annotated[int, typer.Option("--sequence", help="Tokens of a step.")]
LearningRate = Annotated[float, typer.Option("--lr", help="Learning rate.")]
TextWeight = Annotated[
    float, typer.Option("--text-weight", help="Of the plain texts themselves, beside MODEL's words on them.")
]
BFloat16 = Annotated[
    bool, typer.Option("--bf16", help="Multiply in bfloat16: faster where the processor does that.")
]
Workers = Annotated[
    int,
    typer.Option(
        "--workers", min=1, help="Steps at the same time: faster where cores are shared, not repeatable."
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads of each worker.")]
Seed = Annotated[int, typer.Option("--seed", help="Of what is drawn from the texts.")]
Force = Annotated[bool, typer.Option("--force", help="Replace DST if it is a pi2 model.")]
Restart = Annotated[bool, typer.Option("--restart", help="Forget the training that was begun for DST.")]
Keep = Annotated[
    bool, typer.Option("--keep", help="Keep the checkpoint: more --tokens with --force go on from it.")
]


def command(
    source: Source,
    texts: Texts,
    destination: Destination,
    start: From = None,
    tokens: Tokens = None,
    minutes: Minutes = None,
    density: Density = 0.25,
    quant: Quant = "q8_0",
    quant_embed: QuantEmbed = None,
    quant_attention: QuantAttention = None,
    quant_down: QuantDown = None,
    shares: Shares = None,
    refit_tokens: RefitTokens = 16_384,
    held_out: HeldOut = 2048,
    sequence: Sequence = 256,
    lr: LearningRate = 1.5e-4,
    text_weight: TextWeight = 0.0,
    bf16: BFloat16 = False,
    workers: Workers = 1,
    threads: Threads = None,
    seed: Seed = 0,
    force: Force = False,
    restart: Restart = False,
    keep: Keep = False,
    json: o.Json = False,
) -> None:
    """Make the ReLU twin of a SiLU or GELU model.

    W_down is refitted in closed form; then the twin is distilled from the original, with a push
    towards zeros and its weights rounded as --quant stores them. Perplexity before and after is of text
    that was held out. Ctrl-C keeps what is done in DST.training: the same command goes on.
    """
    from pi2.container.layout import QuantPlan
    from pi2.relufy import Settings, open_relufication

    settings = Settings(
        tokens=300_000 if tokens is None and minutes is None else tokens, minutes=minutes, density=density,
        quant=QuantPlan.named(
            quant, embed=quant_embed, head=quant_embed, attention=quant_attention, down=quant_down
        ),
        shares=parse_shares(shares), refit_tokens=refit_tokens, held_out=held_out, sequence=sequence,
        lr=lr, text_weight=text_weight, bf16=bf16, workers=workers, threads=threads, seed=seed,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(_open_source(source))
        twin = None if start is None else stack.enter_context(_open_source(start))
        _check_memory(model, settings)
        run = stack.enter_context(
            open_relufication(
                model, texts, destination, settings, start=twin, overwrite=force, restart=restart
            )
        )
        _run(run, keep=keep)
    if json:
        print_json({"path": str(destination), **run.report.to_dict()})
        return
    _print(run)
    say(f'next: pi2 run --model {shlex.quote(str(destination))} "Hello"')


def _run(run: Relufication, *, keep: bool) -> None:
    """All phases, each with a bar of its own."""
    try:
        with progress_bar(lambda n: f"{n} tokens") as progress:
            run.compare(progress)
        with progress_bar(lambda n: f"{n} layers") as progress:
            run.refit(progress)
        with progress_bar(lambda n: f"{n / 10:.1f} %") as progress, _deferred_interrupt() as stopped:
            if not run.distil(progress, stopped):
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        say(f"\nstopped after {run.report.tokens} tokens; the same command goes on")
        raise
    with progress_bar(human_bytes) as progress:
        run.write(progress, keep=keep)


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C waits for the end of a step, so that nothing is lost; a second one does not wait."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        say("\nstopping behind this step; Ctrl-C again stops at once, and loses what is not saved")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def parse_shares(text: str | None) -> tuple[float, ...]:
    """``"0.4,0.6"`` -> (0.4, 0.6).  Raises OptionError."""
    try:
        return () if text is None else tuple(float(share) for share in text.split(","))
    except ValueError:
        raise OptionError(
            f"--shares takes numbers, not {text!r}", hint="for example --shares 0.4,0.6"
        ) from None


@contextlib.contextmanager
def _open_source(text: str) -> Iterator[ModelSource]:
    """A pi2 model by directory or name, or what ``pi2 convert`` reads."""
    from pi2.builtin.mmap_tier import MmapTier
    from pi2.container import open_model
    from pi2.model_choice import MANIFEST, find_model
    from pi2.relufy.sources import PiModelSource

    plugins, path = o.installed_plugins(), Path(text).expanduser()
    if text not in plugins.models and path.exists() and not (path / MANIFEST).is_file():
        yield o.load_source(path, plugins)
        return
    with contextlib.closing(MmapTier()) as tier:
        yield PiModelSource(open_model(find_model(text, plugins), tier))


def _check_memory(model: ModelSource, settings: Settings) -> None:
    """Raise BudgetError unless there is room for the training."""
    from pi2.cli.machine import Machine
    from pi2.relufy.memory import training_bytes

    needed, machine = training_bytes(model.architecture, settings), Machine.here()
    limit = machine.cgroup_limit_bytes
    free = machine.memory_available_bytes if limit is None else min(limit, machine.memory_available_bytes)
    if needed > free:
        raise BudgetError(
            f"the training takes about {human_bytes(needed)} of memory, {human_bytes(free)} are free",
            hint="fewer --workers, a shorter --sequence, or a machine with more memory",
        )


def _print(run: Relufication) -> None:
    from pi2.relufy.report import STAGES

    report = run.report
    names = [text["name"] for text in report.texts]
    rows = [["", "perplexity", *names, "exact zeros"]]
    for stage, label in STAGES.items():
        if found := report.stages.get(stage):
            shares = [f"{found['by_text'][name]:.2f}" for name in names]
            rows.append([label, f"{found['perplexity']:.2f}", *shares, f"{found['zeros']:.1%}"])
    print_table(rows)
    print()
    lines = [
        ("held out", f"{report.held_out_tokens} tokens"),
        ("trained", f"{report.tokens} tokens in {report.steps} steps, {report.train_s / 60:.1f} min"),
    ]
    if report.lost_steps:
        lines.append(("lost", f"{report.lost_steps} steps had no finite gradient"))
    print_table(lines)
