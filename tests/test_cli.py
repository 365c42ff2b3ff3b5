"""The command line on toy models: what it prints where, its exit codes, Ctrl-C and closed pipes."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import pty
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from pi2 import __version__
from pi2.cli import chat as chat_command
from pi2.cli import run as run_command
from pi2.cli.app import app
from pi2.cli.output import human_bytes, print_run
from pi2.engine import Engine
from pi2.sampling import Sampling
from pi2.stats import RunStats
from pi2.testing.models import toy_architecture, toy_tokenizer, write_toy_model
from safetensors.numpy import save_file
from typer.testing import CliRunner

LIVELY = ["--temperature", "8", "--seed", "3"]  # cooler, toy models repeat one token
GOLDEN = [68, 68, 22, 122, 122, 122, 122, 122, 190, 190, 190, 190, 190, 212, 204, 244]
DESIGNED_KEYS = {
    *("text", "tokens", "prompt_tokens", "ttft_s", "prefill_tps", "decode_tps", "token_latency_s"),
    *("rss_peak_bytes", "budget_bytes", "density", "hit_rate", "bytes_read", "io_wait_share", "backend"),
    *("storage", "predictor", "policy", "lossless", "predicted_tps", "config", "versions", "stop_reason"),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return str(write_toy_model(tmp_path_factory.mktemp("models") / "toy.pi2"))


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A model whose answers last far longer than any test."""
    arch = toy_architecture(max_context=1 << 20)
    return str(write_toy_model(tmp_path_factory.mktemp("models") / "endless.pi2", arch))


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """A Hugging Face directory with random weights."""
    path = tmp_path_factory.mktemp("models") / "tiny llama"
    path.mkdir()
    d, neurons, vocab = 32, 64, toy_tokenizer().get_vocab_size()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "relu"}
    config |= {"vocab_size": vocab, "hidden_size": d, "intermediate_size": neurons, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    config |= {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": True, "eos_token_id": 1}
    shapes = {"embed_tokens": (vocab, d), "norm": (d,)}
    shapes |= {f"layers.0.self_attn.{p}_proj": (d if p in "qo" else d // 2, d) for p in "qkvo"}
    shapes |= {f"layers.0.mlp.{p}_proj": (neurons, d) for p in ("gate", "up")}
    shapes |= {"layers.0.mlp.down_proj": (d, neurons)}
    shapes |= {f"layers.0.{n}": (d,) for n in ("input_layernorm", "post_attention_layernorm")}
    rng = np.random.default_rng(0)
    weights = {f"model.{n}.weight": rng.normal(0, 0.1, s).astype(np.float32) for n, s in shapes.items()}
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text(toy_tokenizer().to_str())
    return path


@pytest.fixture(autouse=True)
def only_builtins(monkeypatch):
    monkeypatch.setenv("PI2_PLUGINS", "")
    monkeypatch.delenv("PI2_MODEL", raising=False)


def pi2(*args, stdin=None):
    return CliRunner().invoke(app, [str(a) for a in args], input=stdin, prog_name="pi2")


def process(*args, **options):
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-W", "error", "-m", "pi2", *map(str, args)]
    return subprocess.Popen(command, **{**pipes, **options})


def assert_error(result, message, hint=""):
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert hint in result.stderr.partition("\nhint: ")[2]


# ---- run


def test_run_writes_the_engines_text_to_stdout_and_figures_to_stderr(toy):
    with Engine.open(toy) as engine:
        generation = engine.generate(engine.encode("Hello"), Sampling(temperature=8.0, seed=3, max_tokens=12))
        text = "".join(piece.text for piece in generation)
    result = pi2("run", "--model", toy, "--raw", "Hello", "--max-tokens", 12, *LIVELY)
    assert result.exit_code == 0
    assert result.stdout == text + "\n"
    lines = [line.split()[0] for line in result.stderr.splitlines()]
    assert lines == ["TTFT", "prefill", "decode", "peak", "density", "parts", "lossless", "seed"]
    assert "12 tokens, stopped by --max-tokens" in result.stderr
    assert "storage mmap, predictor exact" in result.stderr


def test_the_transcript_of_the_toy_model_stays_the_same(toy):
    result = pi2("run", "--model", toy, "--raw", "Once", "--max-tokens", 16, "--json", *LIVELY)
    assert json.loads(result.stdout)["tokens"] == GOLDEN


def test_quiet_leaves_only_the_text(toy):
    result = pi2("run", "--model", toy, "--raw", "Hello", "-q", "--max-tokens", 3, *LIVELY)
    assert (result.exit_code, result.stderr) == (0, "")


def test_json_is_one_object_with_exactly_the_designed_keys(toy):
    result = pi2("run", "--model", toy, "Hi", "--json", "--max-tokens", 4, "--seed", 9, "--top-k", 5)
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert set(found) == DESIGNED_KEYS
    assert len(found["tokens"]) == 4
    assert set(found["token_latency_s"]) == {"mean", "p50", "p90", "p99"}
    assert (found["backend"], found["lossless"], found["budget_bytes"]) == ("numpy", True, None)
    assert found["config"]["sampling"]["seed"] == 9
    assert found["config"]["sampling"]["top_k"] == 5
    assert found["config"]["model"] == toy


def test_a_seed_that_nobody_gave_is_told_and_repeats_the_answer(toy):
    args = ("run", "--model", toy, "--raw", "Hello", "--json", "--max-tokens", 20, "--temperature", 8)
    first = json.loads(pi2(*args).stdout)
    again = json.loads(pi2(*args, "--seed", first["config"]["sampling"]["seed"]).stdout)
    assert again["tokens"] == first["tokens"]
    assert json.loads(pi2(*args).stdout)["tokens"] != first["tokens"]


@pytest.mark.parametrize("newline", ["", "\n"])
def test_argument_file_and_stdin_give_the_same_prompt(toy, tmp_path, newline):
    file = tmp_path / "prompt.txt"
    file.write_bytes(f"Grüße{newline}".encode())
    tail = ["--model", toy, "--raw", "--max-tokens", 5, *LIVELY]
    expected = pi2("run", "Grüße", *tail).stdout
    assert pi2("run", "--file", file, *tail).stdout == expected
    assert pi2("run", "-", *tail, stdin=f"Grüße{newline}").stdout == expected
    assert pi2("run", *tail, stdin=f"Grüße{newline}").stdout == expected


def test_the_chat_template_and_the_system_message_are_used_unless_raw(toy):
    def prompt_tokens(*args):
        return json.loads(pi2("run", "--model", toy, "--json", "--max-tokens", 1, *args).stdout)[
            "prompt_tokens"
        ]

    assert prompt_tokens("--raw", "Hi") == 1 + 2  # <s>, a byte a token
    assert prompt_tokens("Hi") == 1 + 2 + 1 + 1  # <|user|> Hi </s> <|assistant|>
    assert prompt_tokens("Hi", "--system", "Be") == 5 + 1 + 2 + 1


def test_sampling_options_reach_the_sampler(toy):
    only = ["run", "--model", toy, "--raw", "Hi", "--max-tokens", 3, "--json"]
    bias = [arg for i in range(261) if i != 65 for arg in ("--logit-bias", f"{i}=-inf")]
    a = 65 - 33  # the byte-level alphabet is sorted by character, and begins with "!"
    bias = [arg.replace(f"{a}=", "65=") if arg == f"{a}=-inf" else arg for arg in bias]
    assert json.loads(pi2(*only, *bias).stdout)["text"] == "AAA"
    stopped = json.loads(pi2(*only, *bias, "--stop", "never", "--stop", "AA").stdout)
    assert (stopped["text"], stopped["stop_reason"]) == ("", "stop")
    assert json.loads(pi2(*only, "--greedy").stdout)["tokens"] == json.loads(pi2(*only).stdout)["tokens"]


@pytest.mark.parametrize("command", [run_command.command, chat_command.command])
def test_the_defaults_of_the_options_are_those_of_the_sampler(command):
    given = {name: p.default for name, p in inspect.signature(command).parameters.items()}
    for field in dataclasses.fields(Sampling):
        own = given.get(field.name)
        if own is not None and (command, field.name) != (chat_command.command, "max_tokens"):
            assert own == field.default


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["--model", "nowhere"], "no model 'nowhere'", "installed models: none"),
        ([], "no model is installed", "pi2 convert"),
        (["--model", "TOY", "--backend", "nunpy"], "no 'nunpy' among the backends", "did you mean 'numpy'?"),
        (["--model", "TOY", "--backend", "numpy:x=1"], "has no option 'x'", "its options"),
        (["--model", "TOY", "--storage", "mmap:x"], "'x' is no option", "name:key=value"),
        (["--model", "TOY", "--temperature", "-1"], "temperature is between", ""),
        (["--model", "TOY", "--top-p", "2"], "top-p is between 0 and 1, not 2.0", ""),
        (["--model", "TOY", "--logit-bias", "five=1"], "takes ID=V, not 'five=1'", "42=-1.5"),
        (["--model", "TOY", "--logit-bias", "999=1"], "the vocabulary ends at 260", ""),
        (["--model", "TOY", "--stop", ""], "not empty", ""),
        (["--model", "TOY", "--greedy", "--temperature", "1"], "contradicts", "leave one of them out"),
        (["--model", "TOY", "--context", "3"], "the context 3", "--context"),
        (["--model", "TOY", "--raw", "--file", "/nonexistent/file"], "No such file", "check the path"),
    ],
)
def test_what_is_wrong_is_said_with_a_hint_and_exit_code_1(toy, args, message, hint):
    args = [toy if a == "TOY" else a for a in args]
    assert_error(pi2("run", *args, *([] if "--file" in args else ["Hello"])), message, hint)


def test_a_foreign_model_is_answered_with_the_command_that_converts_it(tmp_path):
    file = tmp_path / "some model.gguf"
    file.write_bytes(b"GGUF")
    assert_error(pi2("run", "--model", file, "Hi"), "not a pi2 model", "pi2 convert")


def test_a_prompt_that_is_not_utf8_is_refused(toy, tmp_path):
    (tmp_path / "latin1").write_bytes("Grüße".encode("latin-1"))
    assert_error(pi2("run", "--model", toy, "--file", tmp_path / "latin1"), "not UTF-8 at byte 2", "iconv")
    assert_error(pi2("run", "--model", toy, stdin=b"\xff"), "stdin is not UTF-8", "iconv")


@pytest.mark.parametrize(
    "args",
    [
        ["run", "--temperature", "hot", "Hi"],
        ["run", "--unheard", "Hi"],
        ["run", "Hi", "--file", "also"],
        ["run", "Hi", "--raw", "--system", "Be brief"],
        ["unheard"],
        ["convert", "only-one"],
    ],
)
def test_a_wrong_command_line_exits_with_2(args):
    result = pi2(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: pi2" in result.stderr


def test_no_prompt_on_a_terminal_is_a_usage_error(toy):
    ours, theirs = pty.openpty()
    child = process("run", "--model", toy, stdin=theirs)
    _, errors = child.communicate(timeout=60)
    os.close(ours)
    os.close(theirs)
    assert child.returncode == 2
    assert b"on stdin" in errors


def test_text_streams_and_ctrl_c_keeps_what_was_printed(endless):
    child = process("run", "--model", endless, "--raw", "Hi", "--max-tokens", 1 << 20, *LIVELY)
    first = child.stdout.read(1)
    assert first
    assert child.poll() is None  # a million tokens take minutes: the text came before the end
    child.send_signal(signal.SIGINT)
    rest, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert rest.endswith(b"\n")
    assert b"decode" in errors
    assert b"Traceback" not in errors


def test_a_reader_that_goes_away_is_no_error(endless):
    child = process("run", "--model", endless, "--raw", "Hi", "--max-tokens", 1 << 20, *LIVELY)
    child.stdout.read(1)
    child.stdout.close()
    assert child.wait(timeout=60) == 141
    assert child.stderr.read() == b""
    child.stderr.close()


def test_a_terminal_that_cannot_show_a_character_does_not_end_the_run(toy):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    bias = ("--logit-bias", "250=100", "--temperature", "0")
    child = process("run", "--model", toy, "--raw", "Hi", "-q", "--max-tokens", 4, *bias, env=environment)
    text, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (0, b"")
    assert text == b"????\n"


def test_a_lossy_run_says_so(capsys):
    setup = {"backend": "b", "storage": "s", "predictor": "p", "lossless": False, "config": {}}
    print_run(RunStats(), setup)
    assert "no       lossy: neurons may be missed" in capsys.readouterr().err


# ---- chat


def test_chat_answers_every_line_and_obeys_its_commands(toy):
    lines = "Hi\n\n/stats\n/help\n/unheard\n/reset\nyou\n/exit\nnever read\n"
    result = pi2("chat", "--model", toy, "--max-tokens", 5, *LIVELY, stdin=lines)
    assert result.exit_code == 0
    assert result.stdout.count("\n") >= 2
    assert result.stderr.count("(stopped by --max-tokens)\n") == 2
    assert "there is no /unheard" in result.stderr
    assert "forgotten" in result.stderr
    assert "/exit    leave" in result.stderr
    assert result.stderr.count("TTFT") == 1
    assert pi2("chat", "--model", toy, stdin="/stats\n").stderr == "nothing has been said yet\n"


def test_chat_keeps_the_conversation_and_its_kv_cache(toy):
    lines = "Hello there\nmore\n/stats\n"
    result = pi2("chat", "--model", toy, "--max-tokens", 4, "--system", "Be", stdin=lines)
    assert result.exit_code == 0
    figures = re.search(r"prompt of (\d+) tokens, (\d+) computed", result.stderr)
    prompt, computed = map(int, figures.groups())
    assert prompt > 20
    assert computed < prompt / 2


def test_chat_leaves_with_an_error_if_the_model_is_wrong():
    assert_error(pi2("chat", "--model", "nowhere", stdin="Hi\n"), "no model 'nowhere'")


def test_chat_refuses_input_that_is_not_utf8(toy):
    assert_error(pi2("chat", "--model", toy, stdin=b"\xff\n"), "stdin is not UTF-8", "iconv")


def test_a_turn_too_long_costs_that_turn_only(toy):
    result = pi2(
        "chat", "--model", toy, "--context", 30, "--max-tokens", 2, stdin="x" * 40 + "\nHi\n/stats\n"
    )
    assert result.exit_code == 0
    assert "error: the prompt has 43 tokens, the context 30" in result.stderr
    assert "prompt of 5 tokens" in result.stderr


def test_ctrl_c_stops_an_answer_and_not_the_chat(endless):
    child = process("chat", "--model", endless, "--max-tokens", 1 << 20, *LIVELY, stdin=subprocess.PIPE)
    child.stdin.write(b"Hi\n")
    child.stdin.flush()
    assert child.stdout.read(1)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(b"/stats\n", timeout=60)
    assert child.returncode == 0
    assert errors.startswith(b"(stopped)\nTTFT")


def test_chat_on_a_terminal_prompts_and_ends_with_ctrl_d(toy):
    ours, theirs = pty.openpty()
    child = process("chat", "--model", toy, "--max-tokens", 2, stdin=theirs, stdout=theirs)
    os.close(theirs)
    shown = b""
    while b"> " not in shown:
        shown += os.read(ours, 100)
    os.write(ours, b"\x04")  # Ctrl-D
    _, errors = child.communicate(timeout=60)
    os.close(ours)
    assert child.returncode == 0
    assert b"/help lists the commands" in errors


# ---- convert, inspect, plugins


def test_convert_inspect_and_run_follow_one_another(hugging_face, tmp_path):
    destination = tmp_path / "made here.pi2"
    args = ("convert", hugging_face, destination, "--quant", "q4_0", "--quant-down", "f16")
    result = pi2(*args)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "100%" in result.stderr
    assert f"next: pi2 run --model '{destination}'" in result.stderr
    assert_error(pi2(*args), "exists already", "--force")
    assert pi2(*args, "--force", "--quant-embed", "f32", "--quant-attention", "q8_0").exit_code == 0
    found = json.loads(pi2("inspect", destination, "--json", "--verify").stdout)
    assert found["quantisation"] == {
        **{"gate": "q4_0", "up": "q4_0", "down": "f16", "attention": "q8_0", "embed": "f32"},
        **({"head": "f32"} if "head" in found["quantisation"] else {}),
    }
    assert found["checksums"] == "correct"
    assert pi2("run", "--model", destination, "--raw", "Hi", "-q", "--max-tokens", 2).exit_code == 0


def test_convert_says_which_formats_there_are(hugging_face, tmp_path):
    assert_error(pi2("convert", hugging_face, tmp_path / "x", "--quant", "q9"), "'q9'", "q4_0")
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


def test_plugins_lists_everything_with_its_reason(monkeypatch):
    found = json.loads(pi2("plugins", "--json").stdout)
    names = {(item["kind"], item["name"]) for item in found["implementations"]}
    assert {("backends", "numpy"), ("storage_tiers", "mmap"), ("model_formats", "gguf")} <= names
    assert all(item["reason"] for item in found["implementations"])
    assert found["plugins"]["builtin"]["hooks"] == sorted(found["plugins"]["builtin"]["hooks"])
    assert found["broken"] == {}
    monkeypatch.setenv("PI2_PLUGINS", "unheard")
    shown = pi2("plugins").stdout
    assert "!!" in shown
    assert "unheard" in shown
    assert "ok  backends" in shown


# ---- the whole


def test_the_version_is_printed():
    assert pi2("--version").stdout == f"pi2 {__version__}\n"


def test_help_names_every_command_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom pi2.cli.app import app\n"
        "try: app(['--help'], prog_name='pi2')\nexcept SystemExit: pass\n"
        "print([m for m in ('numpy', 'tokenizers', 'rich', 'jinja2', 'yaml') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.endswith("[]\n")
    for name in ("run", "chat", "convert", "inspect", "plugins", "doctor"):
        assert f"  {name} " in shown


def test_the_environment_names_a_model(toy, monkeypatch):
    monkeypatch.setenv("PI2_MODEL", toy)
    assert pi2("run", "--raw", "Hi", "-q", "--max-tokens", 1).exit_code == 0


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_500_000, "2.5 MB"), (3 * 10**15, "3000.0 TB")],
)
def test_sizes_are_in_decimal_units(n, text):
    assert human_bytes(n) == text
