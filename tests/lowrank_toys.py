"""Toy models that predictors are trained on: every kind of neuron."""

from pathlib import Path

from pi2.config import Settings
from pi2.plugins import Plugins
from pi2.testing.models import toy_architecture, write_toy_model

BUILTINS = Plugins.installed(Settings(plugins=frozenset()))
KINDS = {
    "relu": {"n_layers": 3},
    "drelu": {"up_relu": True},
    "relu2, no gate, biases": {"activation": "relu2", "gated": False, "ffn_bias": True},
}


def write_kinds(where: Path) -> dict[str, Path]:
    """A model of each kind, in float32."""
    return {
        kind: write_toy_model(where / str(i), toy_architecture(**changes), quant="f32")
        for i, (kind, changes) in enumerate(KINDS.items())
    }
