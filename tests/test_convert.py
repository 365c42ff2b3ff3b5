"""Conversion: careful with what is there, and honest about what it could not keep."""

import fcntl
import os
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pi2
import pytest
from pi2.api import ModelFormat, ModelSource, Probe
from pi2.container import read_manifest
from pi2.convert import QuantPlan, convert
from pi2.errors import BudgetError, FormatError, Pi2Error, StorageError
from pi2.formats import detect
from pi2.tensor import Tensor
from sources import ConstantSource, Counting, RandomSource, contents, tiny

Q4 = QuantPlan.named("q4_0")
PATHS = [str(Path(pi2.__file__).parent.parent), str(Path(__file__).parent)]


def test_an_existing_destination_is_kept_unless_told_otherwise(tmp_path):
    path = convert(RandomSource(tiny()), tmp_path / "m", Q4)
    before = contents(path)
    with pytest.raises(FormatError, match="exists already") as caught:
        convert(RandomSource(tiny(), seed=1), path, Q4)
    assert "--force" in caught.value.hint
    assert contents(path) == before
    convert(RandomSource(tiny(), seed=1), path, Q4, overwrite=True)
    assert contents(path) != before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_replacing_refuses_directories_with_other_peoples_files(tmp_path):
    (tmp_path / "home" / "photos").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    for name, why in (("home", "photos"), ("file", "not a directory"), ("link", "not a directory")):
        with pytest.raises(FormatError, match=why):
            convert(RandomSource(tiny()), tmp_path / name, Q4, overwrite=True)
    assert (tmp_path / "home" / "photos").exists()


def test_foreign_files_in_the_partial_directory_are_not_removed(tmp_path):
    (tmp_path / "m.partial").mkdir()
    (tmp_path / "m.partial" / "thesis.tex").write_text("x")
    with pytest.raises(FormatError, match=r"thesis\.tex"):
        convert(RandomSource(tiny()), tmp_path / "m", Q4)
    assert (tmp_path / "m.partial" / "thesis.tex").exists()


def test_a_destination_that_appears_meanwhile_is_kept(tmp_path):
    def intrude(what, done, total):
        (tmp_path / "m").mkdir(exist_ok=True)

    with pytest.raises(FormatError, match="exists already"):
        convert(RandomSource(tiny()), tmp_path / "m", Q4, intrude)
    assert not any((tmp_path / "m").iterdir())


