"""``pi2 convert`` and ``pi2 inspect``."""

from __future__ import annotations

import json

from command_line import assert_error, pi2
from pi2.testing.models import toy_architecture


def test_convert_inspect_and_run_follow_one_another(hugging_face, tmp_path):
    destination = tmp_path / "made here.pi2"
    args = ("convert", hugging_face, destination, "--quant", "q4_0", "--quant-down", "f16")
    result = pi2(*args)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "100%" in result.stderr
    assert f"next: pi2 run --model '{destination}'" in result.stderr
    assert_error(pi2(*args), "exists already", "--force")
    assert (
        pi2(*args, "--force", "--quant-embed", "f32", "--quant-attention", "q8_0", "--page", 64).exit_code
        == 0
    )
    found = json.loads(pi2("inspect", destination, "--json", "--verify").stdout)
    assert found["quantisation"] == {
        **{"gate": "q4_0", "up": "q4_0", "down": "f16", "attention": "q8_0", "embed": "f32"},
        **({"head": "f32"} if "head" in found["quantisation"] else {}),
    }
    assert found["checksums"] == "correct"
    assert pi2("run", "--model", destination, "--raw", "Hi", "-q", "--max-tokens", 2).exit_code == 0


def test_convert_says_which_formats_there_are(hugging_face, tmp_path):
    assert_error(pi2("convert", hugging_face, tmp_path / "x", "--quant", "q9"), "'q9'", "q4_0")
    odd = pi2("convert", hugging_face, tmp_path / "x", "--page", "1000")
    assert_error(odd, "1000 bytes", "a power of two from 64")
    assert_error(pi2("convert", tmp_path / "no", tmp_path / "x"), "no such file")


def test_inspect_accounts_for_every_byte_and_parameter(toy):
    found = json.loads(pi2("inspect", toy, "--json").stdout)
    files = found["bytes_by_file"]
    weights = files["dense.safetensors"] + files["neurons.safetensors"]
    assert sum(found["bytes_by_part"].values()) == weights
    assert found["bytes"] == sum(files.values())
    arch = toy_architecture()
    attention = arch.d_model * arch.head_dim * 2 * (arch.n_heads + arch.n_kv_heads)
    norms = arch.d_model * (2 * arch.n_layers + 1)
    per_layer = attention + 3 * arch.n_neurons * arch.d_model
    assert found["parameters"] == arch.vocab_size * arch.d_model + arch.n_layers * per_layer + norms
    shown = pi2("inspect", toy).stdout
    assert "0.1 million" in shown
    assert "bytes by part" in shown


def test_inspect_shows_foreign_models_before_they_are_converted(hugging_face):
    found = json.loads(pi2("inspect", hugging_face, "--json").stdout)
    assert found["family"] == "llama"
    assert found["format"] == "huggingface"
    assert "llama" in pi2("inspect", hugging_face).stdout


def test_inspect_refuses_what_is_no_model(tmp_path):
    (tmp_path / "x.txt").write_text("hello")
    assert_error(pi2("inspect", tmp_path / "x.txt"), "no known model format", "gguf")
    assert_error(pi2("inspect", tmp_path / "nothing"), "no model")
