"""Configurations of Hugging Face: real ones are understood whole, everything else is refused by name."""

import contextlib
import dataclasses
import math

import numpy as np
import pytest
from huggingface_files import CONFIGS, LLAMA, OPT, REAL, SHAPE
from hypothesis import given, settings
from hypothesis import strategies as st
from pi2 import families, inventory
from pi2.architecture import Architecture
from pi2.errors import FormatError, Pi2Error, UnsupportedModel
from pi2.rope import RopeTable

GEMMA = CONFIGS["gemma3"]
QWEN = CONFIGS["qwen3"]
FAMILIES = families.all_families()


def describe(config, **changes):
    return families.describe({**config, **changes})[1]


@pytest.mark.parametrize("model", REAL)
def test_published_configurations_are_understood_whole(model):
    arch = describe(REAL[model])
    assert Architecture.from_dict(arch.to_dict()) == arch


def test_the_numbers_of_published_models_are_right():
    gemma = describe(REAL["gemma-3-1b-it"])
    assert gemma.embed_scale == 34.0  # sqrt(1152) = 33.94, rounded to bfloat16
    assert gemma.window_layers[:7] == (True,) * 5 + (False, True)
    assert (gemma.rope.theta, gemma.local_rope.theta, gemma.tied) == (1e6, 1e4, True)
    sparse = describe(REAL["TurboSparse-Mistral-Instruct"])
    assert (sparse.activation, sparse.up_relu, sparse.window, sparse.sparse) == ("relu", True, 4096, True)
    opt = describe(REAL["opt-125m"])
    assert (opt.rope, opt.norm, opt.gated, opt.qkv_bias, opt.tied) == (None, "layer", False, True, True)
    assert opt.norm_eps == 1e-5  # PyTorch's default, nowhere in the configuration


def test_no_two_families_claim_the_same_model():
    for names in ([f.name for f in FAMILIES], [a for f in FAMILIES for a in f.architectures],
                  [a for f in FAMILIES for a in f.gguf]):  # fmt: skip
        assert len(names) == len(set(names))
    for family in FAMILIES:
        assert all(families.by_architecture(name) is family for name in family.architectures)
        assert all(families.by_gguf(name) is family for name in family.gguf)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_every_tensor_of_a_family_has_one_foreign_name(family):
    arch = family.configure(CONFIGS[family.name])
    names = [*inventory.dense_matrices(arch), *inventory.dense_vectors(arch), "head.weight"]
    for layer in range(arch.n_layers):
        names += [*inventory.neuron_matrices(arch, layer).values(), *inventory.neuron_biases(arch, layer)]
    foreign = {family.foreign(name) for name in set(names)}
    assert len(foreign) == len(set(names))
    assert "{" not in "".join(foreign)


@pytest.mark.parametrize(
    ("find", "name", "nearest"),
    [(families.by_architecture, "LlamaForCasualLM", "did you mean 'LlamaForCausalLM'?"),
     (families.by_gguf, "qwen22", "did you mean 'qwen2'?"), (families.by_gguf, "??", "known: arcee")],
)  # fmt: skip
def test_an_unknown_family_is_refused_with_the_nearest(find, name, nearest):
    with pytest.raises(UnsupportedModel, match="no family") as e:
        find(name)
    assert nearest in e.value.hint


@pytest.mark.parametrize("value", [None, [], ["LlamaForCausalLM", "OPTForCausalLM"], "LlamaForCausalLM", [3]])
def test_a_configuration_must_name_one_architecture(value):
    with pytest.raises(UnsupportedModel, match="does not name one architecture"):
        describe(LLAMA, architectures=value)


@pytest.mark.parametrize("key", ["num_local_experts", "num_experts", "n_routed_experts", "moe_layer_freq"])
def test_mixtures_of_experts_are_refused_in_one_sentence(key):
    with pytest.raises(UnsupportedModel, match="mixture-of-experts models are not supported"):
        describe(LLAMA, architectures=["SomethingElse"], **{key: 8})


def test_foreign_quantisation_is_refused():
    with pytest.raises(UnsupportedModel, match="quantised by a method"):
        describe(LLAMA, quantization_config={"quant_method": "gptq"})