def test_a_leftover_of_an_earlier_replacement_goes_away(tmp_path):
    path = convert(RandomSource(tiny()), tmp_path / "m", Q4)
    convert(RandomSource(tiny()), tmp_path / "m.old", Q4)
    convert(RandomSource(tiny(), seed=1), path, Q4, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_two_converters_at_one_destination_do_not_mix(tmp_path):
    (tmp_path / "m.partial").mkdir()
    fd = os.open(tmp_path / "m.partial", os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match="another conversion"):
            convert(RandomSource(tiny()), tmp_path / "m", Q4)
    finally:
        os.close(fd)
    convert(RandomSource(tiny()), tmp_path / "m", Q4)


def test_too_small_a_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(BudgetError, match="MB are needed"):
        convert(RandomSource(tiny()), tmp_path / "m", Q4)
    assert not any(tmp_path.iterdir())


def test_a_destination_below_a_file_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        convert(RandomSource(tiny()), tmp_path / "file" / "m", Q4)


def test_a_partial_directory_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "m.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Pi2Error):
        convert(RandomSource(tiny()), tmp_path / "m", Q4)
    assert not any((tmp_path / "elsewhere").iterdir())


def test_rows_that_cannot_be_quantised_become_f16_with_a_note(tmp_path):
    arch = tiny(n_heads=1, n_kv_heads=1, head_dim=10, rope=None)
    manifest = read_manifest(convert(RandomSource(arch), tmp_path / "m", Q4))
    assert manifest.notes == (
        "layers.*.attn.o.weight: rows of 10 weights cannot be stored as q4_0, so they are f16",
    )
    narrow = tiny(d_model=24, head_dim=6, rope=None)
    notes = read_manifest(convert(RandomSource(narrow), tmp_path / "n", Q4)).notes
    assert {note.partition(":")[0] for note in notes} >= {"embed.weight", "layers.*.ffn.gate.weight"}


@pytest.mark.parametrize(("weight", "dtype"), [(65505, "f16"), (6e5, "q4_0"), (9e6, "q8_0"), (-1e38, "f16")])
def test_weights_beyond_the_range_of_the_format_are_an_error(tmp_path, weight, dtype):
    source = ConstantSource(tiny(), weight)
    with pytest.raises(FormatError, match=f"too large for {dtype}") as caught:
        convert(source, tmp_path / "m", QuantPlan.named("f32", up=dtype))
    assert "f32" in caught.value.hint
    convert(source, tmp_path / "n", QuantPlan.named("f32"))


@pytest.mark.parametrize("weight", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_an_error(tmp_path, weight):
    source = ConstantSource(tiny(), weight)
    with pytest.raises(FormatError, match="not finite"):
        convert(source, tmp_path / "m", Q4)


class Lying(RandomSource):
    def tensor(self, name):
        if name == "layers.1.ffn.up.weight":
            return Tensor.from_f32(np.zeros((3, 64), np.float32))
        return super().tensor(name)


class LyingVector(RandomSource):
    def vector(self, name):
        return super().vector(name)[:-1]


class BadText(RandomSource):
    def chat_template(self):
        return "\ud800"


@pytest.mark.parametrize(
    ("source", "why"), [(Lying, r"\(3, 64\)"), (LyingVector, r"\(63,\)"), (BadText, "Unicode")]
)
def test_a_source_that_contradicts_itself_is_an_error(tmp_path, source, why):
    with pytest.raises(FormatError, match=why):
        convert(source(tiny()), tmp_path / "m", Q4)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(("text", "why"), [("x" * 200_000, "too long"), ("\ud800", "YAML")])
def test_provenance_that_no_manifest_can_hold_is_an_error_at_once(tmp_path, text, why):
    source = Counting(tiny())
    source.provenance = {"name": text}
    with pytest.raises(FormatError, match=why):
        convert(source, tmp_path / "m", Q4)
    assert source.asked == []


def test_an_impossible_page_is_refused(tmp_path):
    with pytest.raises(FormatError, match="geometry"):
        convert(RandomSource(tiny()), tmp_path / "m", Q4, page=1000)


def test_progress_rises_to_the_total(tmp_path):
    seen = []
    convert(RandomSource(tiny()), tmp_path / "m", Q4, lambda *step: seen.append(step))
    names, done, totals = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    assert len(set(totals)) == 1
    assert done[-1] == totals[0]
    assert {"embed.weight", "layers.1.ffn", "checksum of neurons.safetensors"} <= set(names)


def test_memory_stays_near_one_tensor_and_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("pi2.convert.CHUNK", 1 << 16)
    arch = tiny(d_model=256, n_neurons=2048, head_dim=64, n_layers=3, rope=None)
    largest = 4 * 256 * 2048
    tracemalloc.start()
    try:
        convert(RandomSource(arch), tmp_path / "m", Q4)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * largest + (3 << 20)  # the source makes its tensor from another one of that size


class Fake(ModelFormat):
    name, suffix = "fake", ".fake"

    @classmethod
    def probe(cls):
        return Probe(10, "always")

    @classmethod
    def recognises(cls, path):
        return path.suffix == cls.suffix

    def load(self, path) -> ModelSource:
        return RandomSource(tiny())


class Rival(Fake):
    name = "rival"


class Other(Fake):
    name, suffix = "other", ".other"


def test_a_format_is_found_by_what_it_recognises(tmp_path):
    (tmp_path / "x.fake").touch()
    (tmp_path / "x.odd").touch()
    assert detect(tmp_path / "x.fake", [Other, Fake]) is Fake
    with pytest.raises(FormatError, match="no known model format") as caught:
        detect(tmp_path / "x.odd", [Other, Fake])
    assert caught.value.hint == "pi2 reads: fake, other"
    with pytest.raises(FormatError, match="fake, rival"):
        detect(tmp_path / "x.fake", [Rival, Fake])
    with pytest.raises(FormatError, match="no such file"):
        detect(tmp_path / "y.fake", [Fake])
