"""Models in Hugging Face's layout: every tensor arrives exactly, whatever is odd is refused."""

import json

import numpy as np
import pytest
from huggingface_files import CONFIGS, LLAMA, OPT, stored, tensors, write, write_file
from pi2 import inventory
from pi2.container.layout import QuantPlan
from pi2.convert import convert
from pi2.errors import FormatError, StorageError, UnsupportedModel
from pi2.formats.huggingface import HuggingFaceFormat
from pi2.testing.model_format import ModelFormatTests, arrays


class TestHuggingFaceFormat(ModelFormatTests):
    plugin = HuggingFaceFormat

    @classmethod
    def sample(cls, directory):
        return write(directory / "tiny", LLAMA)


class TestShardedHuggingFaceFormat(ModelFormatTests):
    plugin = HuggingFaceFormat

    @classmethod
    def sample(cls, directory):
        path = write(directory / "tiny", OPT, dtype="BF16", shards=3)
        (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
        return path


def load(path):
    return HuggingFaceFormat.open().load(path)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_of_every_family_arrives_exactly(tmp_path, family, shards):
    held, expected = tensors(CONFIGS[family])
    source = load(write(tmp_path / "m", CONFIGS[family], held, shards=shards))
    assert source.architecture.family == family
    for name, values in arrays(source):
        if name in expected.lengths:  # w - 1 is stored, so adding 1 rounds
            np.testing.assert_allclose(values, expected.vector(name), rtol=0, atol=1e-7)
        else:
            np.testing.assert_array_equal(values, expected.tensor(name).to_f32())


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_is_taken_over_without_a_change(tmp_path, dtype):
    held, _ = tensors(OPT)
    source = load(write(tmp_path / "m", OPT, held, dtype=dtype))
    raw = np.frombuffer(stored(held["model.decoder.layers.1.fc2.weight"], dtype), np.uint16).reshape(64, 70)
    down = source.tensor("layers.1.ffn.down.weight")
    if dtype == "F16":
        assert down.dtype == "f16"
        np.testing.assert_array_equal(down.data.view(np.uint16), raw.T)
    else:
        np.testing.assert_array_equal(down.to_f32().view(np.uint32), raw.T.astype(np.uint32) << 16)
    bias = np.frombuffer(stored(held["model.decoder.layers.1.fc2.bias"], dtype), np.uint16)
    kept = source.vector("layers.1.ffn.down.bias")
    exact = bias.view(np.float16) if dtype == "F16" else (bias.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(kept, exact.astype(np.float32))


def test_an_imported_model_can_be_converted(tmp_path):
    source = load(write(tmp_path / "m", LLAMA, shards=2))
    assert (convert(source, tmp_path / "out", QuantPlan.named("f16")) / "pi2.yaml").exists()
    assert HuggingFaceFormat.recognises(tmp_path / "m")
    assert not HuggingFaceFormat.recognises(tmp_path / "out")


def test_names_without_their_first_part_are_found(tmp_path):
    held = {name.removeprefix("model."): values for name, values in tensors(OPT)[0].items()}
    assert load(write(tmp_path / "m", OPT, held)).tensor("embed.weight").rows == 50


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_that_is_stored_as_well_counts_if_it_differs(tmp_path, same):
    config = {**LLAMA, "tie_word_embeddings": True}
    held, _ = tensors(config)
    embed = held["model.embed_tokens.weight"]
    held["lm_head.weight"] = embed if same else embed + 1
    source = load(write(tmp_path / "m", config, held))
    assert source.architecture.tied is same
    assert bool(source.notes) is not same
    assert ("head.weight" in inventory.dense_matrices(source.architecture)) is not same


def test_a_missing_head_is_tied_and_said(tmp_path):
    held, _ = tensors(LLAMA)
    del held["lm_head.weight"]
    source = load(write(tmp_path / "m", LLAMA, held))
    assert source.architecture.tied
    assert "embedding is used" in source.notes[0]


def test_tensors_that_no_forward_pass_needs_are_left_out_and_said(tmp_path):
    held, _ = tensors(CONFIGS["drelu"])
    held["model.layers.0.mlp.predictor.fc1.weight"] = np.zeros((4, 64), np.float32)
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    source = load(write(tmp_path / "m", CONFIGS["drelu"], held))
    assert "2 tensors" in source.notes[0]


def test_a_tensor_that_the_family_lacks_is_refused(tmp_path):
    held, _ = tensors(LLAMA)
    held["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
    with pytest.raises(FormatError, match="unknown to this family"):
        load(write(tmp_path / "m", LLAMA, held))


def test_a_missing_tensor_is_refused(tmp_path):
    held, _ = tensors(LLAMA)
    del held["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(FormatError, match="lack the tensor"):
        load(write(tmp_path / "m", LLAMA, held))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F64"])
def test_other_types_of_weights_are_refused(tmp_path, dtype):
    with pytest.raises(UnsupportedModel, match=dtype):
        load(write(tmp_path / "m", LLAMA, dtype=dtype))


def test_a_wrong_shape_is_refused(tmp_path):
    held, _ = tensors(LLAMA)
    held["model.norm.weight"] = np.zeros(63, np.float32)
    with pytest.raises(FormatError, match=r"has the shape \[63\], not \[64\]"):
        load(write(tmp_path / "m", LLAMA, held))


def test_more_layers_than_tensors_are_refused(tmp_path):
    path = write(tmp_path / "m", LLAMA)
    (path / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 4000}))
    with pytest.raises(FormatError, match="claims 4000 layers"):
        load(path)


OUTSIDE = ["../m.safetensors", "/m.safetensors", "a/b.safetensors", "c:x.safetensors", "..\\m.safetensors"]


@pytest.mark.parametrize("file", [*OUTSIDE, "x.bin", "x\0.safetensors", "", 7, None])
def test_an_index_may_only_name_shards_in_its_directory(tmp_path, file):
    path = write(tmp_path / "m", LLAMA, shards=2)
    write_file(tmp_path / "m.safetensors", tensors(LLAMA)[0])
    index = {"weight_map": {"model.norm.weight": file}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="cannot be a shard"):
        load(path)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": [1]}])
def test_an_index_without_a_map_is_refused(tmp_path, index):
    path = write(tmp_path / "m", LLAMA, shards=2)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="no weight_map"):
        load(path)


def test_an_index_that_misplaces_a_tensor_is_refused(tmp_path):
    path = write(tmp_path / "m", LLAMA, shards=2)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"] = dict.fromkeys(index["weight_map"], files[0])
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="places there"):
        load(path)


