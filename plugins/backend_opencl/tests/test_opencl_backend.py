"""The conformance kit on every kernel variant, and what it does not ask: devices, profiles, faults."""

from pi2.testing import BackendTests
from pi2_backend_opencl.backend import OpenclBackend

PROFILES = (None, "adreno730", "adreno830", "minimal")


class EveryWay(BackendTests):
    plugin = OpenclBackend


for _profile in PROFILES:
    for _activations in ("f32", "int8") if _profile != "minimal" else ("f32",):
        _options = {"activations": _activations} | ({"profile": _profile} if _profile else {})
        _name = f"Test_{_profile or 'native'}_{_activations}"
        globals()[_name] = type(_name, (EveryWay,), {"options": _options})
del EveryWay
