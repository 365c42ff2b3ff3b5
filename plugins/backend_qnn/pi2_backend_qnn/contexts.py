"""Compiled contexts in a folder, with a manifest: made ahead of time, checked before they are run.

QNN itself notices neither a flipped byte of weights nor a context of another SoC, so the manifest has the
SoC, the versions, the options, and checksums of weights and files.  A folder is complete or does not exist
under its name: what is begun lies in NAME.partial, where the next attempt goes on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pi2.errors import StorageError

from pi2_backend_qnn.errors import ContextDamaged, ContextMissing, WrongSoc, WrongVersion, WrongWeights
from pi2_backend_qnn.placed import DECODE, ROWS, Ffn, Placed, Shape

if TYPE_CHECKING:
    from pi2_backend_qnn.programs import Programs

MANIFEST = "manifest.json"
FORMAT = 4
_AGAIN = "compile again: pi2 compile"

Show = Callable[[str, int, int], None]


class Contexts:
    """A folder of contexts for one SoC."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self._folder, self._graphs = folder, manifest["graphs"]

    @classmethod
    def open(cls, name: str | Path, about: Mapping[str, Any]) -> Self:
        """The contexts in the folder ``name``, if they were compiled for what ``about`` says.

        Raises ContextMissing, ContextDamaged, WrongSoc, WrongVersion, WrongWeights.
        """
        folder, soc = Path(name), about["soc"]
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
        except OSError:
            raise ContextMissing(f"{folder} has no {MANIFEST}", hint="make it: pi2 compile") from None
        except ValueError:
            raise ContextDamaged(f"{folder / MANIFEST} is not JSON", hint=_AGAIN) from None
        _check(manifest, folder)
        if manifest["soc"] != soc:
            raise WrongSoc(
                f"{folder} was compiled for {manifest['soc']}, this is {soc}", hint=f"{_AGAIN} --soc {soc}"
            )
        if (theirs := manifest["weights"]) != about["weights"]:
            raise WrongWeights(
                f"{folder} has weights={theirs}, asked for is weights={about['weights']}",
                hint=f"--backend qnn:weights={theirs}, or {_AGAIN}",
            )
        for what in ("versions", "options"):
            if differing := _difference(manifest[what], about[what]):
                raise WrongVersion(f"{folder} was compiled with {differing}", hint=_AGAIN)
        return cls(folder, manifest)

    def require(self, placed: Placed) -> None:
        """Raises ContextMissing for weights that were not compiled."""
        if placed.digest not in self._graphs:
            raise ContextMissing(f"{self._folder} has nothing of {placed}", hint=_AGAIN)

    def find(self, placed: Placed, shape: Shape) -> dict[str, Any]:
        """Path of a context, and path -> sha256 of its files.  Raises ContextMissing."""
        self.require(placed)
        graph = self._graphs[placed.digest].get(_key(shape))
        if graph is None:
            raise ContextMissing(
                f"{self._folder} has no context of {placed} for {shape[0]} tokens", hint=_AGAIN
            )
        folder = self._folder / graph["folder"]
        files = {str(folder / name): sha for name, sha in graph["files"].items()}
        return {"path": str(folder / "graph.onnx"), "files": files}


def shapes_of(placed: Placed) -> list[Shape]:
    """All graphs that running may ask for: of an FFN, prefixes for few tokens, and the whole for many."""
    if not isinstance(placed, Ffn):
        return [(rows, 1) for rows in ROWS]
    prefixes = placed.prefixes()
    return [(rows, c) for rows in ROWS for c in (prefixes if rows <= DECODE else prefixes[-1:])]


def bytes_of(placed: Placed) -> int:
    """Of all its contexts, at least: every one has a copy of its weights."""
    return sum(map(placed.weight_bytes, shapes_of(placed)))


