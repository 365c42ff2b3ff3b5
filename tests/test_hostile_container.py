"""Damaged pi2 models: each is one Pi2Error, with little memory, whatever was changed."""

import contextlib
import os
import shutil
import struct

import numpy as np
import pytest
import yaml
from hostile import assert_refused, relist, sound_model, use
from pi2.builtin.mmap_tier import MmapTier
from pi2.container import open_model
from pi2.container.manifest import REQUIRED
from pi2.errors import FormatError, Pi2Error, StorageError

FILES = ("pi2.yaml", *REQUIRED, "chat_template.jinja")
DENSE, NEURONS = "dense.safetensors", "neurons.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return sound_model(tmp_path_factory.mktemp("sound") / "m")


@pytest.fixture
def model(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "m")


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
