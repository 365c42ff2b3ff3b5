"""TurboSparse-Mistral and Bamboo: Mistral with relu(gate x) * relu(up x), called dReLU (arXiv 2406.05955 §3).

Their config.json says ``hidden_act: relu`` and means both.  The predictors in the checkpoints are not
part of what the model computes and are left behind.
"""

from __future__ import annotations

from pi2.architecture import Architecture
from pi2.errors import UnsupportedModel
from pi2.families._family import Family
from pi2.families._keys import Keys, from_keys
from pi2.families._llama_like import NAMES, llama_like
from pi2.families.mistral import whole_window


@from_keys(hidden_act="relu", rms_norm_eps=1e-6, num_key_value_heads=8, sliding_window=4096)
def configure(keys: Keys) -> Architecture:
    if keys.value("hidden_act") != "relu":
        raise UnsupportedModel(
            f"hidden_act {str(keys.value('hidden_act'))[:40]!r} is not supported in a dReLU model",
            hint='it should be "relu", which here stands for relu(gate) * relu(up)',
        )
    return llama_like(keys, "drelu", up_relu=True, window=whole_window(keys))


FAMILY = Family(
    name="drelu",
    architectures=("BambooForCausalLM",),
    configure=configure,
    names=NAMES,
)
