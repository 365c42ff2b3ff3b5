"""Damaged and hostile pi2 models: each is one Pi2Error, with little memory, whatever was changed."""

import contextlib
import json
import os
import shutil
import struct
import tracemalloc

import numpy as np
import pytest
import yaml
from pi2 import inventory
from pi2.builtin.mmap_tier import MmapTier
from pi2.container import open_model
from pi2.container.manifest import REQUIRED, describe_member
from pi2.container.safetensors_file import read_header
from pi2.convert import QuantPlan, convert
from pi2.errors import FormatError, Pi2Error, StorageError
from sources import RandomSource, tiny

FILES = ("pi2.yaml", *REQUIRED, "chat_template.jinja")
DENSE, NEURONS = "dense.safetensors", "neurons.safetensors"
HEADROOM = 6 << 20  # bytes; parsing a manifest of 256 KiB takes most of it


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    arch = tiny(n_layers=2, ffn_bias=True)
    source = RandomSource(arch, template="{{ x }}")
    return convert(source, tmp_path_factory.mktemp("sound") / "m", QuantPlan.named("q4_0"))


@pytest.fixture
def model(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "m")


def use(path, verify):
    """Open a model and read everything in it."""
    tier = MmapTier()
    opened = open_model(path, tier, verify=verify)
    for name in inventory.dense_matrices(opened.architecture):
        opened.matrix(name).to_f32()
    for name in inventory.dense_vectors(opened.architecture):
        opened.vector(name).sum()
    for layer in range(opened.architecture.n_layers):
        opened.geometry.unpack(opened.bundles(layer))


def assert_refused(path, match=None, verify=None, kind=Pi2Error):
    """One Pi2Error that names the model and says what to do; no allocation beyond the size of the files."""
    size = sum(p.stat().st_size for p in path.iterdir() if p.is_file()) if path.is_dir() else 0
    tracemalloc.start()
    try:
        with pytest.raises(kind, match=match) as caught:
            use(path, verify)
        assert tracemalloc.get_traced_memory()[1] < 3 * size + HEADROOM
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def relist(path):
    """Make sizes and checksums of the manifest fit again, so that only deeper checks can object."""
    manifest = yaml.safe_load((path / "pi2.yaml").read_text())
    for name in manifest["files"]:
        entry = describe_member(path, name)
        manifest["files"][name] = {"bytes": entry.nbytes, "sha256": entry.sha256}
    (path / "pi2.yaml").write_text(yaml.safe_dump(manifest, sort_keys=False))


def test_the_sound_model_is_accepted(model):
    use(model, True)
    relist(model)
    use(model, True)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_files_cut_anywhere_are_refused(model, name, verify):
    whole = (model / name).read_bytes()
    end = len(whole) - (name == "pi2.yaml")  # YAML does not need its last line break
    for n in {0, 1, 7, 8, 9, *np.linspace(0, end - 1, 20).astype(int).tolist()}:
        if n >= end:
            continue
        (model / name).write_bytes(whole[:n])
        assert_refused(model, verify=verify)


@pytest.mark.parametrize("name", [DENSE, NEURONS])
def test_cut_weights_are_refused_even_if_the_manifest_agrees(model, name):
    whole = (model / name).read_bytes()
    for n in (0, 1, 7, 8, 9, 50, 4096, 4097, len(whole) // 2, len(whole) - 4096, len(whole) - 1):
        (model / name).write_bytes(whole[:n])
        relist(model)
        assert_refused(model, kind=FormatError)


@pytest.mark.parametrize("name", FILES)
def test_appended_bytes_are_refused(model, name):
    with (model / name).open("ab") as f:
        f.write(b"\x00")
    assert_refused(model)


@pytest.mark.parametrize("name", [n for n in FILES if n != "pi2.yaml"])
def test_a_flipped_bit_anywhere_is_found_by_the_checksum(model, name):
    whole = (model / name).read_bytes()
    for at in np.random.default_rng(0).integers(0, len(whole), 8).tolist():
        (model / name).write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert_refused(model)


@pytest.mark.parametrize("name", [DENSE, NEURONS, "pi2.yaml", "config.json"])
def test_flipped_bytes_in_headers_never_crash_with_checksums_that_fit(model, name):
    whole = (model / name).read_bytes()
    rng = np.random.default_rng(1)
    length = 8 + struct.unpack("<Q", whole[:8])[0] if name in (DENSE, NEURONS) else len(whole)
    end = min(len(whole[:length].rstrip()), 3000)
    for at in rng.integers(0, end, 40).tolist():
        (model / name).write_bytes(whole[:at] + rng.bytes(1) + whole[at + 1 :])
        with contextlib.suppress(yaml.YAMLError, ValueError, KeyError, TypeError, FormatError):
            relist(model)  # fails if the manifest itself was hit
        try:
            use(model, None)
        except Pi2Error:
            continue  # refused; a change without consequence (a digit of a float, a note) may be accepted


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "directory", "link", "dangling", "fifo", "empty"])
def test_what_is_no_regular_file_is_refused(model, name, how, tmp_path):
    shutil.move(model / name, tmp_path / "away")
    if how == "directory":
        (model / name).mkdir()
    elif how == "link":
        (model / name).symlink_to(tmp_path / "away")
    elif how == "dangling":
        (model / name).symlink_to("/nowhere/at/all")
    elif how == "fifo":
        os.mkfifo(model / name)
    elif how == "empty":
        (model / name).touch()
    assert_refused(model, kind=FormatError)


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name, why in (("empty", r"not a pi2 model"), ("file", "no such"), ("absent", "no such")):
        assert_refused(tmp_path / name, why, kind=FormatError)