@settings(deadline=None, max_examples=60)
@given(
    config=st.sampled_from(list(CONFIGS.values())),
    key=st.text("abcdefgh_", min_size=5).filter(lambda k: not k.startswith(("_", "moe_"))),
    value=st.one_of(st.just(True), st.floats(allow_nan=False), st.integers(1), st.just("x"), st.just([1])),
)
def test_a_key_that_nobody_knows_is_refused(config, key, value):
    with pytest.raises(UnsupportedModel, match="does not know"):
        describe(config, **{key: value})


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_a_key_that_is_switched_off_does_no_harm(value):
    assert describe(LLAMA, attention_multiplier=value) == describe(LLAMA)


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [(LLAMA, "attention_multiplier", 0.5), (LLAMA, "sliding_window", 9), (LLAMA, "logits_scaling", 8.0),
     (CONFIGS["mistral"], "attention_bias", True), (CONFIGS["qwen2"], "mlp_bias", True),
     (LLAMA, "use_bidirectional_attention", True), (GEMMA, "hidden_act", "silu"), (OPT, "head_size", 3)],
)  # fmt: skip
def test_what_would_change_the_computation_is_refused(config, key, value):
    with pytest.raises(UnsupportedModel, match=key):
        describe(config, **{key: value})


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(10**300, 10**310), st.text(max_size=5),
    st.floats(), st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from([0, 1, -1, 1 << 24, 1 << 62, 1e308, 5e-324]),
)  # fmt: skip
READ = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    head_dim max_position_embeddings tie_word_embeddings rms_norm_eps norm_eps hidden_act hidden_activation
    attention_bias mlp_bias sliding_window use_sliding_window max_window_layers layer_types rope_theta
    rope_scaling rope_parameters partial_rotary_factor original_max_position_embeddings
    query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping rope_local_base_freq
    sliding_window_pattern use_bidirectional_attention dtype torch_dtype ffn_dim activation_function
    do_layer_norm_before enable_bias word_embed_proj_dim layer_norm_elementwise_affine architectures
"""
ROPE = """
    rope_theta rope_type type factor original_max_position_embeddings low_freq_factor high_freq_factor
    attention_factor beta_fast beta_slow mscale mscale_all_dim truncate partial_rotary_factor
