"""Where the tests' files lie must be a file system with direct reads."""

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def direct_reads(tmp_path_factory):
    path = tmp_path_factory.mktemp("direct") / "file"
    path.touch()
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip(f"{path.parent} refuses O_DIRECT: name another place with --basetemp")
