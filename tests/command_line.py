"""Ways to call the command line: in this process, and as one of its own."""

import subprocess
import sys

from pi2.cli.app import app
from typer.testing import CliRunner

LIVELY = ["--temperature", "8", "--seed", "3"]  # cooler, toy models repeat one token


def pi2(*args, stdin=None):
    return CliRunner().invoke(app, [str(a) for a in args], input=stdin, prog_name="pi2")


def process(*args, **options):
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-W", "error", "-m", "pi2", *map(str, args)]
    return subprocess.Popen(command, **{**pipes, **options})


def assert_error(result, message, hint=""):
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert hint in result.stderr.partition("\nhint: ")[2]
