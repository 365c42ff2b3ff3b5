"""What a backend will be given of a model, for those that make it ready ahead of time."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pi2.accelerator import ToPlace
from pi2.api import FfnSpec
from pi2.container.layout import DENSE, NEURONS
from pi2.hybrid import HybridOptions
from pi2.hybrid_setup import HotPart, hot_bundles
from pi2.inventory import dense_matrices

if TYPE_CHECKING:
    from pi2.container.reader import PiModel


def to_place(model: PiModel, hybrid: HybridOptions | None, notes: list[str]) -> ToPlace:
    """Of a model all of whose bytes are addressable: everything, or what ``hybrid`` has on the accelerator.

    ``notes`` hears what the user should know.
    """
    arch = model.architecture
    names = [name for name in dense_matrices(arch) if not name.startswith("embed.")]
    if arch.tied:
        names.append("embed.weight")
    if hybrid is None:
        ffns = [partial(model.bundles, ffn) for ffn in range(arch.n_layers)]
    else:
        names = [name for name in names if ".attn." in name and hybrid.attention == "accelerator"]
        part = HotPart(model, hybrid, resident=True)
        notes += part.notes
        orders = [order[: part.capacity] for order in part.clusters.orders] if part.capacity else []
        ffns = [partial(hot_bundles, model, order, ffn) for ffn, order in enumerate(orders)]
    files = {name: model.manifest.files[name].sha256 for name in (DENSE, NEURONS)}
    spec = FfnSpec(model.geometry, arch.activation, arch.up_relu)
    return ToPlace([model.matrix(name) for name in names], ffns, spec, files)
