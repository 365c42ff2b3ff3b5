"""Models in GGUF files: every tensor arrives bit for bit, every key is understood or refused."""

import struct

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from gguf_files import BASE, FAMILIES, random_tensors, shapes, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pi2.errors import FormatError, StorageError, UnsupportedModel
from pi2.formats.gguf_source import GgufFormat
from pi2.testing.model_format import ModelFormatTests

CANONICAL = {
    "token_embd": "embed", "output": "head", "output_norm": "final_norm", "attn_q": "attn.q",
    "attn_k": "attn.k",
    "attn_v": "attn.v", "attn_output": "attn.o", "attn_norm": "attn.norm", "ffn_norm": "ffn.norm",
    "ffn_gate": "ffn.gate", "ffn_up": "ffn.up", "ffn_down": "ffn.down", "attn_q_norm": "attn.q_norm",
    "attn_k_norm": "attn.k_norm", "post_attention_norm": "attn.post_norm", "post_ffw_norm": "ffn.post_norm",
}  # fmt: skip


class TestGgufFormat(ModelFormatTests):
    plugin = GgufFormat

    @classmethod
    def sample(cls, directory):
        return write(directory / "tiny.gguf", random_tensors(shapes(), Type.Q8_0))


def load(path):
    return GgufFormat.open().load(path)


def canonical(name):
    *layer, part, last = name.split(".")
    return ".".join([*(["layers", layer[1]] if layer else []), CANONICAL[part], last])


def halves(values, heads):
    """Rows of q or k as GGUF interleaves them -> as Hugging Face has them; llama.cpp's converter, undone."""
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def expected(name, values, arch):
    part = name.split(".")[-2]
    if arch in ("llama", "arcee") and part in ("attn_q", "attn_k"):
        return halves(values, BASE["heads" if part == "attn_q" else "kv_heads"])
    return values.T if part == "ffn_down" and values.ndim == 2 else values


def check_all(source, tensors, arch):
    for name, (_, kind, values) in tensors.items():
        own = canonical(name)
        found = source.vector(own) if values.ndim == 1 else source.tensor(own).to_f32()
        assert np.array_equal(found, expected(name, values, arch)), name
        if values.ndim == 2 and "ffn_down" not in name and kind in (Type.F32, Type.F16, Type.Q8_0, Type.Q4_0):
            assert source.tensor(own).dtype == kind.name.lower(), name


