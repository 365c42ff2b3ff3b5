"""Rules of the code base that a machine can check: sizes, layers, and who may do what."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = ROOT / "core" / "pi2"
SOURCES = sorted(p for top in ("core", "plugins", "tests") for p in (ROOT / top).rglob("*.py"))
NATIVE = sorted(
    p
    for top in ("core", "plugins")
    for end in ("*.c", "*.cpp", "*.h", "*.cl")
    for p in (ROOT / top).rglob(end)
)
LIBRARY = [p for p in SOURCES if p.is_relative_to(ROOT / "core") or "tests" not in p.parts]
PLUGIN_PACKAGES = {p.name for p in (ROOT / "plugins").glob("*/pi2_*") if p.is_dir()}
BENCHMARKS = ROOT / "tests" / "benchmarks"
CONSOLE = CORE / "cli"  # the only place that talks to people


def imports(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def parse(path: Path) -> ast.AST:
    return ast.parse(path.read_text())


@pytest.fixture(params=SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def source(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_the_rules_see_the_sources():
    assert len(SOURCES) > 30
    assert {"pi2_backend_cpu", "pi2_backend_opencl", "pi2_backend_qnn", "pi2_storage_ufs"} <= PLUGIN_PACKAGES


def test_a_file_has_at_most_300_lines(source: Path):
    assert len(source.read_text().splitlines()) <= 300


def test_a_function_has_at_most_60_lines(source: Path):
    for node in ast.walk(parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("path", NATIVE, ids=lambda p: p.name)
def test_a_native_file_has_at_most_300_lines(path: Path):
    assert len(path.read_text().splitlines()) <= 300


def test_core_imports_no_plugin_and_names_none():
    for path in CORE.rglob("*.py"):
        tree = parse(path)
        roots = {name.split(".")[0] for name in imports(tree)}
        assert not roots & PLUGIN_PACKAGES, path
        text = path.read_text()
        assert not [name for name in PLUGIN_PACKAGES if name in text], path


def test_the_environment_has_one_reader():
    readers = {
        path.relative_to(ROOT).as_posix()
        for path in LIBRARY
        for node in ast.walk(parse(path))
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb"))
        or (isinstance(node, ast.ImportFrom) and {a.name for a in node.names} & {"environ", "getenv"})
    }
    assert readers == {"core/pi2/config.py"}


def test_the_library_does_not_print():
    for path in LIBRARY:
        if path.is_relative_to(CONSOLE):
            continue
        calls = [n for n in ast.walk(parse(path)) if isinstance(n, ast.Call)]
        assert not [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], path


def test_python_threads_have_at_most_one_place():
    concurrent = {"threading", "concurrent.futures", "_thread", "multiprocessing", "asyncio"}
    places = {p.relative_to(ROOT).as_posix() for p in LIBRARY if imports(parse(p)) & concurrent}
    places = {p for p in places if not p.startswith("core/pi2/testing/")}  # the kit tests thread safety
    assert len(places) <= 1, places


def test_the_contracts_import_neither_engine_nor_command_line():
    contracts = (
        "api",
        "powers",
        "accelerator",
        "hookspecs",
        "tensor",
        "bundle",
        "architecture",
        "inventory",
        "errors",
    )
    for name in contracts:
        assert not imports(parse(CORE / f"{name}.py")) & {"pi2.engine", "pi2.cli", "pi2.decoder"}, name


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "."),
        ("mypy", "core/pi2", *sorted(str(p) for p in (ROOT / "plugins").glob("*/pi2_*"))),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_the_linters_are_content(command: tuple[str, ...]):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_benchmarks_call_what_there_is():
    """Few of them run here: mypy reads each other's calls of them, whatever types the rest has."""
    flags = ["--config-file=", "--follow-imports=skip", "--explicit-package-bases"]
    files = sorted(str(p) for p in BENCHMARKS.glob("*.py"))
    env = os.environ | {"MYPYPATH": f"{ROOT / 'tests'}:{BENCHMARKS}"}
    command = [sys.executable, "-m", "mypy", *flags, *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert not done.stderr
    wrong = ("[call-arg]", "[name-defined]", "[syntax]")
    assert not [line for line in done.stdout.splitlines() if line.endswith(wrong)]


def test_native_sources_are_formatted():
    tool = Path(sys.executable).parent / "clang-format"
    command = [tool, "--dry-run", "-Werror", *NATIVE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
