"""Damaged and malicious GGUF files: each loads or ends in one error, quickly and in little memory."""

import re
import struct
import tracemalloc

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_files import random_tensors, shapes, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pi2.errors import FormatError, Pi2Error, UnsupportedModel
from pi2.formats.gguf import GgufFile
from pi2.formats.gguf_source import GgufFormat, foreign_name

MEMORY = 1 << 20  # bytes beside the file's size; the files here have about 200 kB
HUGE = (1 << 31, 1 << 40, 1 << 63, (1 << 64) - 1)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("sound") / "m.gguf", random_tensors(shapes(), Type.Q8_0))
    return path.read_bytes()


def header_size(content, directory):
    path = directory / "whole.gguf"
    path.write_bytes(content)
    return min(info.offset for info in GgufFile(path).tensors.values())


def try_to_read(directory, content):
    """Load and read everything; returns the error, or None.  Anything but a Pi2Error fails the test."""
    path = directory / "m.gguf"
    path.write_bytes(content)
    error = None
    tracemalloc.start()
    try:
        source = GgufFormat.open().load(path)
        for name in [*source._shapes]:
            source.vector(name) if len(source._shapes[name]) == 1 else source.tensor(name)
        source.tokenizer_json()
        source.chat_template()
    except Pi2Error as e:
        error = e
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(content) + MEMORY, f"{peak} bytes for a file of {len(content)}"
    return error


def test_the_sound_file_is_read(sound, tmp_path):
    assert try_to_read(tmp_path, sound) is None


def test_every_truncation_is_refused(sound, tmp_path):
    header = header_size(sound, tmp_path)
    ends = [*range(0, 200), *range(200, header, 23), *range(header, len(sound), 5003), len(sound) - 1]
    assert len(ends) > 400
    for end in ends:
        assert try_to_read(tmp_path, sound[:end]) is not None, end


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), count=st.integers(1, 6))
def test_flipped_bytes_in_the_header_do_no_harm(sound, tmp_path, seed, count):
    random = np.random.default_rng(seed)
    content = bytearray(sound)
    for at in random.integers(0, header_size(sound, tmp_path), count):
        content[at] = random.integers(0, 256)
    try_to_read(tmp_path, bytes(content))


