"""Sources of plugins, for the fixture ``install`` (conftest.py)."""

BACKEND = """
from pi2.api import Backend, Probe
from pi2.hookspecs import hookimpl

PI2_API_VERSION = 1


class Toy(Backend):
    name = "{name}"

    @classmethod
    def probe(cls):
        return Probe({score}, "{reason}")

    def place(self, weight): ...
    def linear(self, weight, x, out, rows=None): ...
    def place_ffn(self, bundles, spec): ...
    def ffn(self, ffn, x, out, rows=None): ...


@hookimpl
def pi2_backends():
    return [Toy]
"""


MODELS = """
from pathlib import Path
from pi2.hookspecs import hookimpl

PI2_API_VERSION = 1


@hookimpl
def pi2_models():
    return {{{model!r}: Path({path!r})}}
"""


def backend_source(name="toy", score=5, reason="for a test"):
    """A module that registers one backend."""
    return BACKEND.format(name=name, score=score, reason=reason)


def models_source(model, path):
    """A module that names one model."""
    return MODELS.format(model=model, path=str(path))