@pytest.mark.parametrize(
    "kind",
    [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1],
    ids=lambda t: t.name,
)
def test_every_tensor_of_a_model_arrives_with_its_exact_values(tmp_path, kind):
    tensors = random_tensors(shapes(), kind)
    source = load(write(tmp_path / "m.gguf", tensors))
    check_all(source, tensors, "llama")
    assert source.architecture.d_model == 64
    assert not source.architecture.tied
    assert bool(source.notes) == (kind not in (Type.F32, Type.F16, Type.BF16))


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from([Type.F32, Type.F16, Type.Q8_0, Type.Q4_0]),
    name=st.sampled_from(["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]),
    seed=st.integers(0, 2**32),
)
def test_arbitrary_blocks_keep_every_bit(tmp_path, kind, name, seed):
    tensors = random_tensors(shapes())
    foreign = f"blk.1.{name}.weight"
    rows, cols = tensors[foreign][2].shape
    size = {Type.F32: 4 * cols, Type.F16: 2 * cols, Type.Q8_0: cols // 32 * 34, Type.Q4_0: cols // 32 * 18}[
        kind
    ]
    raw = np.random.default_rng(seed).integers(0, 256, (rows, size), dtype=np.uint8)
    raw[:, 1::2] &= 0xBB  # no infinities: they would be equal too, but NaN is not equal to itself
    with np.errstate(all="ignore"):
        values = dequantize(raw.copy(), kind)
    floats = {Type.F32: np.float32, Type.F16: np.float16}.get(kind)
    tensors[foreign] = (raw if floats is None else raw.view(floats), kind, values)
    found = load(write(tmp_path / "m.gguf", tensors)).tensor(canonical(foreign)).to_f32()
    assert np.array_equal(found.view(np.uint32), expected(foreign, values, "llama").copy().view(np.uint32))


def test_k_quants_are_decoded_and_said_to_be(tmp_path):
    sizes = BASE | {"d": 256, "neurons": 256, "layers": 1}
    tensors = random_tensors(shapes(sizes))
    raw = np.random.default_rng(0).integers(0, 256, (256, 144), dtype=np.uint8)
    raw[:, 1:4:2] &= 0x3B
    for name in ("blk.0.ffn_gate.weight", "blk.0.ffn_down.weight"):
        tensors[name] = (raw, Type.Q4_K, dequantize(raw, Type.Q4_K))
    source = load(write(tmp_path / "m.gguf", tensors, sizes=sizes))
    assert np.array_equal(
        source.tensor("layers.0.ffn.gate.weight").to_f32(), tensors["blk.0.ffn_gate.weight"][2]
    )
    assert len(source.notes) == 2
    assert all("Q4_K" in note for note in source.notes)


BIASED = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
ARCHITECTURES = FAMILIES | {"llama": ({"biases": BIASED}, {})}


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_every_family_of_llama_cpps_is_read(tmp_path, arch):
    features, keys = ARCHITECTURES[arch]
    shaped = shapes(**features) | ({"output_norm.bias": (64,)} if arch == "nemotron" else {})
    tensors = random_tensors(shaped)
    source = load(write(tmp_path / "m.gguf", tensors, arch=arch, keys=keys))
    check_all(source, tensors, arch)
    found = source.architecture
    assert found.tied == features.get("tied", False)
    assert found.qkv_bias == ("attn_q" in features.get("biases", ()))
    assert found.ffn_bias == ("ffn_up" in features.get("biases", ()))
    activations = {"gemma3": "gelu_tanh", "arcee": "relu2", "nemotron": "relu2"}
    assert found.activation == activations.get(arch, "silu")
    assert found.rope.dims == (8 if arch == "nemotron" else 16)
    if arch == "gemma3":
        assert (found.window, found.window_layers) == (16, (True, True))
        assert (found.rope.theta, found.local_rope.theta, found.attn_scale) == (1e6, 1e4, 0.25)


def test_a_key_of_pi2s_own_names_another_activation(tmp_path):
    path = write(tmp_path / "m.gguf", random_tensors(shapes()), keys={"pi2.hidden_act": "relu"})
    assert load(path).architecture.activation == "relu"


def test_a_split_model_is_read_from_its_first_part_only(tmp_path):
    tensors = random_tensors(shapes())
    write(tmp_path / "m.gguf", tensors, split_max_tensors=7)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == 3
    check_all(load(parts[0]), tensors, "llama")
    with pytest.raises(FormatError, match="not the first"):
        load(parts[1])
    parts[2].unlink()
    with pytest.raises(StorageError, match="cannot be read"):
        load(parts[0])


def test_parts_that_repeat_a_tensor_are_refused(tmp_path):
    write(tmp_path / "m.gguf", random_tensors(shapes()), split_max_tensors=14)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    parts[1].write_bytes(parts[0].read_bytes())
    with pytest.raises(FormatError, match="same tensor"):
        load(parts[0])


def test_a_powerinfer_file_is_recognised_and_refused(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PWRI" + bytes(60))
    assert GgufFormat.recognises(path)
    with pytest.raises(UnsupportedModel, match="PowerInfer"):
        load(path)


@pytest.mark.parametrize("version", [1, 4, 3 << 24])
def test_other_versions_are_refused(tmp_path, version):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", version) + bytes(60))
    with pytest.raises(UnsupportedModel, match="of version"):
        load(path)


REFUSED = {
    "an unknown key": ({"llama.expert_count": 8}, {}, "expert_count"),
    "an encoder": ({"llama.attention.causal": False}, {}, "both directions"),
    "different widths": ({"llama.attention.value_length": 8}, {}, "different widths"),
    "no heads": ({"llama.attention.head_count": 0}, {}, "0 heads"),
    "an unknown architecture": ({"general.architecture": "mamba"}, {}, "mamba"),
    "layers that differ": ({"llama.feed_forward_length": [96, 64]}, {}, "layer to layer"),
    "longrope": ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0}, {}, "longrope"),
    "a missing key": ({"llama.context_length": None}, {}, "lack llama.context_length"),
    "a key of the wrong type": ({"llama.context_length": "many"}, {}, "impossible value, 'many'"),
    "a number that is none": ({"llama.rope.freq_base": float("nan")}, {}, "impossible value, nan"),
    "a flag in words": ({"tokenizer.ggml.bos_token_id": True}, {}, "impossible value, True"),
    "a negative scale": ({"llama.attention.scale": -1.0}, {}, "cannot be"),
    "too many layers": ({"llama.block_count": 1000}, {}, "1000 layers"),
    "a window where there is none": ({"llama.attention.sliding_window": 8}, {}, "sliding window"),
    "a half rotated, interleaved head": ({"llama.rope.dimension_count": 8}, {}, "rotates whole heads"),
    "a wrong number of heads": ({"llama.attention.head_count": 2}, {}, "has the shape"),
    "fused q, k, v": ({}, {"blk.0.attn_qkv.weight": (128, 64)}, "fused"),
    "a tensor too many": ({}, {"blk.0.ffn_gate_inp.weight": (4, 64)}, "has no place"),
    "a tensor too few": ({}, {"blk.1.ffn_up.weight": None}, "blk.1.ffn_up.weight is missing"),
    "no embedding": ({}, {"token_embd.weight": None}, "no tensor token_embd.weight"),
    "a RoPE of the wrong width": ({}, {"rope_freqs.weight": (3,)}, "does not match the heads"),
    "RoPE frequencies that are a matrix": ({}, {"rope_freqs.weight": (2, 4)}, "in two ways"),
    "odd RoPE frequencies": ({}, {"rope_freqs.weight": (8,)}, "not a scaling of Llama 3's kind"),
    "a shape that lies": ({}, {"blk.0.attn_v.weight": (16, 64)}, "has the shape"),
}


