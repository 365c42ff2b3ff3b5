"""RoPE, windows and scales out of GGUF's metadata."""

import math

import numpy as np
import pytest
from gguf_files import random_tensors, shapes, write
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pi2.errors import FormatError, UnsupportedModel
from pi2.formats.gguf_config import config_of, llama3_scaling
from pi2.formats.gguf_metadata import Metadata
from pi2.formats.gguf_source import GgufFormat

USUAL = {
    "llama.embedding_length": 64, "llama.block_count": 3, "llama.attention.head_count": 4,
    "llama.feed_forward_length": 96, "llama.context_length": 512,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip


def config(changes, arch="llama"):
    pairs = {key.replace("llama", arch, 1): value for key, value in USUAL.items()}
    return config_of(Metadata(pairs | changes, "m.gguf"), arch, 100, {"output.weight"})


def divisors(theta, dims, factor, low, high, context):
    """What llama.cpp's converter writes into rope_freqs.weight (transformers: _compute_llama3_parameters)."""
    found = []
    for i in range(dims // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / dims)
        if wavelength < context / high:
            found.append(1.0)
        elif wavelength > context / low:
            found.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


@settings(deadline=None)
@given(
    theta=st.sampled_from([1e4, 5e5, 1e6]),
    dims=st.sampled_from([64, 128]),
    factor=st.sampled_from([2.0, 8.0, 32.0]),
    high=st.sampled_from([2.0, 4.0, 16.0]),
    original=st.sampled_from([2048, 4096, 8192]),
)
def test_llama_3s_parameters_come_back_from_its_frequencies(theta, dims, factor, high, original):
    given = divisors(theta, dims, factor, 1.0, high, original)
    # The factor shows if a wavelength is long enough, the band if two lie in it.
    assume(given.max() == np.float32(factor) and ((given > 1.001) & (given < 0.999 * factor)).sum() > 1)
    found = llama3_scaling(given, theta, 131072)
    again = divisors(
        theta,
        dims,
        found["factor"],
        found["low_freq_factor"],
        found["high_freq_factor"],
        found["original_max_position_embeddings"],
    )
    assert np.allclose(again, given, rtol=1e-3)


def test_the_parameters_of_llama_3_2_are_found_exactly():
    found = llama3_scaling(divisors(5e5, 64, 32.0, 1.0, 4.0, 8192), 5e5, 131072)
    assert found == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_frequencies_that_scale_nothing_are_no_scaling():
    assert llama3_scaling(np.ones(32, np.float32), 1e4, 4096) is None


@pytest.mark.parametrize(
    "values",
    [
        np.linspace(1, 3, 32),
        np.full(32, np.nan),
        np.zeros(32),
        np.full(32, -4.0),
        np.full(32, 1e9),
        np.arange(1, 33) % 7 + 1.0,
    ],
)
def test_other_frequencies_are_refused(values):
    with pytest.raises(UnsupportedModel, match="rope_freqs"):
        llama3_scaling(values.astype(np.float32), 1e4, 4096)


def test_llama_3s_frequencies_in_a_file_reach_the_architecture(tmp_path):
    frequencies = divisors(5e5, 16, 32.0, 1.0, 4.0, 8192)
    tensors = random_tensors(shapes() | {"rope_freqs.weight": (8,)})
    tensors["rope_freqs.weight"] = (frequencies, tensors["rope_freqs.weight"][1], frequencies)
    path = write(tmp_path / "m.gguf", tensors, keys={"llama.rope.freq_base": 5e5})
    rope = GgufFormat.open().load(path).architecture.rope
    assert (rope.kind, rope.factor, rope.original_context, rope.high_freq_factor) == (
        "llama3",
        32.0,
        8192,
        4.0,
    )


def test_a_plain_rope_rotates_whole_heads():
    found = config({})
    assert (found["rope_theta"], found["partial_rotary_factor"], found["head_dim"]) == (1e4, 1.0, 16)
    assert "rope_scaling" not in found


@given(head_dim=st.integers(2, 512), data=st.data())
def test_a_share_of_a_head_stands_for_the_same_whole_number(head_dim, data):
    dims = data.draw(st.integers(1, head_dim))
    found = config({"llama.attention.key_length": head_dim, "llama.rope.dimension_count": dims})
    assert int(head_dim * found["partial_rotary_factor"]) == dims


@pytest.mark.parametrize(
    "keys",
    [
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scaling.factor": 4.0},
        {"llama.rope.scale_linear": 4.0},
    ],
)
def test_linear_scaling_is_read_old_and_new(keys):
    assert config(keys)["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    "keys",
    [
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0},
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 0.0},
    ],
)
def test_scaling_by_nothing_is_no_scaling(keys):
    assert "rope_scaling" not in config(keys)


