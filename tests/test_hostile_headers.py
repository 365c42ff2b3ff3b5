"""Weight files whose headers lie, under checksums that fit: each is one FormatError."""

import json
import shutil
import struct

import pytest
from hostile import assert_refused, relist, sound_model
from pi2.container.safetensors_file import read_header
from pi2.errors import FormatError

DENSE, NEURONS = "dense.safetensors", "neurons.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return sound_model(tmp_path_factory.mktemp("sound") / "m")


@pytest.fixture
def model(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "m")


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
