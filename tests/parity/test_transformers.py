"""Every family computes what transformers computes, on seeded random models, in float32.

max |difference| of the logits <= 1e-4 x max |logit| at every position, whichever way the prompt goes in,
and greedy decoding gives the same tokens.
"""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pi2.builtin.exact_predictor import ExactPredictor
from pi2.builtin.mmap_tier import MmapTier
from pi2.container.layout import QuantPlan
from pi2.container.reader import PiModel, open_model
from pi2.convert import convert
from pi2.decoder import Decoder
from pi2.formats.huggingface import HuggingFaceFormat
from pi2.kv_cache import KvCache
from pi2.plugins import Plugins

with warnings.catch_warnings():
    # transformers touches deprecated parts of its own dependencies while it is imported
    warnings.simplefilter("ignore")
    import transformers

BACKENDS = {"numpy": {}, "cpu": {"activations": "f32", "threads": "2"}}  # and how to make them exact
VOCAB, PROMPT, NEW = 300, 90, 64
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False,
    "rms_norm_eps": 0.03,  # large enough to show in the logits
}  # fmt: skip
OPT = {
    "vocab_size": VOCAB, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "word_embed_proj_dim": 64, "max_position_embeddings": 256,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
NEMOTRON = {name: value for name, value in SHAPE.items() if name != "rms_norm_eps"} | {"norm_eps": 0.03}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]


def keep_saved(path: Path) -> None:
    """The directory as transformers wrote it."""


