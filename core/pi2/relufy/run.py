"""A relufication from beginning to end, in phases that a run which was stopped goes on with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from pi2 import inventory
from pi2.api import ModelSource
from pi2.architecture import Architecture
from pi2.chat_template import render
from pi2.container.layout import plan_layout
from pi2.container.writer import check_replaceable, destination_exists
from pi2.convert import convert
from pi2.errors import FormatError, OptionError, UnsupportedModel
from pi2.relufy import workplace as wp
from pi2.relufy.corpus import Render, Row, Text, begin, pack, read_corpus
from pi2.relufy.distil import Distiller
from pi2.relufy.measure import measure
from pi2.relufy.network import Network
from pi2.relufy.refit import refit
from pi2.relufy.report import Report
from pi2.relufy.sampler import Sampler
from pi2.relufy.settings import Settings
from pi2.relufy.sources import TwinSource
from pi2.relufy.twin import Twin, dtypes_of, load_weights, trained
from pi2.text import TextTokenizer

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def _nothing(what: str, done: int, total: int) -> None:
    return None


@contextlib.contextmanager
def open_run(
    source: ModelSource,
    texts: Sequence[Path],
    destination: Path,
    settings: Settings,
    start: ModelSource | None,
    *,
    overwrite: bool,
    restart: bool,
) -> Iterator[Relufication]:
    """See :func:`pi2.relufy.open_relufication`."""
    destination = Path(os.path.abspath(destination))  # noqa: PTH100  (resolve() would follow links)
    check_model(source.architecture)
    if start is not None:
        check_twin(source.architecture, start.architecture)
    settings.check(len(texts))
    if destination.exists() or destination.is_symlink():
        if not overwrite:
            raise destination_exists(destination)
        check_replaceable(destination)
    path = wp.workplace_path(destination)
    with wp.open_workplace(path) as place:
        if restart:
            for file in place.iterdir():
                file.unlink()
        yield Relufication(source, texts, destination, settings, start, place, overwrite)


def check_model(arch: Architecture) -> None:
    """Raise UnsupportedModel if ``arch`` needs no twin."""
    if arch.sparse:
        raise UnsupportedModel(
            f"the activation function of this model is {arch.activation} already",
            hint="it has exact zeros as it is: pi2 convert and run it",
        )


def check_twin(arch: Architecture, twin: Architecture) -> None:
    """Raise UnsupportedModel unless ``twin`` computes what ``arch`` does with ReLU."""
    if replace(arch, activation="relu", bos_id=twin.bos_id, eos_ids=twin.eos_ids) != twin:
        raise UnsupportedModel(
            "the model to begin with is no ReLU twin of this one",
            hint="give one that pi2 relufy made of it, or leave out --from",
        )


class Relufication:
    """Call the phases in order; each skips what an earlier run has done.  Made by ``open_relufication``."""

    def __init__(
        self,
        source: ModelSource,
        texts: Sequence[Path],
        destination: Path,
        settings: Settings,
        start: ModelSource | None,
        place: Path,
        overwrite: bool,
    ) -> None:
        arch = source.architecture
        self._source, self._settings, self._start, self._place = source, settings, start, place
        self._destination, self._overwrite = destination, overwrite
        self._tokenizer = TextTokenizer(source.tokenizer_json())
        corpus = read_corpus(
            texts, self._tokenizer, _renderer(source, self._tokenizer), settings.held_out, settings.sequence
        )
        self._corpus = corpus
        self._names = _names(texts)
        self._held_out = {name: self._rows(text) for name, text in zip(self._names, corpus, strict=True)}
        self.report = self._report()
        dtypes = dtypes_of(plan_layout(arch, settings.quant), arch)
        weights = load_weights(source)
        self._original = Network(arch, weights)
        if start is not None:
            weights = {n: w if trained(n) else weights[n] for n, w in load_weights(start).items()}
        self._twin = Twin(replace(arch, activation="relu"), weights, dtypes)

    def compare(self, progress: Progress = _nothing) -> None:
        """Measure the original, and the twin before anything is trained."""
        begun = "swapped" if self._start is None else "started"
        with _threads(self._settings):
            for stage, network in (("original", self._original), (begun, self._twin.network())):
                if stage not in self.report.stages:
                    self._measure(stage, network, progress)

    def refit(self, progress: Progress = _nothing) -> None:
        """Refit W_down of every layer, and measure; not of a twin that there was before."""
        layers, s = self._twin.arch.n_layers, self._settings
        if not s.refit_tokens or self._start is not None or self._checkpoint.exists():
            return
        sampler = self._sampler(s.seed + 1)
        rows = [sampler.next() for _ in range(max(1, s.refit_tokens // s.sequence))]
        start = time.monotonic()
        with _threads(s):
            refit(
                self._original, self._twin, rows, s.ridge, self._place,
                lambda layer: progress(f"refit of layer {layer}", layer + 1, layers),
            )  # fmt: skip
            self.report.refit_s += time.monotonic() - start
            self._measure("refitted", self._twin.network(), _nothing)

    def distil(self, progress: Progress = _nothing, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Train, and measure.  False: ``stopped`` said so; what was done is kept for the next run."""
        s = self._settings
        distiller = Distiller(self._original, self._twin, self._sampler(s.seed), s)
        self._restore(distiller)

        def checkpoint() -> None:
            done = distiller.done
            wp.save(self._checkpoint, distiller.arrays(), distiller.state())
            self.report.tokens, self.report.steps = done.tokens, done.steps
            self.report.lost_steps, self.report.train_s = done.lost, done.seconds
            self.report.save(self._place)

        with _threads(s):
            if distiller.share < 1:
                self.report.stages.pop("twin", None)
                whole = distiller.run(progress, stopped, checkpoint)
                checkpoint()
                if not whole:
                    return False
            if "twin" not in self.report.stages:
                self._measure("twin", self._twin.network(), _nothing)
        return True

    def write(self, progress: Progress = _nothing, *, keep: bool = False) -> Path:
        """Write the twin as a pi2 model; then the checkpoint is deleted, unless ``keep``."""
        before = () if self._start is None else self._start.notes
        twin = TwinSource(self._source, dict(self._twin.arrays()), (*before, *self.report.notes()))
        path = convert(twin, self._destination, self._settings.quant, progress, overwrite=self._overwrite)
        if not keep:
            wp.remove(self._place)
        return path

    @property
    def _checkpoint(self) -> Path:
        return self._place / wp.CHECKPOINT

    def _rows(self, text: Text) -> list[Row]:
        """The held-out documents, each a row of its own."""
        whole = text.held_out if text.whole else [begin(d, self._tokenizer) for d in text.held_out]
        limit = self._source.architecture.max_context
        return [pack([d.cut(0, limit)]) for d in whole]

    def _sampler(self, seed: int) -> Sampler:
        s, longest = self._settings, self._source.architecture.max_context
        return Sampler(
            self._corpus, self._tokenizer, shares=s.shares, sequence=s.sequence, longest=longest, seed=seed
        )

    def _measure(self, stage: str, network: Network, progress: Progress) -> None:
        total = sum(len(row.ids) for rows in self._held_out.values() for row in rows)
        done = 0

        def on_tokens(n: int) -> None:
            nonlocal done
            done += n
            progress(f"measuring: {stage}", done, total)

        self.report.stages[stage] = measure(network, self._held_out, on_tokens).to_dict()
        self.report.save(self._place)

    def _report(self) -> Report:
        """The one of an earlier run of the same training, or a new one.  Raises OptionError for another's."""
        texts = [
            {"name": name, "sha256": text.sha256, "tokens": text.tokens}
            for name, text in zip(self._names, self._corpus, strict=True)
        ]
        held_out = sum(len(row.ids) for rows in self._held_out.values() for row in rows)
        fingerprint = self._fingerprint(texts)
        found = Report.load(self._place)
        if found is not None and found.fingerprint != fingerprint:
            raise OptionError(
                f"the training in {self._place} is of another model, or has other texts or another --from,"
                " --quant, --sequence, --held-out or --seed",
                hint="repeat what it was begun with, or begin again with --restart",
            )
        return found or Report(fingerprint, self._source.architecture.activation, texts, held_out)

    def _fingerprint(self, texts: list[dict[str, Any]]) -> str:
        """Names what is trained on what.  The norms stand for all weights, as in a conversion."""
        s = self._settings
        what = [self._source.architecture.to_dict(), texts, asdict(s.quant), s.sequence, s.held_out, s.seed]
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode())
        for source in filter(None, (self._source, self._start)):
            for name in inventory.dense_vectors(source.architecture):
                digest.update(source.vector(name).tobytes())
        return digest.hexdigest()

    def _restore(self, distiller: Distiller) -> None:
        state = wp.read_state(self._checkpoint)
        if state is None:
            return
        wp.read_arrays(self._checkpoint, distiller.arrays())
        try:
            distiller.restore(state)
        except (KeyError, TypeError):
            hint = "begin again with --restart"
            raise FormatError(f"{self._checkpoint} is no checkpoint of a training", hint=hint) from None


def _names(paths: Sequence[Path]) -> list[str]:
    """File names, or whole paths where two files have the same."""
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _renderer(source: ModelSource, tokenizer: TextTokenizer) -> Render | None:
    template, arch = source.chat_template(), source.architecture
    if template is None:
        return None
    bos = "" if arch.bos_id is None else tokenizer.token_text(arch.bos_id)
    eos = tokenizer.token_text(arch.eos_ids[0]) if arch.eos_ids else ""

    def rendered(messages: Sequence[dict[str, str]], asking: bool) -> str:
        return render(template, messages, add_generation_prompt=asking, bos_token=bos, eos_token=eos)

    return rendered


@contextlib.contextmanager
def _threads(settings: Settings) -> Iterator[None]:
    """PyTorch's threads as the settings have them, meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads or (before if settings.workers == 1 else 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)