def compile_all(
    programs: Programs, weights: Iterable[Placed], total: int, about: Mapping[str, Any], destination: Path,
    show: Show, needed: int,
) -> dict[str, Any]:  # fmt: skip
    """Make ``destination`` of ``total`` matrices and FFNs; what an earlier attempt with the same ``about``
    made is kept.  Returns ``about`` and how many graphs there are.  ``needed``: ``bytes_of`` them all.
    Raises StorageError, QnnError.
    """
    if destination.exists():
        raise StorageError("it exists already", path=destination, hint="remove it, or choose another name")
    partial = destination.with_name(destination.name + ".partial")
    try:
        _begin(partial, about)
        _check_space(partial, needed)
        graphs: dict[str, dict[str, Any]] = {}
        for number, placed in enumerate(weights):
            for shape in shapes_of(placed):
                show(f"{placed}, {shape[0]} tokens", number, total)
                graphs.setdefault(placed.digest, {})[_key(shape)] = _one(programs, placed, shape, partial)
        show("", total, total)
        (partial / MANIFEST).write_text(json.dumps({**about, "graphs": graphs}, indent=1))
        partial.rename(destination)
    except OSError as e:
        raise StorageError(e.strerror or str(e), path=partial, hint="the same command goes on") from None
    return {**about, "graphs": sum(map(len, graphs.values()))}


def _begin(partial: Path, about: Mapping[str, Any]) -> None:
    """An empty folder, or the one of an earlier attempt at the same."""
    note = partial / "about.json"
    wanted = json.dumps(about, sort_keys=True)
    if partial.exists() and (not note.exists() or note.read_text() != wanted):
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    note.write_text(wanted)


def _check_space(partial: Path, needed: int) -> None:
    """Raises StorageError if what is there and what is free are not enough."""
    there = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    free = shutil.disk_usage(partial).free
    if there + free < needed:
        raise StorageError(
            f"at least {(needed - there) / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free",
            path=partial,
            hint="free space, or compile a smaller share: --hot",
        )


def _one(programs: Programs, placed: Placed, shape: Shape, partial: Path) -> dict[str, Any]:
    """Compile one graph, unless it is there and sound."""
    name = f"{placed.digest[:16]}-{_key(shape)}"
    folder, note = partial / name, partial / name / "files.json"
    if note.exists():
        files = json.loads(note.read_text())
        if all((folder / each).is_file() and sha256(folder / each) == sha for each, sha in files.items()):
            return {"folder": name, "files": files}
    for old in (folder, work := partial / "work"):
        if old.exists():
            shutil.rmtree(old)
    work.mkdir()
    programs.save(placed, shape, work / "graph.onnx")
    files = {each.name: sha256(each) for each in sorted(work.iterdir())}
    (work / "files.json").write_text(json.dumps(files))
    work.rename(folder)
    return {"folder": name, "files": files}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _key(shape: Shape) -> str:
    return f"{shape[0]}x{shape[1]}"


def _difference(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str | None:
    """The first thing in which two sets of versions or options differ."""
    for name in sorted({*theirs, *mine}):
        if theirs.get(name) != mine.get(name):
            return f"{name} {theirs.get(name)}, this has {mine.get(name)}"
    return None


def _check(manifest: Any, folder: Path) -> None:
    """Raises ContextDamaged if the manifest is not one, or names files outside of its folder."""
    try:
        sound = manifest["format"] == FORMAT and all(
            isinstance(manifest[name], kind)
            for name, kind in (
                ("soc", str),
                ("weights", str),
                ("versions", dict),
                ("options", dict),
                ("graphs", dict),
            )
        )
        for graphs in manifest["graphs"].values():
            for graph in graphs.values():
                names = [graph["folder"], *graph["files"]]
                sound = sound and all(name == Path(name).name and name != ".." for name in names)
                sound = sound and all(len(sha) == 64 for sha in graph["files"].values())
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise ContextDamaged(f"{folder / MANIFEST} is not a manifest of this version", hint=_AGAIN)
