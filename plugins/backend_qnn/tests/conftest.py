"""The emulator is slow: ``--hypothesis-profile qnn`` runs a share of every property's examples."""

from hypothesis import settings

settings.register_profile("qnn", max_examples=15)  # per cent
