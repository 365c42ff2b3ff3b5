"""Makes the 7B-shaped sparse model of the benchmarks, and a GGUF of the same weights for llama.cpp.

PYTHONPATH=tests python tests/benchmarks/make_model.py DIRECTORY [--page 4096] [--no-place] [--check]

Writes DIRECTORY/model (pi2, q4_0, ReLU, with predictor and statistics, its neurons in the order that
``pi2 place`` gives them) and DIRECTORY/model.gguf.  The weights are random, yet the model is sparse like a
real one: see ``sparse_source.py`` for how, and ``--check`` for the figures on text that it decodes itself,
beside those of the real ReLU model.  llama.cpp computes SiLU where pi2 computes ReLU: of the GGUF only the
speed means something.  Every dimension and knob of ``sparse_source.Shape`` is an option.  Default
directory: the user's cache.  A stopped run goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from gguf_export import export
from model_check import check, statistics
from pi2.builtin.mmap_tier import MmapTier
from pi2.container import FfnPredictor, Predictors, open_model, read_manifest, replace_file
from pi2.container.layout import NEURONS, QuantPlan
from pi2.container.predictors import PREDICTORS
from pi2.convert import convert
from pi2.placement import place_model
from pi2.statistics_file import STATISTICS
from pi2.tensor import BLOCK, Tensor
from sparse_source import Shape, SparseSource

CACHE = Path.home() / ".cache" / "pi2" / "benchmarks"
LIFT = 6.0
"""Deviations of what a direction of the gates makes of x: less than minus that is too rare to matter."""


def make(
    directory: Path,
    shape: Shape,
    *,
    page: int = 64,
    with_gguf: bool = True,
    margin: float = 0.0,
    collect: int = 0,
    placed: bool = True,
) -> Path:
    """Make what is not there yet and return the path of the pi2 model.

    Its neurons are ``placed`` by the statistics of ``collect`` tokens: without any they lie as generated.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path, source = directory / "model", SparseSource(shape)
    found = _provenance(path, source)
    if placed and collect and not found:
        _complete(directory / "unplaced", source, page, margin, collect)
        _place(directory / "unplaced", directory / "placing")
        (directory / "placing").rename(path)
    elif "placed" not in found:
        _complete(path, source, page, margin, collect)
    shutil.rmtree(directory / "unplaced", ignore_errors=True)
    if with_gguf and not (directory / "model.gguf").exists():
        tier = MmapTier()
        export(open_model(path, tier, verify=False), directory / "model.gguf")
        tier.close()
    return path


def _provenance(path: Path, source: SparseSource) -> dict[str, str]:
    """What the model at ``path`` says of itself, if there is one."""
    found = dict(read_manifest(path).source) if path.exists() else {}
    if found and found | {"placed": ""} != dict(source.provenance) | {"placed": ""}:
        raise SystemExit(f"{path} has another shape: remove it or choose another directory")
    return found


def _complete(path: Path, source: SparseSource, page: int, margin: float, collect: int) -> None:
    """Make what is not there yet of a model whose neurons lie as generated."""
    if not _provenance(path, source):
        convert(source, path, QuantPlan.named("q4_0", embed="q4_0", head="q4_0"), _say, page=page)
    if PREDICTORS not in read_manifest(path).files:
        replace_file(path, PREDICTORS, predictors(path, source, margin).save)
    if collect and STATISTICS not in read_manifest(path).files:
        replace_file(path, STATISTICS, statistics(path, collect).save)


def _place(path: Path, destination: Path) -> None:
    tier = MmapTier()
    done = place_model(open_model(path, tier, verify=False), destination, _say, overwrite=True)
    tier.close()
    sys.stderr.write(f"\rreads of a layer: {done.reads_before:.1f}, placed {done.reads_after:.1f}\n")


def predictors(path: Path, source: SparseSource, margin: float) -> Predictors:
    """fc1 is B, with a bias by which ReLU loses nothing; fc2 is A, whose bias takes the first one back.

    Neurons are named whose gate is predicted above ``-margin``.
    """
    layers = {}
    for layer in range(source.shape.layers):
        gates = source.gates(layer)
        pad = -len(gates.directions) % BLOCK  # q4_0 has rows of whole blocks
        fc1 = Tensor.from_f32(np.pad(gates.directions, ((0, pad), (0, 0))), "q4_0")
        fc2 = Tensor.from_f32(np.pad(gates.loads, ((0, 0), (0, pad))), "q4_0")
        lift = np.full(fc1.rows, LIFT, np.float32)
        layers[layer] = FfnPredictor(fc1, lift, fc2, -gates.thresholds - fc2.to_f32() @ lift, -margin)
    made = {"made": "from the factors that the gates were generated from"}
    return Predictors(read_manifest(path).files[NEURONS].sha256, layers, None, made)


def _say(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{done / total:4.0%}  {what:40.40}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, nargs="?", default=CACHE)
    parser.add_argument("--page", type=int, default=64, help="bundles take whole multiples: 4096 makes 8192")
    parser.add_argument("--no-gguf", action="store_true")
    parser.add_argument("--margin", type=float, default=0.3, help="of the predictor, in deviations of a gate")
    parser.add_argument("--collect", type=int, default=1024, help="tokens for the statistics; 0: none")
    parser.add_argument("--no-place", action="store_true", help="neurons lie as they were generated")
    parser.add_argument("--check", action="store_true")
    for field in dataclasses.fields(Shape):
        kind: Any = type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    return parser.parse_args()


def main() -> None:
    options = _options()
    shape = Shape(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Shape)})
    start = time.perf_counter()
    path = make(
        options.directory,
        shape,
        page=options.page,
        with_gguf=not options.no_gguf,
        margin=options.margin,
        collect=options.collect,
        placed=not options.no_place,
    )
    sys.stderr.write(f"\r{path}: {time.perf_counter() - start:.0f} s\n")
    if options.check:
        print(json.dumps(check(path), indent=1))


if __name__ == "__main__":
    main()
