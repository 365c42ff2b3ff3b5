"""Opening a model whose FFN weights stay on flash: the budget, the regions, the hot neurons."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from pi2.api import Backend, CachePolicy, Keys, Predictor, StorageTier
from pi2.budget import GROUP, Outside, Room, batch_bytes, to_come, too_small
from pi2.errors import BudgetError
from pi2.hot import activations, every_so_many
from pi2.kv_cache import KvDType
from pi2.memory import aligned_bytes, give_back_unused, rss_bytes, rss_peak_bytes
from pi2.neuron_cache import NeuronCache, hottest
from pi2.offload import OffloadedFfns
from pi2.offload_options import OffloadOptions
from pi2.pipeline import bundle_ranges, read_ranges
from pi2.powers import FfnPlace, SlotState, SupportsAsyncRead, SupportsOffload
from pi2.slot_tables import NumpySlots, SupportsSlotSearch
from pi2.tensor import U8, Ids

if TYPE_CHECKING:
    from pi2.container.reader import PiModel

_STAGING = 8 << 20  # bytes read at once
_HOT = 8  # tenths of what an FFN leaves of the slots are never given up, unless the user says


@dataclass(slots=True)
class Offload:
    """How a model on flash was opened."""

    options: OffloadOptions
    policy: CachePolicy
    context: int
    """Tokens of the KV cache, whose memory is part of the budget."""
    chunk: int
    """Tokens of a prompt that are computed at once."""
    kv: KvDType
    """What keys and values are kept in."""
    elsewhere: int = 0
    """Bytes that other parts will take before the cache does: neurons that belong to an accelerator."""
    dense: Backend | None = None
    """Another backend, for the FFNs of many tokens."""
    outside: Outside = field(default_factory=lambda: Outside(()))
    """Other processes, whose memory is part of the budget."""

    @property
    def most(self) -> int:
        """Tokens that go through the layers together at most."""
        return min(self.context, GROUP * self.chunk)


def attach(model: PiModel, backend: Backend, predictor: Predictor, offload: Offload) -> None:
    """``Predictor.attach`` under the budget.

    Raises BudgetError before anything large is read, if the budget is certainly too small.
    """
    arch, g, memory = model.architecture, model.geometry, offload.options.memory
    own = predictor.offloaded_bytes(model) if isinstance(predictor, SupportsOffload) else 0
    if memory is not None:
        fixed = rss_bytes() + model.resident_bytes + own + offload.elsewhere + offload.outside.planned()
        fixed += to_come(arch, offload.context, offload.kv) + batch_bytes(
            arch, g, offload.most, offload.chunk
        )
        minimum = max(fixed + arch.n_neurons * g.stride, rss_peak_bytes())
        if memory < minimum:
            hint = None
            if own > minimum // 8:
                share = f"{own / 10**6:.0f} MB of it are for the predictor {predictor.name}"
                hint = f"{share}; a trained one needs less"
            raise too_small(memory, minimum, hint)
    if isinstance(predictor, SupportsOffload):
        predictor.attach_offloaded(model, backend)
    else:
        predictor.attach(model, backend)
    give_back_unused()


def open_ffns(
    model: PiModel, backend: Backend, tier: StorageTier, predictor: Predictor, offload: Offload
) -> OffloadedFfns:
    """The FFNs, once everything that stays in memory is there: the cache gets what is left of the budget.

    Raises BudgetError, StorageError.
    """
    arch, g, options = model.architecture, model.geometry, offload.options
    give_back_unused()
    coming = to_come(arch, offload.context, offload.kv)
    fixed = rss_bytes() + coming + offload.outside.planned()
    slots = min(options.slots or 1 << 62, arch.n_layers * arch.n_neurons)
    if slots < arch.n_neurons:
        raise BudgetError(f"{slots} slots cannot hold an FFN", hint=f"{arch.n_neurons} at least")
    room = Room(
        arch,
        g,
        chunk=offload.chunk,
        fixed=fixed,
        elsewhere=offload.elsewhere,
        outside=offload.outside,
        memory=options.memory,
        slots=slots,
    )
    least, most = room.slots(offload.most), room.slots(1)
    notes: list[str] = []
    spare = least - arch.n_neurons
    every = arch.n_layers * arch.n_neurons
    n_hot = max(0, min(spare, spare * _HOT // 10 if options.hot is None else int(options.hot * every)))
    counted = activations(model, notes)
    shares = None if counted is None else (counted[0].reshape(-1) / max(1, counted[1])).astype(np.float32)
    if options.keep == "even":
        hot = every_so_many(n_hot, every)
    else:
        hot = np.empty(0, np.int64) if counted is None else hottest(counted[0], n_hot)
    possible = most if options.memory is None else min(slots, most + coming // g.stride)
    search = backend.slot_search if isinstance(backend, SupportsSlotSearch) else NumpySlots
    cache = NeuronCache(arch.n_layers, arch.n_neurons, g.stride, possible, offload.policy, search, shares)
    cache.resize(most)
    ffns = OffloadedFfns(model, backend, tier, predictor, cache, options, room, offload.dense)
    if not isinstance(tier, SupportsAsyncRead):
        notes.append(f"storage {tier.name} reads through the page cache and nothing ahead: this is slow")
    ffns.notes = notes
    try:
        _preload(ffns, tier, hot)
    except BaseException:
        ffns.close()
        raise
    return ffns


def read_neurons(tier: StorageTier, place: FfnPlace, neurons: Ids, stride: int) -> U8:
    """The bundles of ``neurons`` (ascending) of one FFN, (k, stride): neighbours are one read."""
    into = aligned_bytes(len(neurons) * stride)
    read_ranges(tier, place.file, bundle_ranges(place, neurons, stride, (0, stride)), into)
    return into.reshape(-1, stride)


def _preload(ffns: OffloadedFfns, tier: StorageTier, hot: Keys) -> None:
    """Read the hot region, many neurons at a time."""
    cache = ffns.cache
    slots = cache.keep(hot)
    stride = cache.slab.shape[1]
    step = max(1, _STAGING // stride)
    for at in range(0, len(hot), step):
        keys = hot[at : at + step]
        for ffn in np.unique(keys // cache.neurons).tolist():
            mine = keys // cache.neurons == ffn
            neurons = (keys[mine] % cache.neurons).astype(np.int32)
            cache.slab[slots[at : at + step][mine]] = read_neurons(tier, ffns.places[ffn], neurons, stride)
    cache.states[slots] = SlotState.PRESENT
