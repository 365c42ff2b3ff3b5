"""Manifests and configurations that lie: each is one FormatError, with little memory."""

import json
import shutil

import pytest
import yaml
from hostile import assert_refused, relist, sound_model
from pi2.errors import FormatError

NEURONS = "neurons.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return sound_model(tmp_path_factory.mktemp("sound") / "m")


@pytest.fixture
def model(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "m")


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML = {
    "empty": "",
    "a list": "- 1\n- 2\n",
    "text": "hello",
    "other format": "format: gguf\nversion: 1\n",
    "bomb": BOMB,
    "self reference": "&a [*a]",
    "deep": "[" * 10000,
    "deep maps": "{a: " * 10000,
    "deep blocks": "".join(" " * i + "-\n" for i in range(300)),
    "python object": "!!python/object/apply:os.system ['true']",
    "unknown tag": "!pi2 {}",
    "binary": "!!binary '!!!'",
    "bad date": "format: 2001-99-99",
    "long number": "format: pi2\nversion: " + "9" * 5000,
    "tab": "\tformat: pi2",
    "control character": "format: \x01",
    "NUL": "\x00\x00\x00",
    "two documents": "---\nformat: pi2\n---\nformat: pi2\n",
    "list as key": "? [a]\n: b",
    "merge key": "<<: 3",
    "too large": "# " + "x" * (1 << 18) + "\n",
    "long flow": "[" + "a," * 120_000 + "]",
}


@pytest.mark.parametrize("case", YAML)
def test_manifests_that_are_no_manifests_are_refused(model, case):
    (model / "pi2.yaml").write_bytes(YAML[case].encode())
    assert_refused(model, r"pi2\.yaml", kind=FormatError)


def test_a_manifest_that_is_not_utf_8_is_refused(model):
    (model / "pi2.yaml").write_bytes(b"format: \xff\xfe\xfa")
    assert_refused(model, r"pi2\.yaml", kind=FormatError)


def drop(m, key):
    del m[key]


