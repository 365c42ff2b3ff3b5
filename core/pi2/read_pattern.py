"""How to read a bundle: at once, or its gate first and the rest only where the gate is not zero."""

from __future__ import annotations

import time
from random import Random

import numpy as np

from pi2.api import StorageTier
from pi2.memory import aligned_bytes
from pi2.pipeline import bundle_ranges, read_ranges
from pi2.powers import FfnPlace

_READS = 256  # of a round: a device's queue is full, and a round takes some milliseconds
_ROUNDS = 3
_ACTIVE = 0.8
"""Share of the neurons that a predictor names whose gate is not zero: PowerInfer-2 §4.4."""


def two_phases_pay(tier: StorageTier, place: FfnPlace, neurons: int, stride: int, head: int) -> bool:
    """Whether reading ``head`` bytes, and for most neurons the others later, beats whole bundles.

    Measured on the device: where the number of reads counts, and not their length, one read is cheaper
    (PowerInfer-2 §4.4 found two of 4 KiB faster than one of 8 KiB on UFS).  Raises StorageError.
    """
    rng = Random(0)
    parts = {"head": (0, head), "rest": (head, stride), "whole": (0, stride)}
    best = dict.fromkeys(parts, float("inf"))
    for _ in range(_ROUNDS):
        for name, (first, last) in parts.items():
            chosen = np.array(sorted(rng.sample(range(neurons), min(_READS, neurons))), np.int32)
            ranges = bundle_ranges(place, chosen, stride, (first, last))
            into = aligned_bytes(len(chosen) * (last - first))
            start = time.perf_counter()
            read_ranges(tier, place.file, ranges, into)
            best[name] = min(best[name], time.perf_counter() - start)
    return best["head"] + _ACTIVE * best["rest"] < best["whole"]
