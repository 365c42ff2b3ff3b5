"""``pi2 place``: writes a model again, with neurons that fire together side by side."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from pi2.cli import options as o
from pi2.cli.output import human_bytes, print_json, say
from pi2.cli.progress import progress_bar
from pi2.errors import FormatError

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
    from pi2.container.layout import NEURONS
    from pi2.convert import convert
    from pi2.model_choice import find_model
    from pi2.placement import PlacedModel, place, write_placed
    from pi2.statistics_file import STATISTICS, Statistics

    start = time.perf_counter()
    tier = MmapTier.open()
    opened = open_model(find_model(model, o.installed_plugins()), tier)
    found = Statistics.of_file(opened.path / STATISTICS, opened.manifest.files[NEURONS].sha256)
    if found.counts is None or found.counts.sketch.tokens < 2:
        raise FormatError(
            f"{opened.path}: nothing is known of which neurons fire together",
            hint=f"count first: pi2 collect {shlex.quote(model)} TEXT...",
        )
    say("ordering the neurons")
    placement = place(found.counts)
    source = PlacedModel(opened, placement.orders)
    with progress_bar(human_bytes) as progress:
        convert(source, destination, source.plan(), progress, overwrite=force, page=opened.geometry.page)
    write_placed(opened, found, destination, placement.orders)
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
