"""The emulator is slow: ``--hypothesis-profile qnn`` runs a share of the examples, always the same."""

from hypothesis import settings

settings.register_profile("qnn", max_examples=15, derandomize=True, database=None)  # per cent