def old_style_rope(path: Path) -> None:
    """``rope_parameters`` as transformers before version 5 wrote them."""
    config = json.loads((path / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    scaling["type"] = scaling.pop("rope_type")
    config["rope_scaling"] = scaling
    (path / "config.json").write_text(json.dumps(config))


def old_style_gemma(path: Path) -> None:
    """Gemma 3's local layers as numbers, the way its first checkpoints have them."""
    config = json.loads((path / "config.json").read_text())
    ropes = config.pop("rope_parameters")
    config["rope_theta"] = ropes["full_attention"].pop("rope_theta")
    config["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
    config["rope_scaling"] = ropes["full_attention"]
    del config["layer_types"]
    config["sliding_window_pattern"] = 2
    (path / "config.json").write_text(json.dumps(config))


def as_bamboo(path: Path) -> None:
    """Named as TurboSparse-Mistral is, whose class transformers does not have."""
    config = json.loads((path / "config.json").read_text())
    config |= {"architectures": ["BambooForCausalLM"], "model_type": "bamboo"}
    (path / "config.json").write_text(json.dumps(config))


def double_relu(model: Any) -> None:
    """relu(gate x) * relu(up x), as TurboSparse §3 defines it."""
    for layer in model.model.layers:
        mlp = layer.mlp
        mlp.forward = lambda x, m=mlp: m.down_proj(torch.relu(m.gate_proj(x)) * torch.relu(m.up_proj(x)))


def cap_attention(model: Any) -> None:
    """transformers 5.23 reads Gemma 3's attn_logit_softcapping and forgets to pass it on."""
    for layer in model.model.layers:
        attn = layer.self_attn
        attn.forward = functools.partial(attn.forward, softcap=attn.attn_logit_softcapping)


@dataclass(frozen=True)
class Case:
    family: str  # prefix of transformers' class names
    config: dict[str, Any] = field(default_factory=dict)
    shape: dict[str, Any] = field(default_factory=lambda: SHAPE)
    dtype: str = "float32"
    shard: str = "5GB"
    saved: Callable[[Path], None] = keep_saved
    model: Callable[[Any], None] = lambda model: None


CASES = {
    "llama": Case("Llama", {"hidden_act": "silu"}),
    "llama-tied-sharded": Case("Llama", {"hidden_act": "gelu", "tie_word_embeddings": True}, shard="60KB"),
    "llama-biases": Case("Llama", {"hidden_act": "relu", "attention_bias": True, "mlp_bias": True}),
    "llama-relu2": Case("Llama", {"hidden_act": "relu2", "num_key_value_heads": 4}),
    "llama-one-kv-head": Case("Llama", {"num_key_value_heads": 1, "head_dim": 32}),
    "llama-f16-sharded": Case("Llama", {"hidden_act": "relu"}, dtype="float16", shard="30KB"),
    "llama-bf16": Case("Llama", {"hidden_act": "gelu_pytorch_tanh"}, dtype="bfloat16"),
    "llama-llama3-rope": Case("Llama", {"rope_parameters": LLAMA3}),
    "llama-llama3-rope-old": Case("Llama", {"rope_parameters": LLAMA3}, saved=old_style_rope),
    "llama-linear-rope": Case("Llama", {"rope_parameters": LINEAR}),
    "llama-linear-rope-old": Case("Llama", {"rope_parameters": LINEAR}, saved=old_style_rope),
    "llama-yarn": Case("Llama", {"rope_parameters": YARN}),
    "llama-yarn-old": Case("Llama", {"rope_parameters": YARN}, saved=old_style_rope),
    "llama-yarn-exact": Case("Llama", {"rope_parameters": {**YARN, "truncate": False, "beta_fast": 8.0}}),
    "llama-yarn-mscale": Case("Llama", {"rope_parameters": {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5}}),
    "mistral-window": Case("Mistral", {"sliding_window": 16}),
    "mistral-whole": Case("Mistral", {"sliding_window": None, "hidden_act": "relu"}),
    "qwen2": Case("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": Case("Qwen2", {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1}),
    "qwen2-relu-yarn": Case("Qwen2", {"hidden_act": "relu", "rope_parameters": YARN}),
    "qwen3": Case("Qwen3", {"head_dim": 32}),
    "qwen3-window": Case("Qwen3", {"use_sliding_window": True, "sliding_window": 7, "layer_types": LAYERS,
                                   "attention_bias": True, "tie_word_embeddings": True}),
    "gemma3": Case("Gemma3", {"sliding_window": 12, "layer_types": LAYERS, "query_pre_attn_scalar": 24,
                              "tie_word_embeddings": True}),
    "gemma3-softcaps": Case("Gemma3", {"sliding_window": 2, "attn_logit_softcapping": 2.0, "hidden_size": 80,
                                       "final_logit_softcapping": 5.0, "num_hidden_layers": 7,
                                       "query_pre_attn_scalar": 1}, model=cap_attention),
    "gemma3-linear-rope": Case("Gemma3", {
        "sliding_window": 20, "layer_types": LAYERS, "hidden_activation": "relu", "attention_bias": True,
        "rope_parameters": {"full_attention": {**LINEAR, "rope_theta": 1e6},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}}),
    "gemma3-old-bf16": Case("Gemma3", {
        "sliding_window": 20, "layer_types": LAYERS,
        "rope_parameters": {"full_attention": {**LINEAR, "rope_theta": 1e6},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}},
        dtype="bfloat16", saved=old_style_gemma),
    "opt": Case("OPT", shape=OPT),
    "opt-post-norm": Case("OPT", {"do_layer_norm_before": False}, shape=OPT),
    "opt-untied-gelu": Case("OPT", {"activation_function": "gelu", "enable_bias": False,
                                    "tie_word_embeddings": False}, shape=OPT),
    "opt-sharded-f16": Case("OPT", {"_remove_final_layer_norm": True}, shape=OPT, dtype="float16",
                            shard="50KB"),
    "arcee": Case("Arcee"),
    "arcee-yarn-biases": Case("Arcee", {"attention_bias": True, "mlp_bias": True, "rope_parameters": YARN}),
    "nemotron": Case("Nemotron", shape=NEMOTRON),
    "nemotron-biases": Case("Nemotron", {"attention_bias": True, "mlp_bias": True, "hidden_act": "silu",
                                         "partial_rotary_factor": 0.25, "tie_word_embeddings": True},
                            shape=NEMOTRON),
    "turbosparse": Case("Mistral", {"hidden_act": "relu", "sliding_window": 40}, saved=as_bamboo,
                        model=double_relu),
}  # fmt: skip


@dataclass
class Pair:
    """The peer's answers, and ours to come."""

    prompt: list[int]
    logits: np.ndarray[Any, Any]  # (PROMPT, vocab)
    greedy: list[int]
    decoder: Decoder

    def cache(self) -> KvCache:
        return KvCache(self.decoder.arch)

    def check(self, ours: Any) -> None:
        assert ours.shape == self.logits.shape
        assert np.isfinite(self.logits).all()
        bound = 1e-4 * np.abs(self.logits).max()
        assert np.abs(ours - self.logits).max() <= bound


@dataclass
class Peer:
    """What transformers answers, and the same model converted for us."""

    prompt: list[int]
    logits: np.ndarray[Any, Any]
    greedy: list[int]
    model: PiModel


@pytest.fixture(scope="module", params=CASES)
def peer(request, tmp_path_factory):
    case = CASES[request.param]
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp(request.param)
    model = build(case, seed=list(CASES).index(request.param))
    prompt = np.random.default_rng(5).integers(0, VOCAB, PROMPT).tolist()
    save(model, case, directory / "theirs")
    logits, greedy = answers(model, prompt)
    source = HuggingFaceFormat.open().load(directory / "theirs")
    tier = MmapTier.open()
    opened = open_model(convert(source, directory / "ours", QuantPlan.named("f32")), tier)
    assert opened.architecture == source.architecture
    yield Peer(prompt, logits, greedy, opened)
    tier.close()


@pytest.fixture(scope="module", params=BACKENDS)
def pair(request, peer):
    plugins = Plugins.installed()
    if request.param not in plugins.of("backends"):
        pytest.skip(f"the backend {request.param} is not installed")
    backend = plugins.pick("backends", request.param).open(BACKENDS[request.param])
    decoder = Decoder(peer.model, backend, ExactPredictor.open())
    yield Pair(peer.prompt, peer.logits, peer.greedy, decoder)
    backend.close()


def build(case: Case, seed: int) -> Any:
    """A model whose every part matters: unit-scale hidden states, visible biases, norms that are not flat."""
    config_class = "Gemma3TextConfig" if case.family == "Gemma3" else f"{case.family}Config"
    config = getattr(transformers, config_class)(**{**case.shape, **case.config})
    config._attn_implementation = "eager"  # the only one that knows softcaps
    model = getattr(transformers, f"{case.family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                flat = 0.0 if name.endswith("bias") else weight.mean()  # 1, or 0 where w - 1 is stored
                weight.copy_(flat + 0.2 * noise)
            else:
                weight.copy_(noise if "embed" in name else noise * 1.5 * weight.shape[1] ** -0.5)
            weight.copy_(weight.to(getattr(torch, case.dtype)))
    case.model(model)
    return model


def save(model: Any, case: Case, path: Path) -> None:
    with warnings.catch_warnings():
        # PyTorch deprecates a storage class that transformers still asks for
        warnings.simplefilter("ignore")
        stored = copy.deepcopy(model).to(getattr(torch, case.dtype))
        stored.save_pretrained(path, max_shard_size=case.shard)
    assert (path / "model.safetensors").exists() == (case.shard == "5GB")
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"}}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    case.saved(path)


def answers(model: Any, prompt: list[int]) -> tuple[np.ndarray[Any, Any], list[int]]:
    """Logits at every position, and the next tokens of greedy decoding, with nothing to stop it."""
    ids = torch.tensor([prompt])
    with torch.no_grad(), warnings.catch_warnings():
        # generate() asks for deprecated parts of transformers itself
        warnings.simplefilter("ignore")
        logits = model(ids).logits[0].numpy()
        settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=NEW, pad_token_id=0)
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return logits, tokens[0, PROMPT:].tolist()


def test_prefill_in_one_go_gives_the_same_logits(pair):
    pair.check(pair.decoder.forward(np.array(pair.prompt), pair.cache(), all_logits=True))


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_prefill_in_chunks_gives_the_same_logits(pair, chunk):
    cache, ids = pair.cache(), np.array(pair.prompt)
    parts = [pair.decoder.forward(ids[i : i + chunk], cache, all_logits=True)
             for i in range(0, len(ids), chunk)]  # fmt: skip
    pair.check(np.concatenate(parts))


def test_greedy_decoding_gives_the_same_tokens(pair):
    cache, ours = pair.cache(), []
    logits = pair.decoder.forward(np.array(pair.prompt), cache)
    for _ in range(NEW):
        ours.append(int(logits.argmax()))
        logits = pair.decoder.forward(np.array(ours[-1:]), cache)
    assert len(pair.greedy) == NEW
    assert ours == pair.greedy
