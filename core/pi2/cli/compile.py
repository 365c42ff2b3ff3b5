"""``pi2 compile``: makes a model ready for a device ahead of time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from pi2.cli import options as o
from pi2.cli.output import human_bytes, print_json, say
from pi2.cli.progress import progress_bar
from pi2.errors import OptionError

Backend = Annotated[
    str, typer.Option("--backend", help="For which backend: name, or name:key=value,key=value.")
]
Soc = Annotated[str | None, typer.Option("--soc", help="For which chip, where that is not this one: SM8650.")]
Out = Annotated[
    Path | None, typer.Option("--out", help="Folder to make [default: MODEL.BACKEND-SOC, right here].")
]
Hot = Annotated[
    float | None,
    typer.Option("--hot", help="Only this share of each FFN, as for run --hot; else the whole model."),
]


def command(
    model: o.ModelArgument,
    backend: Backend,
    soc: Soc = None,
    hot: Hot = None,
    hybrid: o.HybridDetails = None,
    out: Out = None,
    json: o.Json = False,
) -> None:
    """Make a model ready for a device ahead of time, here or on another machine.

    What was compiled stays when this is stopped: the same command goes on.
    """
    from pi2.accelerator import SupportsCompile
    from pi2.ahead import to_place
    from pi2.builtin.mmap_tier import MmapTier
    from pi2.container import open_model
    from pi2.engine import parse_choice
    from pi2.model_choice import find_model

    start, plugins = time.perf_counter(), o.installed_plugins()
    name, options = parse_choice(backend)
    chosen = plugins.pick("backends", name)
    name = str(chosen.name)
    if not issubclass(chosen, SupportsCompile):
        raise OptionError(f"{name} compiles nothing ahead of time", hint="it needs no pi2 compile")
    if soc is not None:
        options["soc"] = soc
    shared = o.parse_hybrid(name, None, hot, hybrid, None)
    where = f"{Path(model).name}.{'-'.join(filter(None, (name, soc)))}"
    destination = Path(where) if out is None else out
    tier, notes = MmapTier.open(), list[str]()
    opened = open_model(find_model(model, plugins), tier)
    weights = to_place(opened, shared, notes)
    for note in notes:
        say(f"warning: {note}")
    with progress_bar(lambda n: f"{n} weights") as progress:
        made = chosen.compile(weights, destination, options, progress)
    opened.close()
    tier.close()
    if json:
        print_json({"path": str(destination), **made})
        return
    size = sum(file.stat().st_size for file in destination.rglob("*") if file.is_file())
    say(f"{destination}: {human_bytes(size)} in {time.perf_counter() - start:.1f} s; use it with")
    say(f"  --backend {made['use']}")