"""


@settings(deadline=None, max_examples=400)
@given(
    config=st.sampled_from(list(CONFIGS.values())),
    changes=st.dictionaries(st.sampled_from(READ.split()), ANYTHING, min_size=1, max_size=2),
)
def test_an_odd_value_gives_a_sound_architecture_or_one_error(config, changes):
    arch = None
    with contextlib.suppress(Pi2Error):
        arch = describe(config, **changes)
    if arch is not None:
        assert Architecture.from_dict(arch.to_dict()) == arch


@settings(deadline=None, max_examples=400)
@given(
    kind=st.sampled_from(["linear", "llama3", "yarn", "default"]),
    changes=st.dictionaries(st.sampled_from(ROPE.split()), ANYTHING, min_size=1, max_size=3),
)
def test_an_odd_rope_gives_a_sound_architecture_or_one_error(kind, changes):
    sound = {"rope_type": kind, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    arch = None
    with contextlib.suppress(Pi2Error):
        arch = describe(LLAMA, rope_parameters={**sound, **changes})
    if arch is not None:
        assert Architecture.from_dict(arch.to_dict()) == arch
        assert np.isfinite(RopeTable(arch.rope).rotate(np.ones((1, 32, 16), np.float32), 0)).all()


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}


def test_rope_is_read_in_the_old_and_in_the_new_style():
    new = describe(LLAMA, rope_parameters={**YARN, "rope_theta": 5e5})
    old = describe(LLAMA, rope_theta=5e5, rope_scaling={**YARN, "type": "yarn"})
    assert new == old
    assert (new.rope.kind, new.rope.theta, new.rope.original_context) == ("yarn", 5e5, 8)
    assert new.rope.attn_factor == pytest.approx(0.1 * math.log(4) + 1)
    outside = describe(LLAMA, rope_scaling=YARN, original_max_position_embeddings=16)
    assert outside.rope.original_context == 16


def test_a_rope_without_its_original_context_is_no_description_of_a_model():
    arch = describe(LLAMA, rope_scaling=YARN)
    raw = arch.to_dict()
    raw["rope"] |= {"original_context": 0}
    with pytest.raises(FormatError, match="0 tokens of original context"):
        Architecture.from_dict(raw)


def test_gemmas_two_ropes_are_read_in_the_old_and_in_the_new_style():
    linear = {"rope_type": "linear", "factor": 8.0}
    new = describe(GEMMA, rope_parameters={"full_attention": {**linear, "rope_theta": 3e6},
                                           "sliding_attention": {"rope_theta": 2e4}})  # fmt: skip
    old = describe(GEMMA, rope_theta=3e6, rope_local_base_freq=2e4, rope_scaling=linear)
    assert new == old
    assert (new.rope.kind, new.local_rope.kind) == ("linear", "none")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "torch.bfloat16", "float32", None])
def test_gemmas_embedding_scale_has_the_precision_of_its_weights(dtype):
    scale = describe(GEMMA, hidden_size=1152, torch_dtype=dtype).embed_scale
    expected = {"float16": 33.9375, "bfloat16": 34.0, "torch.bfloat16": 34.0}.get(dtype, math.sqrt(1152))
    assert scale == expected


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (LLAMA, {"vocab_size": None}, "lacks vocab_size"),
        (LLAMA, {"hidden_size": -1}, "hidden_size has an impossible value"),
        (LLAMA, {"rms_norm_eps": "x"}, "rms_norm_eps has an impossible value"),
        (LLAMA, {"mlp_bias": 1}, "mlp_bias has an impossible value"),
        (LLAMA, {"num_hidden_layers": 5000}, "num_hidden_layers has an impossible value"),
        (LLAMA, {"hidden_act": "swiglu"}, "hidden_act 'swiglu' is not supported"),
        (LLAMA, {"head_dim": None, "num_attention_heads": 5}, "5 heads cannot share 64 dimensions"),
        (LLAMA, {"head_dim": 0}, "heads of no dimensions"),
        (LLAMA, {"layer_types": ["full_attention", "sliding_attention"]}, "no layers with a sliding window"),
        (LLAMA, {"layer_types": ["full_attention"]}, "layer_types has an impossible value"),
        (LLAMA, {"layer_types": ["full_attention", "chunked_attention"]}, "'chunked_attention' are not"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "rotates whole heads"),
        (LLAMA, {"rope_parameters": 3}, "rope_parameters has an impossible value"),
        (LLAMA, {"rope_parameters": {"rope_type": "longrope"}}, "'longrope' is not supported"),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        (LLAMA, {"rope_scaling": {"mrope_section": [1, 2]}}, "'mrope_section' is not supported"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 0}}, "RoPE factor 0"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "lacks factor"),
        (LLAMA, {"rope_scaling": {**YARN, "attention_factor": -1}}, "attention_factor has an impossible"),
        (LLAMA, {"rope_theta": 0.5}, "RoPE theta 0.5"),
        (LLAMA, {"rope_parameters": {"partial_rotary_factor": 2.0}}, "RoPE over 2.0 of a head"),
        (LLAMA, {"rope_scaling": YARN, "original_max_position_embeddings": 0}, "original_max_position"),
        (LLAMA, {"rope_scaling": {**YARN, "type": "llama3", "rope_type": None, "low_freq_factor": 4.0,
                                  "high_freq_factor": 4.0}}, "low_freq_factor 4.0"),
        (LLAMA, {"rope_scaling": {**YARN, "beta_fast": 0.5}}, "beta_slow 1.0, beta_fast 0.5"),
        (LLAMA, {"rope_scaling": {**YARN, "attention_factor": 1e9}}, "attn_factor 1000000000.0"),
        (QWEN, {"layer_types": ["sliding_attention"] * 2}, "switched off"),
        (CONFIGS["nemotron"], {"partial_rotary_factor": 0.2}, "RoPE over 3 of 16 dimensions"),
        (GEMMA, {"use_bidirectional_attention": True}, "both directions"),
        (GEMMA, {"query_pre_attn_scalar": None}, "query_pre_attn_scalar is null"),
        (GEMMA, {"sliding_window_pattern": 0}, "sliding_window_pattern = 0"),
        (GEMMA, {"sliding_window": None}, "lacks sliding_window"),
        (GEMMA, {"rope_parameters": {"rope_theta": 1e4}}, "does not name the kinds"),
        (CONFIGS["drelu"], {"hidden_act": "silu"}, "not supported in a dReLU model"),
        (OPT, {"word_embed_proj_dim": 32}, "another width"),
        (OPT, {"layer_norm_elementwise_affine": False}, "without weights"),
    ],
)  # fmt: skip
def test_impossible_and_unsupported_values_are_refused_by_name(config, changes, message):
    with pytest.raises(FormatError, match=message):
        describe(config, **changes)


def test_the_defaults_of_missing_keys_are_those_of_transformers():
    assert describe(LLAMA, num_key_value_heads=None).n_kv_heads == 4
    mistral = {
        k: v for k, v in CONFIGS["mistral"].items() if k not in ("num_key_value_heads", "sliding_window")
    }
    arch = describe(mistral, num_attention_heads=16)
    assert (arch.n_kv_heads, arch.window) == (8, 4096)
    assert describe(mistral, num_attention_heads=16, sliding_window=None).window is None
    assert describe(CONFIGS["nemotron"]).rope.dims == 8
    assert describe(CONFIGS["nemotron"], partial_rotary_factor=0.25).rope.dims == 4


def test_windows_of_qwen_lie_where_the_configuration_says():
    on = {"use_sliding_window": True, "sliding_window": 5}
    assert describe(QWEN, **on).window is None  # from layer 28 on, of which there are none
    assert describe(QWEN, **on, max_window_layers=1).window_layers == (False, True)
    kinds = ["sliding_attention", "full_attention"]
    assert describe(QWEN, **on, layer_types=kinds).window_layers == (True, False)
    assert describe(QWEN, sliding_window=5).window is None


def test_a_family_is_one_value():
    family = families.by_gguf("gemma3")
    assert dataclasses.replace(family) == family
    assert family.foreign("layers.17.ffn.norm.weight") == "model.layers.17.pre_feedforward_layernorm.weight"
    assert SHAPE["hidden_size"] == family.configure(GEMMA).d_model
