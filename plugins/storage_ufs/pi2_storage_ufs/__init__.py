"""The flash storage tier of pi2."""

from __future__ import annotations

from pi2.api import StorageTier
from pi2.hookspecs import hookimpl

PI2_API_VERSION = 1


@hookimpl
def pi2_storage_tiers() -> list[type[StorageTier]]:
    from pi2_storage_ufs.tier import UfsTier

    return [UfsTier]
