"""The command ``pi2``: its subcommands, and the one place where errors become messages and exit codes.

0  done    1  a Pi2Error    2  the command line is wrong    130  Ctrl-C    141  the reader went away
"""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import pi2
from pi2.cli import (
    bench,
    chat,
    collect,
    compile,  # noqa: A004  the command's name
    convert,
    doctor,
    eval,  # noqa: A004  the command's name
    inspect,
    place,
    plugins,
    relufy,
    report,
    run,
    train_head,
    train_predictor,
)
from pi2.cli.output import print_error
from pi2.errors import Pi2Error


class _Group(TyperGroup):
    """Runs a subcommand and turns what it raises into a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # here, so that a reader who went away is noticed here
        except Pi2Error as e:
            print_error(e)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            print(file=sys.stderr)  # ends the line that shows ^C
            raise typer.Exit(130) from None
        except BrokenPipeError:
            _silence_stdout()
            raise typer.Exit(141) from None
        return result


def _silence_stdout() -> None:
    """Let the interpreter's last flush go nowhere instead of complaining."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


app = typer.Typer(
    cls=_Group,
    rich_markup_mode=None,  # importing rich would take longer than everything else that --help does
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_USE = (run, chat)
_MAKE = (convert, compile, inspect, collect, report, train_predictor, train_head, relufy, place, eval)
for _module in (*_USE, *_MAKE, bench, plugins, doctor):
    app.command(name=_module.__name__.rpartition(".")[2].replace("_", "-"))(_module.command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pi2 {pi2.__version__}")
        raise typer.Exit


@app.callback()
def pi2_command(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Run large language models that do not fit into memory."""


def main() -> None:
    """Entry point of the ``pi2`` script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that is not UTF-8 must not end a generation
            stream.reconfigure(errors="replace")
    app(prog_name="pi2")