HASH = "0" * 64
MANIFESTS = {
    "version 2": lambda m: m.update(version=2),
    "version text": lambda m: m.update(version="1"),
    "no files": lambda m: drop(m, "files"),
    "no bundle": lambda m: drop(m, "bundle"),
    "no family": lambda m: drop(m, "family"),
    "unknown key": lambda m: m.update(surprise=1),
    "number as key": lambda m: m.update({7: 1}),
    "family number": lambda m: m.update(family=7),
    "other family": lambda m: m.update(family="opt"),
    "notes text": lambda m: m.update(notes="x"),
    "notes of numbers": lambda m: m.update(notes=[1]),
    "source list": lambda m: m.update(source=[]),
    "source nested": lambda m: m.update(source={"a": {"b": "c"}}),
    "source null": lambda m: m.update(source=None),
    "quantisation unknown": lambda m: m.update(quantisation={"up": "q3_k"}),
    "quantisation text": lambda m: m.update(quantisation="q4_0"),
    "bundle text": lambda m: m.update(bundle="64"),
    "bundle empty": lambda m: m.update(bundle={}),
    "stride 0": lambda m: m["bundle"].update(stride=0),
    "stride huge": lambda m: m["bundle"].update(stride=1 << 60),
    "d_model huge": lambda m: m["bundle"].update(d_model=1 << 60),
    "d_model other": lambda m: m["bundle"].update(d_model=128),
    "d_model infinite": lambda m: m["bundle"].update(d_model=float("inf")),
    "page 1": lambda m: m["bundle"].update(page=1),
    "page other": lambda m: m["bundle"].update(page=16384),
    "no gate": lambda m: m["bundle"].update(gate=None),
    "unbiased": lambda m: m["bundle"].update(biased=False),
    "segments elsewhere": lambda m: m["bundle"]["segments"].update(up=[1 << 40, 36]),
    "files empty": lambda m: m.update(files={}),
    "files list": lambda m: m.update(files=list(m["files"])),
    "no tokenizer": lambda m: drop(m["files"], "tokenizer.json"),
    "traversal": lambda m: m["files"].update({"../../../etc/passwd": {"bytes": 1, "sha256": HASH}}),
    "absolute": lambda m: m["files"].update({"/etc/passwd": {"bytes": 1, "sha256": HASH}}),
    "dot": lambda m: m["files"].update({"./config.json": {"bytes": 1, "sha256": HASH}}),
    "number as name": lambda m: m["files"].update({1: {"bytes": 1, "sha256": HASH}}),
    "listed but absent": lambda m: m["files"].update({"plan.yaml": {"bytes": 1, "sha256": HASH}}),
    "wrong hash": lambda m: m["files"][NEURONS].update(sha256=HASH),
    "wrong hash of a text": lambda m: m["files"]["tokenizer.json"].update(sha256=HASH),
    "short hash": lambda m: m["files"][NEURONS].update(sha256="00"),
    "numeric hash": lambda m: m["files"][NEURONS].update(sha256=0),
    "size off by one": lambda m: m["files"][NEURONS].update(bytes=m["files"][NEURONS]["bytes"] + 1),
    "size negative": lambda m: m["files"][NEURONS].update(bytes=-1),
    "size huge": lambda m: m["files"][NEURONS].update(bytes=1 << 70),
    "size bool": lambda m: m["files"][NEURONS].update(bytes=True),
    "size float": lambda m: m["files"][NEURONS].update(bytes=float(m["files"][NEURONS]["bytes"])),
    "entry text": lambda m: m["files"].update({NEURONS: "x"}),
    "entry with more": lambda m: m["files"][NEURONS].update(url="http://example.org"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests_that_lie_are_refused(model, case):
    manifest = yaml.safe_load((model / "pi2.yaml").read_text())
    MANIFESTS[case](manifest)
    (model / "pi2.yaml").write_text(yaml.safe_dump(manifest))
    assert_refused(model, kind=FormatError)


# ---- config.json

CONFIGS = {
    "d_model": [0, -1, 32, 65, 1 << 24, 1 << 70, 10**400, 64.0, "64", None, True, [64]],
    "n_layers": [0, 1, 3, 4096, 1 << 24, 10**400],
    "n_neurons": [0, 69, 71, 1 << 24, -70],
    "vocab_size": [0, 49, 51, 1 << 24, "50"],
    "n_heads": [3, 8, 1 << 24],
    "n_kv_heads": [0, 3, 4],
    "head_dim": [8, 1 << 24],
    "activation": ["swish", 1, None, ["relu"]],
    "gated": [False, 1, "yes", None],
    "ffn_bias": [False, 0],
    "tied": [True],
    "norm_bias": [True],
    "qk_norm": [True],
    "rope": [None, 7, {}, {"theta": 1e4}, {"theta": 0, "dims": 16}, {"theta": 1e4, "dims": 17},
             {"theta": 1e4, "dims": 16, "kind": "magic"}, {"theta": 1e4, "dims": 16, "extra": 1}],
    "norm_eps": [10**400, "1e-5", None],
    "window": [0, -3, 1.5],
    "window_layers": [[True], "yes", [1, 0], True],
    "eos_ids": ["1", [None], [1.5], 7],
    "family": [1, None, "opt"],
    "surprise": [1],
}  # fmt: skip


@pytest.mark.parametrize("key", CONFIGS)
def test_configurations_that_lie_are_refused(model, key):
    config = json.loads((model / "config.json").read_text())
    for value in CONFIGS[key]:
        (model / "config.json").write_text(json.dumps(config | {key: value}))
        relist(model)
        assert_refused(model, kind=FormatError)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", "{}", '"' * 9, "[" * 100_000, '{"a":' * 50_000, '{"d_model": NaN}', "9" * 5000,
     '{"d_model": Infinity}', '{"d_model": 1, "d_model": 2}', '{"\\ud800": 1}', "\x00" * 9,
     "{" + " " * (1 << 20) + "}"],
)  # fmt: skip
def test_configurations_that_are_no_json_are_refused(model, text):
    (model / "config.json").write_text(text)
    relist(model)
    assert_refused(model, kind=FormatError)


@pytest.mark.parametrize("key", ["norm_eps", "attn_scale", "embed_scale", "logit_scale"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_configurations_with_infinite_numbers_are_refused(model, key, value):
    config = json.loads((model / "config.json").read_text()) | {key: "@"}
    (model / "config.json").write_text(json.dumps(config).replace('"@"', value))
    relist(model)
    assert_refused(model, kind=FormatError)