@pytest.mark.parametrize("value", HUGE)
def test_extreme_numbers_anywhere_in_the_header_do_no_harm(sound, tmp_path, value):
    header = header_size(sound, tmp_path)
    for at in [*range(4, 300, 3), *range(300, header - 8, 97)]:
        width = 8 if at % 2 else 4
        number = (value % (1 << 8 * width)).to_bytes(width, "little")
        try_to_read(tmp_path, sound[:at] + number + sound[at + width :])


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def tensor(name="t", dims=(32,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def build(pairs=(), tensors=(), *, n_pairs=None, n_tensors=None, data=bytes(1024)):
    """A GGUF of raw parts; the counts can lie."""
    counts = (len(tensors) if n_tensors is None else n_tensors, len(pairs) if n_pairs is None else n_pairs)
    header = b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join(pairs) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + data


def array(kind, count, raw=b""):
    return struct.pack("<IIQ", 9, kind, count) + raw


NUMBER = struct.pack("<II", 4, 7)
NESTED = array(9, 1, b"".join(struct.pack("<IQ", 9, 1) for _ in range(1000)))
MALICIOUS = {
    "an empty file": (b"", "too short"),
    "only a magic": (b"GGUF", "too short"),
    "another magic": (b"GGML" + bytes(60), "not a GGUF file"),
    **{f"{n} tensors": (build(n_tensors=n), "cannot be") for n in HUGE},
    **{f"{n} keys": (build(n_pairs=n), "cannot be") for n in HUGE},
    "one key too many": (build(n_pairs=50), "cannot be|unknown type|ends inside|twice"),
    **{f"a key of {n} bytes": (build([struct.pack("<Q", n) + b"a"]), "cannot be") for n in HUGE},
    **{f"a text of {n} bytes": (build([text("a") + struct.pack("<IQ", 8, n)]), "cannot be") for n in HUGE},
    **{f"{n} numbers": (build([text("a") + array(4, n)]), "ends inside") for n in HUGE},
    **{f"{n} texts": (build([text("a") + array(8, n)]), "ends inside|cannot be") for n in HUGE},
    "a key that is not UTF-8": (build([text(b"\xff\xfe") + NUMBER]), "not UTF-8"),
    "a text that is not UTF-8": (build([text("a") + struct.pack("<I", 8) + text(b"\xc3")]), "not UTF-8"),
    "a key twice": (build([text("a") + NUMBER] * 2), "occurs twice"),
    "an unknown type": (build([text("a") + struct.pack("<I", 13)]), "unknown type 13"),
    "arrays in arrays": (build([text("a") + NESTED]), "array of elements of type 9"),
    "an array of an unknown type": (build([text("a") + array(77, 1)]), "type 77"),
    **{
        f"an alignment of {n}": (build([text("general.alignment") + struct.pack("<II", 4, n)]), "alignment")
        for n in (0, 3, 48, 1 << 31)
    },
    "an alignment in words": (
        build([text("general.alignment") + struct.pack("<I", 8) + text("x")]),
        "alignment",
    ),
    "no dimensions": (build(tensors=[tensor(dims=())]), "0 dimensions"),
    "five dimensions": (build(tensors=[tensor(dims=(1,) * 5)]), "5 dimensions"),
    "a dimension of zero": (build(tensors=[tensor(dims=(32, 0))]), "is not inside"),
    "no columns": (build(tensors=[tensor(dims=(0, 32))]), "is not inside"),
    **{f"{n} columns": (build(tensors=[tensor(dims=(n & ~31,))]), "is not inside") for n in HUGE},
    **{f"{n} rows": (build(tensors=[tensor(dims=(32, n))]), "is not inside") for n in HUGE},
    "a product that overflows": (build(tensors=[tensor(dims=(1 << 32, 1 << 32, 2))]), "is not inside"),
    "a product that overflows to a little": (
        build(tensors=[tensor(dims=(32, (1 << 59) + 1))]),
        "is not inside",
    ),
    **{f"an offset of {n}": (build(tensors=[tensor(offset=n & ~31)]), "is not inside") for n in HUGE},
    "a misaligned offset": (build(tensors=[tensor(offset=8)]), "misaligned"),
    "an overlap": (build(tensors=[tensor("a"), tensor("b", offset=96)]), "overlaps"),
    "the same place": (build(tensors=[tensor("a"), tensor("b")]), "overlaps"),
    "a name twice": (build(tensors=[tensor(), tensor(offset=128)]), "occurs twice"),
    "a part of a block": (build(tensors=[tensor(dims=(40,), kind=8)]), "not a multiple of 32"),
    "a part of a large block": (build(tensors=[tensor(dims=(128,), kind=12)]), "not a multiple of 256"),
    "no data": (build(tensors=[tensor()], data=b""), "is not inside"),
    "no architecture": (build(), "general.architecture"),
    "a million parts": (build([text("split.count") + struct.pack("<II", 4, 1_000_000)]), "split into"),
}


@pytest.mark.parametrize("what", MALICIOUS)
def test_lies_are_refused(tmp_path, what):
    content, message = MALICIOUS[what]
    error = try_to_read(tmp_path, content)
    assert isinstance(error, FormatError)
    assert re.search(message, str(error)), error


@pytest.mark.parametrize(
    ("kind", "name"), [(16, "IQ2_XXS"), (24, "I8"), (28, "F64"), (39, "MXFP4"), (1 << 31, "number")]
)
def test_types_that_pi2_does_not_decode_are_named(tmp_path, kind, name):
    error = try_to_read(tmp_path, build(tensors=[tensor("blk.0.x", kind=kind)]))
    assert isinstance(error, UnsupportedModel)
    assert name in str(error)
    assert "blk.0.x" in str(error)


def test_a_sparse_file_full_of_texts_does_not_become_a_list(tmp_path):
    """Array elements stay in the file: empty texts are read over, not collected."""
    content = build([text("a") + array(8, 200_000, bytes(1_600_000))])
    error = try_to_read(tmp_path, content)
    assert "general.architecture" in str(error)


def test_names_are_translated_as_llama_cpp_has_them():
    assert foreign_name("layers.12.attn.o.weight") == "blk.12.attn_output.weight"
    assert foreign_name("embed.weight") == "token_embd.weight"