@pytest.mark.parametrize("what", sorted(REFUSED))
def test_what_would_compute_something_else_is_refused(tmp_path, what):
    keys, changes, message = REFUSED[what]
    shaped = {name: shape for name, shape in (shapes() | changes).items() if shape is not None}
    path = write(tmp_path / "m.gguf", random_tensors(shaped), keys=keys)
    with pytest.raises(FormatError, match=message):
        load(path)


def test_gemma_rotates_whole_heads(tmp_path):
    features, keys = ARCHITECTURES["gemma3"]
    keys = keys | {"gemma3.rope.dimension_count": 8}
    path = write(tmp_path / "m.gguf", random_tensors(shapes(**features)), arch="gemma3", keys=keys)
    with pytest.raises(UnsupportedModel, match="8 of 16 dimensions"):
        load(path)


def test_one_number_per_layer_is_one_number_if_all_are_the_same(tmp_path):
    keys = {"llama.feed_forward_length": [96, 96], "general.name": "Tiny", "general.license": "mit"}
    source = load(write(tmp_path / "m.gguf", random_tensors(shapes()), keys=keys))
    assert source.architecture.n_neurons == 96
    assert (source.provenance["name"], source.provenance["license"]) == ("Tiny", "mit")
    assert source.provenance["types"] == "F32 x 21"


def test_the_local_layers_of_gemma_may_have_a_frequency_of_their_own(tmp_path):
    features, keys = ARCHITECTURES["gemma3"]
    keys = keys | {"gemma3.rope.freq_base_swa": 500.0}
    path = write(tmp_path / "m.gguf", random_tensors(shapes(**features)), arch="gemma3", keys=keys)
    assert load(path).architecture.local_rope.theta == 500.0


def test_trailing_dimensions_of_one_do_not_matter(tmp_path):
    tensors = random_tensors(shapes())
    data, kind, values = tensors["blk.0.ffn_up.weight"]
    tensors["blk.0.ffn_up.weight"] = (data.reshape(1, 1, *data.shape), kind, values)
    check_all(load(write(tmp_path / "m.gguf", tensors)), tensors, "llama")
