"""Toy models for the tests of offloading, made once, and engines over them."""

import functools
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from pi2.api import Plugin
from pi2.container.layout import QuantPlan
from pi2.container.reader import open_model
from pi2.convert import convert
from pi2.engine import Engine, parse_choice
from pi2.offload_options import OffloadOptions
from pi2.plugins import Plugins, probe
from pi2.testing.models import RandomSource, toy_architecture

PLUGINS = Plugins.installed()
NEURONS = 160
ARCHITECTURES = {
    "relu": toy_architecture(),
    "drelu": toy_architecture(up_relu=True),
    "silu": toy_architecture(activation="silu"),
    "no gate": toy_architecture(gated=False, activation="relu2"),
    "biased": toy_architecture(ffn_bias=True, norm_bias=True, norm="layer"),
    "sandwich": toy_architecture(norm_place="sandwich"),
    "untied": toy_architecture(tied=False),
    "post": toy_architecture(norm_place="post", final_norm=False),
    # 512 wide in f16: a gate of one page of 512 bytes and more behind it, so that loading has two phases
    "wide": toy_architecture(d_model=512, head_dim=128, n_neurons=NEURONS, attn_scale=0.1, n_layers=3),
    # bundles of 896 bytes, so that they begin in the middle of a block
    "packed": toy_architecture(d_model=512, head_dim=128, n_neurons=NEURONS, attn_scale=0.1),
}
BACKENDS = [name for name in ("numpy", "cpu") if name in PLUGINS.of("backends")]
STORAGES = ["mmap"]
if "ufs" in PLUGINS.of("storage_tiers") and probe(PLUGINS.of("storage_tiers")["ufs"]):
    STORAGES += ["ufs", "ufs:engine=threads,depth=2", "ufs:engine=buffered", "ufs:throttle=ufs40"]


@functools.cache
def folder() -> Path:
    made = tempfile.TemporaryDirectory(prefix="pi2-offload-")
    folder.keep = made  # type: ignore[attr-defined]
    return Path(made.name)


@functools.cache
def model(name: str) -> Path:
    """The directory of a model of ARCHITECTURES."""
    quant, page = {"wide": ("f16", 512), "packed": ("q4_0", 64)}.get(name, ("q8_0", 4096))
    source = RandomSource(ARCHITECTURES[name])
    return convert(source, folder() / name, QuantPlan.named(quant), page=page)


def part(kind: str, choice: str) -> Plugin:
    name, options = parse_choice(choice)
    return PLUGINS.pick(kind, name).open(options)


@contextmanager
def engine(name, *, backend="numpy", storage="mmap", predictor="exact", offload=None, **changes):
    """An engine over the toy model ``name``; ``changes`` make an OffloadOptions."""
    if changes:
        offload = OffloadOptions(**changes)
    with Engine.open(
        model(name), backend=backend, storage=storage, predictor=predictor, plugins=PLUGINS, offload=offload
    ) as opened:
        yield opened


def logits(opened: Engine, prompt: list[int], tokens: list[int]) -> np.ndarray:
    """Of a prompt, and of ``tokens`` decoded one by one behind it, (prompt + tokens, vocab)."""
    session = opened.session()
    parts = [session.logits(prompt)]
    parts += [session.forward([token])[None] for token in tokens]
    return np.concatenate(parts)


__all__ = ["ARCHITECTURES", "BACKENDS", "NEURONS", "PLUGINS", "STORAGES", "engine", "logits", "model",
           "open_model", "part"]  # fmt: skip
