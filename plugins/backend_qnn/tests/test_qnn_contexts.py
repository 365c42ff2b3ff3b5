"""Contexts compiled ahead of time: the same bits, and an error of its own for all that can be wrong."""

import json
import re
import shutil

import numpy as np
import pytest
from command_line import pi2
from pi2.engine import Engine
from pi2.errors import StorageError
from pi2.hybrid import HybridOptions
from pi2.testing.models import toy_architecture, write_toy_model
from pi2_backend_qnn import errors
from pi2_backend_qnn.backend import QnnBackend
from pi2_backend_qnn.contexts import MANIFEST
from pi2_backend_qnn.probe import probe
from pi2_backend_qnn.programs import Programs

pytestmark = pytest.mark.skipif(not probe(), reason=probe().reason)
PROMPT = list(range(40, 46))
HOT = ("--hot", 0.6, "--hybrid", "cluster=32")
ARCH = toy_architecture(n_layers=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_toy_model(tmp_path_factory.mktemp("ahead") / "toy.pi2", ARCH, quant="q4_0")


def compiled(model, folder, *more):
    return pi2(
        "compile", model, "--backend", "qnn:cluster=32", "--soc", "SM8650", "--out", folder, *HOT, *more
    )


@pytest.fixture(scope="module")
def contexts(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("contexts") / "toy.qnn"
    done = compiled(model, folder, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["use"] == f"qnn:contexts={folder},soc=SM8650"
    return folder


@pytest.fixture
def copied(contexts, tmp_path):
    return shutil.copytree(contexts, tmp_path / "toy.qnn")


def run(model, options="", hot=0.6):
    shared = HybridOptions(hot=hot, cluster=32)
    backend = f"qnn:emulator=on,cluster=32{options}"
    with Engine.open(model, backend=backend, cold="numpy", predictor="exact", hybrid=shared) as engine:
        session = engine.session()
        return np.concatenate([session.logits([token]) for token in PROMPT])


def change(folder, **values):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | values))


def test_loaded_contexts_give_the_bits_of_compiled_graphs(model, contexts):
    assert run(model, f",contexts={contexts}").tobytes() == run(model).tobytes()


def test_the_manifest_says_what_was_made_for_which_chip_of_which_weights(contexts, model):
    manifest = json.loads((contexts / MANIFEST).read_text())
    assert (manifest["soc"], manifest["arch"]) == ("SM8650", "V75")
    assert set(manifest["versions"]) == {"onnxruntime", "onnxruntime-qnn"}
    assert set(manifest["source"]) == {"dense.safetensors", "neurons.safetensors"}
    (graphs,) = manifest["graphs"].values()  # of one FFN
    assert set(graphs) == {f"{rows}x{part}" for rows in (1, 4, 8) for part in (1, 2, 3)} | {"32x3", "128x3"}
    named = {(g["folder"], name) for g in graphs.values() for name in g["files"]}
    there = {(f.parent.name, f.name) for f in contexts.rglob("graph*")}
    assert named == there


def test_a_disk_that_is_too_small_is_noticed_before_the_first_graph(model, contexts, tmp_path, monkeypatch):
    """What is needed is never more than what is written in the end; what an earlier attempt made counts."""
    written = sum(file.stat().st_size for file in contexts.rglob("*.bin"))
    free = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr("pi2_backend_qnn.contexts.shutil.disk_usage", lambda folder: free)
    done = compiled(model, tmp_path / "toy.qnn")
    assert done.exit_code != 0
    assert "MB are needed, 0.0 MB are free" in done.stderr
    assert not list(tmp_path.rglob("*.bin"))
    needed = float(re.search(r"at least ([0-9.]+) MB are needed", done.stderr)[1]) * 1e6
    assert 0 < needed <= written
    shutil.copytree(contexts, tmp_path / "toy.qnn.partial", dirs_exist_ok=True)
    assert compiled(model, tmp_path / "toy.qnn").exit_code == 0


def test_a_flipped_bit_of_a_weight_is_noticed(model, copied):
    """QNN would compute with it."""
    for file in copied.rglob("*.bin"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    with pytest.raises(errors.ContextDamaged, match="checksum") as refusal:
        run(model, f",contexts={copied}")
    assert "pi2 compile" in refusal.value.hint


def test_a_missing_file_is_noticed(model, copied):
    for file in copied.rglob("*.bin"):
        file.unlink()
    with pytest.raises(errors.ContextDamaged, match="cannot be read"):
        run(model, f",contexts={copied}")


def test_contexts_of_another_chip_are_refused(model, contexts):
    with pytest.raises(errors.WrongSoc, match="compiled for SM8650, this is SM8550"):
        run(model, f",soc=SM8550,contexts={contexts}")


@pytest.mark.parametrize("what", ["versions", "options"])
def test_contexts_of_other_versions_or_options_are_refused(model, copied, what):
    manifest = json.loads((copied / MANIFEST).read_text())
    change(copied, **{what: manifest[what] | {"onnxruntime-qnn": "2.6.0"}})
    with pytest.raises(errors.WrongVersion, match=r"onnxruntime-qnn 2\.6\.0, this has"):
        run(model, f",contexts={copied}")


def test_other_weights_are_refused(contexts, tmp_path):
    other = write_toy_model(tmp_path / "other.pi2", ARCH, quant="q4_0", seed=1)
    with pytest.raises(errors.ContextMissing, match="these 96 neurons"):
        run(other, f",contexts={contexts}")


def test_a_folder_without_a_manifest_or_with_a_hostile_one_is_refused(copied, tmp_path):
    def refusal(kind):
        with pytest.raises(kind):
            QnnBackend.open({"emulator": "on", "cluster": "32", "contexts": str(copied)})

    manifest = json.loads((copied / MANIFEST).read_text())
    for text in ("{", "[]", "{}", json.dumps(manifest | {"format": 99})):
        (copied / MANIFEST).write_text(text)
        refusal(errors.ContextDamaged)
    outside = {"x": {"1x1": {"folder": "..", "files": {"graph.onnx": "0" * 64}}}}
    (copied / MANIFEST).write_text(json.dumps(manifest | {"graphs": outside}))
    refusal(errors.ContextDamaged)
    (copied / MANIFEST).unlink()
    refusal(errors.ContextMissing)


def test_what_was_stopped_goes_on_and_nothing_is_made_twice(model, contexts, tmp_path, monkeypatch):
    folder, made, save = tmp_path / "toy.qnn", [], Programs.save

    def counted(self, placed, shape, path):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(shape)
        save(self, placed, shape, path)

    monkeypatch.setattr(Programs, "save", counted)
    assert compiled(model, folder).exit_code == 130
    assert not folder.exists()
    made[:] = [None]
    monkeypatch.setattr(Programs, "save", lambda *a: (made.append(a[2]), save(*a)))
    assert compiled(model, folder).exit_code == 0
    assert len(made) == 1 + 11 - 4
    assert run(model, f",contexts={folder}").tobytes() == run(model, f",contexts={contexts}").tobytes()


def test_a_folder_that_exists_is_left_alone(model, copied):
    done = compiled(model, copied)
    assert done.exit_code == 1
    assert "exists already" in done.stderr


def test_the_whole_model_is_compiled_without_hot(model, tmp_path):
    folder = tmp_path / "all.qnn"
    done = pi2("compile", model, "--backend", "qnn:cluster=160", "--soc", "SM8650", "--out", folder)
    assert done.exit_code == 0, done.stderr
    with Engine.open(
        model, backend=f"qnn:emulator=on,cluster=160,contexts={folder}", predictor="exact"
    ) as engine:
        many = engine.logits(PROMPT)
    with Engine.open(model, backend="numpy", predictor="exact") as engine:
        dense = engine.logits(PROMPT)
    assert np.linalg.norm(many - dense) < QnnBackend.tolerance * np.linalg.norm(dense)


def test_a_disk_that_is_full_is_one_error(model, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Programs, "save", full)
    options = {"cluster": "32"}
    from pi2.ahead import to_place
    from pi2.builtin.mmap_tier import MmapTier
    from pi2.container import open_model

    opened = open_model(model, MmapTier.open())
    with pytest.raises(StorageError, match="No space left"):
        QnnBackend.compile(to_place(opened, None, []), tmp_path / "x", options, lambda *_: None)
    opened.close()
