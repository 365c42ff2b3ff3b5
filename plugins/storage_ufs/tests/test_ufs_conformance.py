"""The conformance kit on every way to read."""

from typing import ClassVar

import pytest
from pi2.testing import StorageTierTests
from pi2_storage_ufs.tier import UfsTier, uring_error

NO_URING = pytest.mark.skipif(uring_error() != 0, reason="this kernel refuses io_uring")


class Ways(StorageTierTests):
    plugin = UfsTier


@NO_URING
class TestUring(Ways):
    options: ClassVar = {"engine": "uring"}


@NO_URING
class TestUringOneByOneInSmallBlocks(Ways):
    options: ClassVar = {"engine": "uring", "depth": "1", "block": "512", "merge": "4096"}


class TestThreads(Ways):
    options: ClassVar = {"engine": "threads"}


class TestBuffered(Ways):
    options: ClassVar = {"engine": "buffered", "threads": "2", "merge": "8192"}


class TestThrottled(Ways):
    options: ClassVar = {"throttle": "ufs40"}


class TestDefault(Ways):
    pass


del Ways