def test_yarn_takes_llama_cpps_factors():
    found = config(
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 128,
            "llama.rope.scaling.yarn_attn_factor": 0.5,
            "llama.rope.scaling.yarn_beta_fast": 16.0,
        }
    )["rope_scaling"]
    assert found == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "attention_factor": pytest.approx(0.5 * (1 + 0.1 * math.log(4))),
        "beta_fast": 16.0,
        "beta_slow": 1.0,
    }


@pytest.mark.parametrize(
    "keys",
    [
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 0.5},
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 2.0,
            "llama.rope.scaling.yarn_ext_factor": 0.5,
        },
        {
            "llama.rope.scaling.type": "linear",
            "llama.rope.scaling.factor": 2.0,
            "llama.rope.scaling.attn_factor": 2.0,
        },
    ],
)
def test_scalings_that_pi2_does_not_compute_are_refused(keys):
    with pytest.raises(UnsupportedModel, match="RoPE scaling"):
        config(keys)


def test_windows_follow_the_files_pattern_or_the_architectures():
    window = {"gemma3.attention.sliding_window": 16, "gemma3.block_count": 7}
    local, full = "sliding_attention", "full_attention"
    assert config(window, "gemma3")["layer_types"] == [local] * 5 + [full, local]
    period = window | {"gemma3.attention.sliding_window_pattern": 2, "gemma3.block_count": 3}
    assert config(period, "gemma3")["layer_types"] == [local, full, local]
    flags = {
        "llama.attention.sliding_window": 16,
        "llama.attention.sliding_window_pattern": np.array([0, 1, 0], "u1"),
    }
    assert config(flags)["layer_types"] == [full, local, full]
    assert config({"llama.attention.sliding_window": 16})["layer_types"] == [local] * 3
    assert config({}, "gemma3")["sliding_window"] is None


def test_absurdly_many_layers_make_no_list():
    with pytest.raises(FormatError, match="layers cannot be"):
        config({"llama.attention.sliding_window": 16, "llama.block_count": 1 << 24})


def test_scales_and_caps_are_passed_on():
    found = config(
        {"llama.attention.scale": 0.25, "llama.logit_scale": 0.5, "llama.attn_logit_softcapping": 50.0}
    )
    assert found["query_pre_attn_scalar"] == 16.0
    assert (found["logit_scale"], found["attn_logit_softcapping"]) == (0.5, 50.0)
    assert config({"gemma3.block_count": 62}, "gemma3")["query_pre_attn_scalar"] == 16
    assert config({"gemma3.attention.key_length": 32}, "gemma3")["query_pre_attn_scalar"] == 32


def test_typed_access_refuses_values_of_another_type():
    meta = Metadata({"text": "a", "number": 1.5, "array": np.array([1, 2], "u4")}, "m.gguf")
    for ask in (
        lambda: meta.flag("text", False),
        lambda: meta.text("number"),
        lambda: meta.strings("array"),
        lambda: meta.numbers("array", 3),
        lambda: meta.integer("number"),
        lambda: meta.number("text"),
    ):
        with pytest.raises(FormatError, match="impossible value"):
            ask()
    with pytest.raises(FormatError, match="lack missing"):
        meta.strings("missing")
