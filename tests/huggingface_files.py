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

# The keys of published checkpoints, as they stand in their config.json.
REAL = {
    "SmolLM2-135M-Instruct": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
        "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True,
        "max_position_embeddings": 8192, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 9,
        "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.42.3",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "use_cache": True,
        "vocab_size": 49152,
    },
    "TurboSparse-Mistral-Instruct": {
        "_name_or_path": "checkpoint-500", "architectures": ["BambooForCausalLM"], "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_bamboo.BambooConfig"}, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "relu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "bamboo",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.41.0", "use_cache": False, "vocab_size": 32064,
    },
    "gemma-3-1b-it": {
        "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid",
        "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
        "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
        "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "pad_token_id": 0,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "use_cache": True,
        "vocab_size": 262144,
    },
    "opt-125m": {
        "_name_or_path": "facebook/opt-125m", "_remove_final_layer_norm": False, "activation_dropout": 0.0,
        "activation_function": "relu", "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0,
        "bos_token_id": 2, "do_layer_norm_before": True, "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 3072,
        "hidden_size": 768, "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048,
        "model_type": "opt", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1,
        "prefix": "</s>", "torch_dtype": "float16", "transformers_version": "4.21.0.dev0",
        "use_cache": True, "vocab_size": 50272, "word_embed_proj_dim": 768,
    },
}  # fmt: skip


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
