"""The README is true: its commands exist, its hooks are all the hooks (its example: test_toy_plugin)."""

import inspect
import re
import shlex
from pathlib import Path

import pytest
from command_line import pi2 as run_pi2
from pi2 import hookspecs
from pi2.plugins import KINDS

README = (Path(__file__).parent.parent / "README.md").read_text()
HOOKS = [
    name for name, value in vars(hookspecs).items() if name.startswith("pi2_") and inspect.isfunction(value)
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_two_commands_install_run_and_test():
    commands = [
        line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")
    ]
    assert len(commands) == 2
    assert "pip install . ./plugins/*" in commands[0]
    assert "pi2 run" in commands[0]
    assert commands[1].endswith("python3 -m pytest")


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_in_the_table_with_its_base_class(hook):
    (row,) = [line for line in README.splitlines() if line.startswith(f"| `{hook}` |")]
    base = KINDS.get(hook.removeprefix("pi2_"))
    assert base is None or f"`{base.__name__}`" in row


def test_every_command_and_option_shown_exists():
    (shown,) = blocks("sh")
    commands = [shlex.split(part, comments=True) for line in shown.splitlines() for part in line.split("|")]
    commands = [words for words in commands if words and words[0] == "pi2"]
    assert len(commands) >= 8
    for _, name, *rest in commands:
        helped = run_pi2(name, "--help")
        assert helped.exit_code == 0, name
        for option in (word for word in rest if word.startswith("--")):
            assert option in helped.stdout, (name, option)
