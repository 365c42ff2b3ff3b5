"""The conformance kit on every kernel variant, and what it does not ask: devices, profiles, faults."""

import tempfile

import pytest
from pi2.testing import BackendTests
from pi2_backend_opencl.backend import OpenclBackend

KERNELS = tempfile.TemporaryDirectory(prefix="pi2-kernels-")  # compiling is most of the time
VARIANTS = {
    "native_f32": {},
    "native_int8": {"activations": "int8"},
    "adreno730_int8": {"profile": "adreno730", "activations": "int8"},
    "adreno830_f32": {"profile": "adreno830"},
    "minimal_f32": {"profile": "minimal"},
}


pytestmark = pytest.mark.skipif(not OpenclBackend.probe(), reason=OpenclBackend.probe().reason)


class EveryWay(BackendTests):
    plugin = OpenclBackend


for _name, _options in VARIANTS.items():
    _class = type(f"Test_{_name}", (EveryWay,), {"options": {"cache": KERNELS.name} | _options})
    globals()[_class.__name__] = _class
del EveryWay, _class
