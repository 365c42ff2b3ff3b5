"""The conformance kit on the emulator of the NPU."""

from pi2.testing import BackendTests
from pi2_backend_qnn.backend import QnnBackend


class TestQnnBackend(BackendTests):
    plugin = QnnBackend
    options = {"emulator": "on", "cluster": "32"}  # noqa: RUF012  the kit's way
