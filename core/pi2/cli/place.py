"""``pi2 place``: writes a model again, with neurons that fire together side by side."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from pi2.cli import options as o
from pi2.cli.output import human_bytes, print_json, say
from pi2.cli.progress import progress_bar

Destination = Annotated[Path, typer.Argument(metavar="DST", help="Directory to make.")]
Force = Annotated[bool, typer.Option("--force", help="Replace DST if it is a pi2 model.")]


def command(
    model: o.ModelArgument, destination: Destination, force: Force = False, json: o.Json = False
) -> None:
    """Write a model again, with neurons that fire together side by side on flash.

    So reads of neighbours merge when the model runs offloaded. The order comes from statistics that pi2
    collect put into the model; statistics and predictors go along. The weights stay the same, bit for bit.
    """
    from pi2.builtin.mmap_tier import MmapTier
    from pi2.container import open_model
    from pi2.model_choice import find_model
    from pi2.placement import place_model

    start = time.perf_counter()
    tier = MmapTier.open()
    opened = open_model(find_model(model, o.installed_plugins()), tier)
    with progress_bar(human_bytes) as progress:
        placement = place_model(opened, destination, progress, overwrite=force)
    opened.close()
    tier.close()
    if json:
        print_json({"reads_before": placement.reads_before, "reads_after": placement.reads_after})
        return
    say(
        f"reads a token and layer, half of the neurons being resident: {placement.reads_before:.1f} before,"
        f" {placement.reads_after:.1f} after (estimated on tokens that the order was not made from)"
    )
    say(f"{destination}: done in {time.perf_counter() - start:.1f} s")