def test_a_missing_shard_is_refused(tmp_path):
    path = write(tmp_path / "m", LLAMA, shards=2)
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FormatError, match="lacks 'model-00002"):
        load(path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-2.bin", "consolidated.00.pth"])
def test_pickles_are_never_opened(tmp_path, name):
    path = write(tmp_path / "m", LLAMA)
    (path / "model.safetensors").rename(path / name)
    with pytest.raises(UnsupportedModel, match="pickles") as e:
        load(path)
    assert "save_pretrained" in e.value.hint


def test_a_directory_without_weights_is_refused(tmp_path):
    path = write(tmp_path / "m", LLAMA)
    (path / "model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"holds no model\.safetensors") as e:
        load(path)
    assert "fetch" in e.value.hint
    (path / "tiny.gguf").touch()
    with pytest.raises(FormatError, match="holds no") as e:
        load(path)
    assert "tiny.gguf" in e.value.hint


def test_a_file_that_shrinks_while_open_is_an_error(tmp_path):
    path = write(tmp_path / "m", LLAMA)
    source = load(path)
    source.tensor("embed.weight")
    with (path / "model.safetensors").open("r+b") as f:
        f.truncate(5000)
    with pytest.raises(StorageError, match="shrank"):
        source.tensor("head.weight")


def test_a_file_that_becomes_empty_is_an_error(tmp_path):
    path = write(tmp_path / "m", LLAMA)
    source = load(path)
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(StorageError):
        source.tensor("embed.weight")


def test_a_file_that_may_not_be_read_is_an_error(tmp_path):
    path = write(tmp_path / "m", LLAMA)
    (path / "config.json").unlink()
    (path / "config.json").symlink_to("config.json")  # a loop
    assert not HuggingFaceFormat.recognises(path)
    with pytest.raises((FormatError, StorageError)):
        load(path)


def test_the_source_is_identified_by_its_configuration_and_headers(tmp_path):
    one = load(write(tmp_path / "a", LLAMA)).provenance
    two = load(write(tmp_path / "b", {**LLAMA, "rms_norm_eps": 1e-3})).provenance
    assert one["headers_sha256"] == two["headers_sha256"]
    assert one["config_sha256"] != two["config_sha256"]
    assert (one["format"], one["name"]) == ("huggingface", "a")
