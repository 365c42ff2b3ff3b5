"""``pi2 train-predictor``: small networks that guess which neurons are active, trained on text."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pi2.cli import options as o
from pi2.cli.output import human_bytes, print_json, print_table, say
from pi2.cli.progress import progress_bar
from pi2.errors import OptionError, StorageError
from pi2.extras import require_torch

if TYPE_CHECKING:
    from pi2.container import FfnPredictor, Predictors
    from pi2.engine import Engine
    from pi2.lowrank.training import Training, TrainSettings

TrainTokens = Annotated[int, typer.Option("--tokens", min=256, help="Tokens of text, of all files together.")]
Recall = Annotated[
    float, typer.Option("--recall", help="Share of the active neurons to be named, at least, in every layer.")
]
Width = Annotated[
    str, typer.Option("--width", help="Of the inner layer: auto chooses by layer, within --budget.")
]
Budget = Annotated[float, typer.Option("--budget", help="Of all predictors, as a share of the weights.")]
MaxLoss = Annotated[
    float,
    typer.Option(
        "--max-loss", help="Miss fewer neurons until divergence costs less than this share of perplexity."
    ),
]
Quant = Annotated[str, typer.Option("--quant", help="Format of the weights: q4_0, q8_0, f16 or f32.")]
Seed = Annotated[int, typer.Option("--seed", help="The same seed gives the same predictors.")]
Out = Annotated[
    Path | None, typer.Option("--out", help="File to write; without it, predictors.safetensors in the model.")
]


Texts = Annotated[
    list[Path] | None, typer.Argument(metavar="TEXT...", help="Text files, UTF-8; not needed with --from.")
]
From = Annotated[
    Path | None,
    typer.Option("--from", metavar="PATH", help="Take PowerInfer's or TurboSparse's instead of training."),
]


def command(
    model: o.ModelArgument,
    texts: Texts = None,
    tokens: TrainTokens = 32768,
    recall: Recall = 0.97,
    width: Width = "auto",
    budget: Budget = 0.06,
    max_loss: MaxLoss = 0.001,
    quant: Quant = "q4_0",
    seed: Seed = 0,
    source: From = None,
    out: Out = None,
    backend: o.Backend = None,
    storage: o.Storage = None,
    json: o.Json = False,
) -> None:
    """Train the predictors that --predictor lowrank asks.

    They go into the model. Every eighth stretch of the texts is not trained on: it sets the thresholds
    and measures what is lost. Ctrl-C keeps what is done, and the same command goes on. Needs torch.
    --from takes trained ones: a PowerInfer GGUF, a directory of model_N.pt, or a checkpoint with
    predictors in it; texts then only set their thresholds.
    """
    from pi2.container.predictors import PREDICTORS
    from pi2.lowrank.training import TrainSettings

    if source is None:
        require_torch("training")
        if not texts:
            raise OptionError("there is no text to train on", hint="pi2 train-predictor MODEL TEXT...")
    settings = TrainSettings(
        tokens=tokens, recall=recall, max_loss=max_loss, width=_parse_width(width), budget=budget,
        dtype=_parse_quant(quant), seed=seed,
    )  # fmt: skip
    start = time.perf_counter()
    with o.open_engine(model, backend=backend, storage=storage, predictor="exact") as engine:
        place = out or engine.model.path / PREDICTORS
        _check_writable(place)
        found = _make(engine, texts or [], settings, source, place, listed=out is None)
        share = found.nbytes / engine.model.nbytes
    seconds = time.perf_counter() - start
    if json:
        print_json({"path": str(place), "seconds": seconds, **describe(found, share)})
        return
    _print(found)
    say(f"{place}: {human_bytes(found.nbytes)}, {share:.1%} of the model, {seconds:.0f} s")
    _say_loss(found, max_loss)


def _make(
    engine: Engine,
    texts: list[Path],
    settings: TrainSettings,
    source: Path | None,
    place: Path,
    *,
    listed: bool,
) -> Predictors:
    """Train or import, and write; what is half done is kept beside ``place``."""
    from pi2.container import Predictors
    from pi2.container.layout import NEURONS
    from pi2.lowrank.imports import import_predictors
    from pi2.lowrank.training import Training

    arch = engine.model.architecture
    imported = None if source is None else import_predictors(source, arch, settings.dtype)
    if imported is not None and not texts:
        origin = {"imported": str(source)}
        found = Predictors(engine.model.manifest.files[NEURONS].sha256, imported, None, origin)
        _save(found, place, listed=listed)
        return found
    with Training(engine, texts, settings, place.with_name(f"{place.name}.partial")) as training:
        try:
            found = _run(training, imported)
        except KeyboardInterrupt:
            say("\nstopped: the same command goes on")
            raise
        if source is not None:
            found.training["imported"] = str(source)
        _save(found, place, listed=listed)
        training.discard()
    return found


def _run(training: Training, imported: dict[int, FfnPredictor] | None) -> Predictors:
    with progress_bar(lambda n: f"{n} tokens") as progress:
        training.collect(progress)
    if imported is not None:
        training.take(imported)
    else:
        with progress_bar(lambda n: f"{n} steps") as progress:
            training.train(progress)
    with progress_bar(lambda n: f"{n} readings") as progress:
        return training.measure(progress)


def _parse_width(text: str) -> int | None:
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise OptionError(f"--width takes a number or auto, not {text!r}", hint="for example 64") from None


def _parse_quant(text: str) -> Any:
    from pi2.tensor import DTYPES

    if text not in DTYPES:
        raise OptionError(f"no weight format is called {text!r}", hint=f"known: {', '.join(DTYPES)}")
    return text


def _check_writable(place: Path) -> None:
    """Now, not after an hour of training.  Raises StorageError."""
    if not os.access(place.parent, os.W_OK) or place.is_dir():
        hint = "name another file with --out FILE, in a directory that is there"
        raise StorageError("cannot be written", path=place, hint=hint)


def _save(found: Predictors, place: Path, *, listed: bool) -> None:
    """Into the model, or into a file of its own.  Raises StorageError."""
    if listed:
        from pi2.container import replace_file

        replace_file(place.parent, place.name, found.save)
        return
    fresh = place.with_name(f"{place.name}.new")
    try:
        found.save(fresh)
        fresh.replace(place)
    except OSError as e:
        raise StorageError(e.strerror or str(e), path=place, hint="check that it may be written") from None


def describe(found: Predictors, share: float) -> dict[str, Any]:
    """The object of ``--json``."""
    layers = []
    for number, layer in found.layers.items():
        m = layer.measured
        layers.append({"layer": number, "width": layer.width, "bytes": layer.nbytes} | (
            {} if m is None else {
                "density": m.density, "predicted_density": m.predicted_density, "recall": m.recall
            }
        ))  # fmt: skip
    return {
        "bytes": found.nbytes,
        "share_of_model": share,
        "perplexity_loss": found.loss,
        "layers": layers,
        "training": found.training,
    }


def _print(found: Predictors) -> None:
    """A line a layer, on stdout."""
    rows = [["layer", "width", "bytes", "density", "predicted", "recall"]]
    for number, layer in found.layers.items():
        m = layer.measured
        shares = ["-"] * 3 if m is None else [f"{v:.2%}" for v in (m.density, m.predicted_density, m.recall)]
        rows.append([str(number), str(layer.width), str(layer.nbytes), *shares])
    print_table(rows)


def _say_loss(found: Predictors, max_loss: float) -> None:
    """What they cost, on held-out text, and whether that is as wanted."""
    if found.loss is None:
        return
    say(f"lossy: perplexity {found.loss:+.3%}, by divergence on text that was not trained on")
    if found.loss > max_loss:
        say(f"warning: that is more than --max-loss {max_loss:g}, at the highest recall that was tried")
