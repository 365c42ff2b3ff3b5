"""The emulator is slow: ``--hypothesis-profile qnn`` runs a share of the examples, always the same."""

import pytest
from hypothesis import settings

settings.register_profile("qnn", max_examples=15, deadline=None, derandomize=True, database=None)  # per cent


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    from pi2.testing.models import toy_architecture, write_toy_model

    return write_toy_model(tmp_path_factory.mktemp("qnn") / "model", toy_architecture(), quant="q4_0")
