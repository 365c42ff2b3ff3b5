"""Reading a Hugging Face config.json so that no key which changes the computation is overlooked."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from pi2.architecture import Activation, Architecture
from pi2.errors import FormatError, UnsupportedModel

_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}

# Bookkeeping, training and generation settings: whatever their value, the forward pass is the same.
_INERT_NAMES = """
    activation_dropout architectures attention_dropout attn_implementation attn_pdrop auto_map
    bad_words_ids begin_suppress_tokens bos_token_id cache_implementation chunk_size_feed_forward
    classifier_dropout cls_token_id decoder_start_token_id diversity_penalty do_sample dropout dtype
    early_stopping embd_pdrop encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id hidden_dropout id2label init_std
    initializer_range is_decoder is_llama_config keys_to_ignore_at_inference label2id layerdrop
    length_penalty max_length min_length model_type name_or_path no_repeat_ngram_size
    num_beam_groups num_beams num_labels num_return_sequences output_attentions output_hidden_states
    output_scores pad_token_id prefix pretraining_tp problem_type remove_invalid_values
    repetition_penalty resid_pdrop return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
    torch_dtype torchscript transformers_version typical_p unk_token_id use_bfloat16 use_cache
    transformers.js_config
"""
_INERT = frozenset(_INERT_NAMES.split())
_INERT_PREFIXES = ("_", "unsloth_")


class Keys:
    """The keys of a config.json, with the defaults that Hugging Face's class gives to missing ones.

    Remembers what was asked for, so that ``refuse_unread`` can tell what nobody understood.
    """

    def __init__(self, raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._raw = {**defaults, **raw}
        self._read: set[str] = set()

    def value(self, name: str) -> Any:
        """Whatever the key holds; None if it is missing or null."""
        self._read.add(name)
        return self._raw.get(name)

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number from 0 to 2^24.  ``default`` stands in for null and for a missing key."""
        value = self._present(name, default)
        if type(value) is not int or not 0 <= value <= 1 << 24:
            raise _impossible(name, value)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number.  ``default`` stands in for null and for a missing key."""
        value = self._present(name, default)
        if type(value) not in (int, float) or not _is_finite(value):
            raise _impossible(name, value)
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._present(name, default)
        if type(value) is not bool:
            raise _impossible(name, value)
        return value

    def positive_or_none(self, name: str) -> float | None:
        """A number > 0, or None if the key is missing or null."""
        if self.value(name) is None:
            return None
        value = self.number(name)
        if value <= 0:
            raise _impossible(name, value)
        return value

    def section(self, name: str) -> Mapping[str, Any]:
        """A mapping; empty if the key is missing or null."""
        value = self.value(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise _impossible(name, value)
        return value

    def layers(self) -> int:
        """The number of layers, small enough to make a list of them."""
        layers = self.integer("num_hidden_layers")
        if not 0 < layers <= 4096:
            raise _impossible("num_hidden_layers", layers)
        return layers

    def layer_types(self) -> list[str]:
        """The kind of attention of each layer; empty if the configuration does not say."""
        value = self.value("layer_types")
        if value is None:
            return []
        if not isinstance(value, list) or len(value) != self.layers():
            raise _impossible("layer_types", value)
        for kind in value:
            if kind not in ("full_attention", "sliding_attention"):
                raise UnsupportedModel(f"layers of the type {str(kind)[:40]!r} are not supported")
        return value

    def activation(self, name: str) -> Activation:
        """The activation function that the key names.  Raises UnsupportedModel if pi2 has no such."""
        value = self.value(name)
        known = ", ".join(sorted(_ACTIVATIONS))
        if not isinstance(value, str) or value not in _ACTIVATIONS:
            raise UnsupportedModel(f"{name} {str(value)[:40]!r} is not supported", hint=f"supported: {known}")
        return _ACTIVATIONS[value]

    def refuse_unread(self) -> None:
        """Raise UnsupportedModel if a key is left that may change the computation."""
        for name, value in self._raw.items():
            off = value is None or value is False or value in ("", [], {})
            if name not in self._read and not off and not _is_inert(name):
                raise UnsupportedModel(
                    f"config.json has {name} = {str(value)[:60]}, which pi2 does not know for this family",
                    hint="remove the key if it does not change what the model computes",
                )

    def _present(self, name: str, default: Any) -> Any:
        value = self.value(name)
        if value is not None:
            return value
        if default is None:
            raise FormatError(f"config.json lacks {name}")
        return default


def from_keys(
    **defaults: Any,
) -> Callable[[Callable[[Keys], Architecture]], Callable[[Mapping[str, Any]], Architecture]]:
    """Make ``Family.configure`` of a function that reads ``Keys`` and reads all that matters.

    ``defaults`` are the values that Hugging Face's configuration class gives to missing keys.
    """

    def wrap(describe: Callable[[Keys], Architecture]) -> Callable[[Mapping[str, Any]], Architecture]:
        @functools.wraps(describe)
        def configure(raw: Mapping[str, Any]) -> Architecture:
            keys = Keys(raw, defaults)
            architecture = describe(keys)
            keys.refuse_unread()
            architecture.check()
            return architecture

        return configure

    return wrap


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond any float
        return False


def _is_inert(name: str) -> bool:
    return name in _INERT or name.startswith(_INERT_PREFIXES)


def _impossible(name: str, value: Any) -> FormatError:
    return FormatError(f"config.json: {name} has an impossible value {str(value)[:60]!r}")
