"""``pi2 convert``: a GGUF file or a Hugging Face directory becomes a pi2 model."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from pi2.cli.options import installed_plugins, load_source
from pi2.cli.output import human_bytes, say
from pi2.cli.progress import progress_bar
from pi2.errors import OptionError

_FORMATS = "q4_0, q8_0, f16 or f32"

Source = Annotated[Path, typer.Argument(metavar="SRC", help="GGUF file, or directory with config.json.")]
Destination = Annotated[Path, typer.Argument(metavar="DST", help="Directory to make.")]
Quant = Annotated[str, typer.Option("--quant", help=f"Format of the weights: {_FORMATS}.")]
QuantEmbed = Annotated[str | None, typer.Option("--quant-embed", help="Of embedding and head, if different.")]
QuantAttention = Annotated[str | None, typer.Option("--quant-attention", help="Of attention, if different.")]
QuantDown = Annotated[str | None, typer.Option("--quant-down", help="Of down columns, if different.")]
Page = Annotated[
    int | None,
    typer.Option(
        "--page",
        help="Bundles take multiples of so many bytes: the flash's block (4096); 64 packs them.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace DST if it is a pi2 model.")]


def command(
    source: Source,
    destination: Destination,
    quant: Quant = "q8_0",
    quant_embed: QuantEmbed = None,
    quant_attention: QuantAttention = None,
    quant_down: QuantDown = None,
    page: Page = None,
    force: Force = False,
) -> None:
    """Convert a model.

    Memory stays at about one tensor. DST appears when it is complete; a conversion that was stopped
    continues when it is run again.
    """
    from pi2.bundle import LEAST_PAGE, PAGE
    from pi2.container import read_manifest
    from pi2.container.layout import QuantPlan
    from pi2.convert import convert

    page = PAGE if page is None else page
    if not LEAST_PAGE <= page <= 1 << 20 or page & (page - 1):
        hint = f"a power of two from {LEAST_PAGE} to {1 << 20}"
        raise OptionError(f"bundles cannot take multiples of {page} bytes", hint=hint)
    plan = QuantPlan.named(
        quant, embed=quant_embed, head=quant_embed, attention=quant_attention, down=quant_down
    )
    model = load_source(source, installed_plugins())
    start = time.perf_counter()
    with progress_bar(human_bytes) as progress:
        path = convert(model, destination, plan, progress, overwrite=force, page=page)
    manifest = read_manifest(path)
    total = sum(entry.nbytes for entry in manifest.files.values())
    for note in manifest.notes:
        say(f"note: {note}")
    say(f"{destination}: {human_bytes(total)} in {time.perf_counter() - start:.1f} s")
    say(f'next: pi2 run --model {shlex.quote(str(destination))} "Hello"')