def test_a_file_that_may_not_be_read_is_a_storage_error(model, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(model / "pi2.yaml"))

    monkeypatch.setattr("pi2.container.reader.read_manifest", refuse)
    assert_refused(model, "Permission denied", kind=StorageError)


# ---- safetensors headers whose checksums fit


def header_of(path):
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def put(path, header, data, *, raw=None, length=None):
    text = json.dumps(header).encode() if raw is None else raw
    text = text.ljust(-(-(len(text) + 8) // 4096) * 4096 - 8)
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


EMBED, FFN = "embed.weight", "layers.0.ffn"
HEADERS = {
    "huge length": (DENSE, {"length": 1 << 62}),
    "negative length": (DENSE, {"length": (1 << 64) - 1}),
    "length past the end": (NEURONS, {"length": 1 << 40}),
    "no json": (DENSE, {"raw": b"hello"}),
    "a list": (DENSE, {"raw": b"[1, 2]"}),
    "leading space": (DENSE, {"raw": b"  {}"}),
    "null": (DENSE, {"raw": b"null"}),
    "a number": (DENSE, {"raw": b"1" * 3000}),
    "a huge number": (DENSE, {"raw": b'{"a": ' + b"9" * 4000 + b"9" * 900 + b"}"}),
    "nested": (DENSE, {"raw": b'{"a":' * 20000}),
    "nested lists": (NEURONS, {"raw": b'{"a":' + b"[" * 50000}),
    "not UTF-8": (DENSE, {"raw": b'{"\xff\xfe": 1}'}),
    "NaN": (DENSE, {"raw": b'{"a": NaN}'}),
    "repeated key": (DENSE, {"raw": b'{"a": 1, "a": 2}'}),
    "nothing in it": (DENSE, {"raw": b"{}"}),
    "nothing in it either": (NEURONS, {"raw": b"{}"}),
}
EDITS = {
    "huge shape": (DENSE, EMBED, "shape", [1 << 40, 1 << 40]),
    "overflowing shape": (DENSE, EMBED, "shape", [1 << 63, 2]),
    "negative shape": (DENSE, EMBED, "shape", [-50, -68]),
    "float shape": (DENSE, EMBED, "shape", [50.0, 68.0]),
    "bool shape": (DENSE, EMBED, "shape", [True, 3400]),
    "text shape": (DENSE, EMBED, "shape", "50x68"),
    "many dimensions": (DENSE, EMBED, "shape", [1] * 5000),
    "flat shape": (DENSE, EMBED, "shape", [3400]),
    "transposed shape": (DENSE, EMBED, "shape", [68, 50]),
    "no shape": (DENSE, EMBED, "shape", None),
    "unknown dtype": (DENSE, EMBED, "dtype", "Q4_0"),
    "numeric dtype": (DENSE, EMBED, "dtype", 8),
    "list dtype": (DENSE, EMBED, "dtype", ["U8"]),
    "other dtype": (DENSE, EMBED, "dtype", "I8"),
    "wider dtype": (DENSE, EMBED, "dtype", "F64"),
    "vector as I32": (DENSE, "final_norm.weight", "dtype", "I32"),
    "vector with two dimensions": (DENSE, "final_norm.weight", "shape", [8, 8]),
    "offsets reversed": (DENSE, EMBED, "data_offsets", [3400, 0]),
    "offsets past the end": (DENSE, EMBED, "data_offsets", [1 << 40, (1 << 40) + 3400]),
    "offsets negative": (DENSE, EMBED, "data_offsets", [-3400, 0]),
    "offsets elsewhere": (DENSE, EMBED, "data_offsets", [0, 3400]),
    "three offsets": (DENSE, EMBED, "data_offsets", [0, 1, 2]),
    "float offsets": (DENSE, EMBED, "data_offsets", [0.0, 3400.0]),
    "extra key": (DENSE, EMBED, "colour", "red"),
    "neurons: huge shape": (NEURONS, FFN, "shape", [1 << 30, 1 << 30]),
    "neurons: other stride": (NEURONS, FFN, "shape", [140, 128]),
    "neurons: as I8": (NEURONS, FFN, "dtype", "I8"),
    "neurons: overlap": (NEURONS, "layers.1.ffn", "data_offsets", [0, 17920]),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_lie_are_refused(model, case):
    file, change = HEADERS[case]
    header, data = header_of(model / file)
    put(model / file, header, data, **change)
    relist(model)
    assert_refused(model, file, kind=FormatError)


@pytest.mark.parametrize("case", EDITS)
def test_descriptions_that_lie_are_refused(model, case):
    file, tensor, key, value = EDITS[case]
    header, data = header_of(model / file)
    assert repr(header[tensor].get(key)) != repr(value)
    header[tensor][key] = value
    if value is None:
        del header[tensor][key]
    put(model / file, header, data)
    relist(model)
    assert_refused(model, file, kind=FormatError)


def rename(header, old, new):
    return {new if k == old else k: v for k, v in header.items()}


SETS = {
    "renamed": (DENSE, lambda h: rename(h, EMBED, "embed")),
    "renamed to a path": (DENSE, lambda h: rename(h, EMBED, "../../etc/passwd")),
    "renamed to a long name": (DENSE, lambda h: rename(h, EMBED, "x" * 3000)),
    "renamed to a surrogate": (DENSE, lambda h: rename(h, EMBED, "\ud800")),
    "empty extra tensor": (DENSE, lambda h: h | {"x": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}),
    "tensor is a number": (DENSE, lambda h: h | {EMBED: 7}),
    "tensor is empty": (DENSE, lambda h: h | {EMBED: {}}),
    "missing tensor": (DENSE, lambda h: {k: v for k, v in h.items() if k != EMBED}),
    "metadata gone": (DENSE, lambda h: {k: v for k, v in h.items() if k != "__metadata__"}),
    "metadata is a list": (DENSE, lambda h: h | {"__metadata__": ["a"]}),
    "metadata of numbers": (DENSE, lambda h: h | {"__metadata__": {EMBED: 8}}),
    "metadata lies": (DENSE, lambda h: h | {"__metadata__": h["__metadata__"] | {EMBED: "q4_0"}}),
    "metadata unknown dtype": (DENSE, lambda h: h | {"__metadata__": h["__metadata__"] | {EMBED: "q2_k"}}),
    "metadata f32": (DENSE, lambda h: h | {"__metadata__": h["__metadata__"] | {EMBED: "f32"}}),
    "metadata of strangers": (DENSE, lambda h: h | {"__metadata__": h["__metadata__"] | {"x": "f32"}}),
    "missing FFN": (NEURONS, lambda h: {k: v for k, v in h.items() if k != "layers.1.ffn"}),
    "FFN swapped for padding": (NEURONS, lambda h: rename(h, "layers.1.ffn", "layers.1.ffn.pad")),
    "renamed FFN": (NEURONS, lambda h: rename(h, "layers.1.ffn", "layers.2.ffn")),
}


@pytest.mark.parametrize("case", SETS)
def test_tensors_too_many_or_too_few_are_refused(model, case):
    file, change = SETS[case]
    header, data = header_of(model / file)
    put(model / file, change(header), data)
    relist(model)
    assert_refused(model, file, kind=FormatError)


def test_neurons_off_the_page_boundary_are_refused(model):
    header, data = header_of(model / NEURONS)
    text = json.dumps(header).encode()
    (model / NEURONS).write_bytes(struct.pack("<Q", len(text)) + text + data)
    relist(model)
    assert_refused(model, "multiple of 4096", kind=FormatError)


def test_a_header_of_many_empty_tensors_costs_no_more_than_the_file(model):
    header, data = header_of(model / DENSE)
    many = {f"x{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
    put(model / DENSE, header | many, data)
    relist(model)
    assert_refused(model, "the header claims", kind=FormatError)


@pytest.mark.parametrize("case", ["huge length", "no json", "nothing in it"])
def test_the_header_parser_alone_names_the_file(tmp_path, case):
    put(tmp_path / "x", {}, b"data", **HEADERS[case][1])
    with pytest.raises(FormatError, match=str(tmp_path / "x")):
        read_header(tmp_path / "x")
    with pytest.raises(FormatError, match="not a regular file"):
        read_header(tmp_path)


# ---- pi2.yaml

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


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_texts_that_are_not_utf_8_are_refused(model, name):
    (model / name).write_bytes(b'{"a": "\xff\xfe"}')
    relist(model)
    assert_refused(model, "UTF-8", kind=FormatError)


def test_a_text_beyond_its_limit_is_refused_unread(model):
    with (model / "chat_template.jinja").open("wb") as f:
        f.truncate(5 << 20)
    relist(model)
    assert_refused(model, "more than", kind=FormatError)


def test_weights_that_disappear_before_use_are_a_storage_error(model, monkeypatch):
    class Late(MmapTier):
        def open_file(self, path):
            path.unlink()
            return super().open_file(path)

    with pytest.raises(StorageError, match=r"dense\.safetensors"):
        open_model(model, Late())
