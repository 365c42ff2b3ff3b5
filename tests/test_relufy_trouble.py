"""Relufication that cannot be, or is disturbed: refused early, in one sentence, with nothing lost."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from pi2.errors import FormatError, OptionError, Pi2Error, StorageError, UnsupportedModel
from pi2.relufy import open_relufication
from pi2.relufy.distil import Distiller
from pi2.relufy.workplace import CHECKPOINT, workplace_path
from pi2.testing.models import toy_architecture
from relufy_texts import quick, run, silu_source, write_texts


@pytest.fixture
def texts(tmp_path):
    return write_texts(tmp_path)


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path, texts):
    run(tmp_path / "m", texts, stop_after=5)
    place = workplace_path(tmp_path / "m")
    with pytest.raises(OptionError, match="is of another model") as caught:
        run(tmp_path / "m", texts, source=silu_source(1))
    assert "--restart" in caught.value.hint
    with pytest.raises(OptionError, match="another --from"):
        run(tmp_path / "m", texts, start=silu_source(2, activation="relu"))
    whole = (place / CHECKPOINT).read_bytes()
    (place / CHECKPOINT).write_bytes(whole[:-4])
    with pytest.raises(FormatError, match="tensors end at byte"):
        run(tmp_path / "m", texts)
    for old, new, message in (
        (b'"state"', b'"stats"', "no checkpoint"),
        (b'\\"done\\"', b'\\"dome\\"', "no checkpoint"),
        (b"final_norm.weight:mean", b"final_norm.weight:bean", "other tensors"),
    ):
        assert old in whole
        (place / CHECKPOINT).write_bytes(whole.replace(old, new))
        with pytest.raises(FormatError, match=message):
            run(tmp_path / "m", texts)
    (place / "report.json").write_text('{"a": 1}')
    with pytest.raises(FormatError, match="no report"):
        run(tmp_path / "m", texts)
    run(tmp_path / "m", texts, quick(tokens=500), restart=True)


def test_what_cannot_be_done_is_refused_before_anything_is_trained(tmp_path, texts, monkeypatch):
    for activation in ("relu", "relu2"):
        with pytest.raises(UnsupportedModel, match=f"is {activation} already"):
            run(tmp_path / "m", texts, source=silu_source(activation=activation))
    with pytest.raises(UnsupportedModel, match="no ReLU twin of this one"):
        run(tmp_path / "m", texts, start=silu_source(activation="relu", n_layers=3))
    for changes, message in (
        ({"tokens": None}, "when to stop"),
        ({"tokens": 0}, "tokens = 0"),
        ({"density": 1.5}, "density = 1.5"),
        ({"sequence": 8}, "teach nothing"),
        ({"shares": (1.0,)}, "1 shares for 2 texts"),
        ({"held_out": 100}, "too few to measure"),
    ):
        with pytest.raises(OptionError, match=message):
            run(tmp_path / "m", texts, quick(**changes))
    (tmp_path / "there").mkdir()
    with pytest.raises(FormatError, match="exists already"):
        run(tmp_path / "there", texts)
    (tmp_path / "there" / "mine").touch()
    with pytest.raises(FormatError, match="no file of a pi2 model"):
        run(tmp_path / "there", texts, overwrite=True)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(Pi2Error, match="relufication needs PyTorch, which is not installed") as caught:
        run(tmp_path / "m", texts)
    assert "pi2[train]" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "short", "too few to hold some out"),
        ("a.jsonl", "{", "line 1 is not JSON"),
        ("a.jsonl", "\n[]", "line 2 has neither"),
        ("a.jsonl", json.dumps({"messages": [{"role": 1}]}), "line 1 has neither"),
        ("a.jsonl", json.dumps({"text": "x" * 400}), "only one document"),
    ],
)
def test_a_text_that_is_of_no_use_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(OptionError, match=message):
        run(tmp_path / "m", [path])


def test_conversations_need_a_template(tmp_path, texts, monkeypatch):
    source = silu_source()
    monkeypatch.setattr(source, "chat_template", lambda: None)
    with pytest.raises(OptionError, match=r"chat.jsonl line 1 is a conversation"):
        run(tmp_path / "m", texts, source=source)


def test_one_training_at_a_time(tmp_path, texts):
    with (
        open_relufication(silu_source(), texts, tmp_path / "m", quick()),
        pytest.raises(StorageError, match="another training"),
    ):
        run(tmp_path / "m", texts)
    workplace_path(tmp_path / "n").touch()
    with pytest.raises(StorageError, match="exists"):
        run(tmp_path / "n", texts)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, texts, monkeypatch):
    run(tmp_path / "m", texts, stop_after=5)
    before = (workplace_path(tmp_path / "m") / CHECKPOINT).read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left"):
            run(tmp_path / "m", texts)
    assert (workplace_path(tmp_path / "m") / CHECKPOINT).read_bytes() == before


def test_degenerate_activations_cannot_be_refitted(tmp_path, texts):
    class Dead(type(silu_source())):
        def tensor(self, name):
            tensor = super().tensor(name)
            if name == "layers.1.ffn.up.weight":
                return type(tensor).from_f32(np.zeros(tensor.shape, np.float32))
            return tensor

    with pytest.raises(Pi2Error, match="refit of layer 1 has no solution"):
        run(tmp_path / "m", texts, source=Dead(toy_architecture(activation="silu")))


def test_a_training_that_diverges_ends_with_an_error(tmp_path, texts, monkeypatch):
    loss = Distiller._loss
    monkeypatch.setattr(Distiller, "_loss", lambda *a: ((found := loss(*a))[0] * float("nan"), found[1]))
    with pytest.raises(Pi2Error, match="has diverged: 20 steps"):
        run(tmp_path / "m", texts)


def test_importing_the_package_does_not_import_torch():
    code = "import sys; import pi2.relufy, pi2.cli.app; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
