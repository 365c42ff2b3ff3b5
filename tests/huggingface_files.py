"""Small Hugging Face directories, written without transformers."""

import json

import numpy as np
from pi2 import families, inventory
from pi2.container.safetensors_file import build_header
from sources import TOKENIZER, RandomSource

SHAPE = {
    "vocab_size": 50, "hidden_size": 64, "intermediate_size": 70, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 32,
}  # fmt: skip
LLAMA = {"architectures": ["LlamaForCausalLM"], **SHAPE, "eos_token_id": 2}
OPT = {
    "architectures": ["OPTForCausalLM"], "vocab_size": 50, "hidden_size": 64, "ffn_dim": 70,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32,
}  # fmt: skip
CONFIGS = {
    "arcee": {**SHAPE, "architectures": ["ArceeForCausalLM"], "mlp_bias": True},
    "drelu": {**SHAPE, "architectures": ["BambooForCausalLM"], "model_type": "bamboo", "hidden_act": "relu"},
    "gemma3": {**SHAPE, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"},
    "llama": LLAMA,
    "mistral": {**SHAPE, "architectures": ["MistralForCausalLM"], "sliding_window": 8},
    "nemotron": {**SHAPE, "architectures": ["NemotronForCausalLM"]},
    "opt": OPT,
    "qwen2": {**SHAPE, "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {**SHAPE, "architectures": ["Qwen3ForCausalLM"]},
}


def tensors(config, seed=0):
    """Hugging Face name -> float32 array, as the files hold it, and the source of the canonical values."""
    family, arch = families.describe(config)
    source = RandomSource(arch, seed)
    names = [*inventory.dense_matrices(arch), *inventory.dense_vectors(arch)]
    for layer in range(arch.n_layers):
        names += [*inventory.neuron_matrices(arch, layer).values(), *inventory.neuron_biases(arch, layer)]
    held = {}
    for name in names:
        values = source.vector(name) if name in source.lengths else source.tensor(name).to_f32()
        if name.endswith("ffn.down.weight"):
            values = values.T
        if name.endswith("norm.weight"):
            values = values - np.float32(family.norm_offset)
        if name == "embed.positions":
            values = np.concatenate((np.full((family.position_offset, arch.d_model), 9e4 / 2), values))
        held[family.foreign(name)] = np.ascontiguousarray(values, np.float32)
    return held, source


def stored(values, dtype):
    """float32 -> the bytes of a safetensors type; bf16 by cutting, since the values need not be round."""
    if dtype == "BF16":
        return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    kinds = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "F8_E4M3": np.uint8}
    return values.astype(kinds[dtype]).tobytes()


def write_file(path, held, dtype="F32"):
    head, _ = build_header({name: (dtype, v.shape) for name, v in held.items()}, {"format": "pt"}, 8)
    path.write_bytes(head + b"".join(stored(v, dtype) for v in held.values()))


def write(directory, config, held=None, *, dtype="F32", shards=1):
    """A complete directory; ``shards`` > 1 spreads the tensors and writes the index."""
    directory.mkdir(parents=True, exist_ok=True)
    held = tensors(config)[0] if held is None else held
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(TOKENIZER)
    if shards == 1:
        write_file(directory / "model.safetensors", held, dtype)
        return directory
    names, places = list(held), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        write_file(directory / file, {name: held[name] for name in names[i::shards]}, dtype)
        places |= dict.fromkeys(names[i::shards], file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
