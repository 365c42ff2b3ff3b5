"""Conformance tests of importers: sound files load whole, damaged ones end in one Pi2Error."""

from __future__ import annotations

import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import Generator
from tokenizers import Tokenizer

from pi2 import inventory
from pi2.api import ModelFormat, ModelSource
from pi2.errors import Pi2Error
from pi2.testing.plugin import PluginTests, examples
from pi2.testing.strategies import generators

HEADER = 4096
"""Bytes at the start of a file that most mutations aim at: there are the sizes and offsets."""
EXTREMES = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
MEMORY_PER_BYTE = 64
"""What reading may allocate for each byte on disk: 4-bit weights grow 8 times, JSON into objects more."""
MEMORY_SPARE = 8 << 20


class ModelFormatTests(PluginTests):
    """Everything that ``pi2.api.ModelFormat`` promises.

    class TestMine(ModelFormatTests):
        plugin = MyFormat

        @classmethod
        def sample(cls, directory):
            return write_a_small_model_of_my_format(directory)
    """

    plugin: ClassVar[type[ModelFormat]]

    @classmethod
    def sample(cls, directory: Path) -> Path:
        """Write a small valid model into ``directory``; its path: a file in it, or a directory in it."""
        raise NotImplementedError(f"{cls.__name__} must define sample()")

    @pytest.fixture(scope="class")
    @classmethod
    def model_format(cls, runnable: type[ModelFormat]) -> Iterator[ModelFormat]:
        """One opened importer for all tests of the class."""
        opened = runnable.open(cls.options)
        yield opened
        opened.close()

    @pytest.fixture(scope="class")
    @classmethod
    def valid(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The sample."""
        return cls.sample(tmp_path_factory.mktemp("valid"))

    def test_it_recognises_its_own(self, implementation: type[ModelFormat], valid: Path) -> None:
        assert implementation.recognises(valid) is True

    @pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"GG", b"{}", "ключ: значение\n".encode()])
    def test_it_recognises_nothing_else(
        self, implementation: type[ModelFormat], tmp_path: Path, content: bytes
    ) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "junk").write_bytes(content)
        for path in (tmp_path / "empty", tmp_path / "junk", tmp_path / "missing", Path("nul\0byte")):
            assert implementation.recognises(path) is False

    def test_a_sound_model_is_complete(self, model_format: ModelFormat, valid: Path) -> None:
        source = model_format.load(valid)
        source.architecture.check()
        assert source.provenance["format"]
        for name, values in arrays(source):
            assert np.isfinite(values).all(), name
        Tokenizer.from_str(source.tokenizer_json())
        template = source.chat_template()
        assert template is None or isinstance(template, str)

    def test_a_missing_file_is_refused(self, model_format: ModelFormat, tmp_path: Path) -> None:
        with pytest.raises(Pi2Error):
            model_format.load(tmp_path / "missing")

    @examples(150)
    @given(rng=generators, mutation=st.sampled_from(("cut", "flip", "extreme", "blank", "repeat", "remove")))
    def test_a_damaged_model_ends_in_one_error_of_pi2s(
        self,
        model_format: ModelFormat,
        valid: Path,
        tmp_path_factory: pytest.TempPathFactory,
        rng: Generator,
        mutation: str,
    ) -> None:
        """Or loads, if nothing that matters was hit; either way within memory that the files justify."""
        place = tmp_path_factory.mktemp("damaged")
        path = mutated(valid, place, MUTATIONS[mutation], rng)
        size = sum(file.stat().st_size for file in files(path))
        tracemalloc.start()
        try:
            with np.errstate(all="ignore"):
                consume(model_format, path)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            shutil.rmtree(place)
        assert peak <= MEMORY_SPARE + MEMORY_PER_BYTE * size, f"{peak} bytes for {size} on disk"


def arrays(source: ModelSource) -> Iterator[tuple[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]]:
    """Every array of the inventory by name, decoded, its shape checked against the architecture."""
    arch = source.architecture
    matrices, lengths = inventory.dense_matrices(arch), inventory.dense_vectors(arch)
    for layer in range(arch.n_layers):
        for name in inventory.neuron_matrices(arch, layer).values():
            matrices[name] = (arch.n_neurons, arch.d_model)
        lengths |= dict.fromkeys(inventory.neuron_biases(arch, layer), arch.n_neurons)
    for name, shape in matrices.items():
        tensor = source.tensor(name)
        assert tensor.shape == shape, name
        yield name, tensor.to_f32()
    for name, length in lengths.items():
        vector = source.vector(name)
        assert vector.shape == (length,), name
        assert vector.dtype == np.float32, name
        yield name, vector


def consume(model_format: ModelFormat, path: Path) -> None:
    """Load ``path`` and read all of it, or end in an error that is one sentence without a full stop."""
    message = "nothing was wrong"
    try:
        source = model_format.load(path)
        for _ in arrays(source):
            pass
        source.tokenizer_json()
        source.chat_template()
    except Pi2Error as e:
        message = str(e)
    assert message.strip()
    assert not message.endswith(".")


def files(path: Path) -> list[Path]:
    """The file itself, or the files of the directory."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] * path.exists()


def mutated(
    valid: Path, place: Path, mutation: Callable[[bytearray, Generator], bytearray | None], rng: Generator
) -> Path:
    """A copy of the sample under ``place`` with one file changed, or gone where the mutation says None."""
    copy = place / valid.name
    if valid.is_dir():
        shutil.copytree(valid, copy)
    else:
        shutil.copy(valid, copy)
    victim = files(copy)[rng.integers(len(files(copy)))]
    content = mutation(bytearray(victim.read_bytes()), rng)
    if content is None:
        victim.unlink()
    else:
        victim.write_bytes(content)
    return copy


def _place(content: bytearray, rng: Generator) -> int:
    """Somewhere in the file, three times in four near its start."""
    limit = min(len(content), HEADER) if rng.random() < 0.75 else len(content)
    return int(rng.integers(0, max(limit, 1)))


def _cut(content: bytearray, rng: Generator) -> bytearray:
    return content[: _place(content, rng)]


def _flip(content: bytearray, rng: Generator) -> bytearray:
    for _ in range(int(rng.integers(1, 4))):
        at = _place(content, rng)
        content[at : at + 1] = bytes([int(rng.integers(256))])
    return content


def _extreme(content: bytearray, rng: Generator) -> bytearray:
    at, width = _place(content, rng), int(rng.choice((4, 8)))
    value = EXTREMES[rng.integers(len(EXTREMES))] % (1 << 8 * width)
    content[at : at + width] = value.to_bytes(width, "little")
    return content


def _blank(content: bytearray, rng: Generator) -> bytearray:
    at, count = _place(content, rng), int(rng.integers(1, 64))
    content[at : at + count] = bytes(min(count, len(content) - at))
    return content


def _repeat(content: bytearray, rng: Generator) -> bytearray:
    at, count = _place(content, rng), int(rng.integers(1, 64))
    content[at:at] = content[at : at + count]
    return content


def _remove(content: bytearray, rng: Generator) -> None:
    return None


MUTATIONS: dict[str, Callable[[bytearray, Generator], bytearray | None]] = {
    "blank": _blank,
    "cut": _cut,
    "extreme": _extreme,
    "flip": _flip,
    "remove": _remove,
    "repeat": _repeat,
}
