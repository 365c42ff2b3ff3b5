"""What slow machines need."""

from hypothesis import settings

settings.register_profile("emulated", max_examples=10)  # a tenth of every property's examples
