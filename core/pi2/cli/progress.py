"""How far a long command has come, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pi2.cli.output import say

Show = Callable[[str, int, int], None]
_STEP = 0.1  # of the whole, between two plain lines


@contextmanager
def progress_bar(amount: Callable[[int], str]) -> Iterator[Show]:
    """A callback (what, done, in all) that shows a bar on a terminal, else a few lines.

    ``amount`` writes a number with its unit.
    """
    if not sys.stderr.isatty():
        yield _plain_lines(amount)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:32.32}"),
        BarColumn(),
        TextColumn("{task.fields[amounts]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=None, amounts="")

        def show(what: str, done: int, total: int) -> None:
            amounts = f"{amount(done)} of {amount(total)}"
            bar.update(task, description=what, completed=done, total=total, amounts=amounts)

        yield show


def _plain_lines(amount: Callable[[int], str]) -> Show:
    said = 0.0

    def show(what: str, done: int, total: int) -> None:
        nonlocal said
        share = done / total if total else 1.0
        if share >= min(1.0, said + _STEP):
            said = share
            say(f"{share:4.0%}  {amount(done)} of {amount(total)}  {what}")

    return show
