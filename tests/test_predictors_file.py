"""``predictors.safetensors``: what is written is read back, and nothing hostile gets through."""

import json
import struct

import numpy as np
import pytest
from lowrank_files import install, model_hash, random_layer, random_predictors
from pi2.builtin.mmap_tier import MmapTier
from pi2.container import Predictors, model_predictors, open_model
from pi2.container.predictors import PREDICTORS
from pi2.container.safetensors_file import build_header
from pi2.errors import FormatError, Pi2Error
from pi2.tensor import DTYPES
from pi2.testing.models import toy_architecture, write_toy_model
from safetensors.numpy import load_file

ARCH = toy_architecture(n_layers=12, vocab_size=261)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_toy_model(tmp_path_factory.mktemp("models") / "toy", ARCH)


@pytest.fixture
def file(model, tmp_path):
    path = tmp_path / "p.safetensors"
    random_predictors(model, ARCH).save(path)
    return path


def same(a, b):
    assert (a.model, a.loss, a.training, list(a.layers)) == (b.model, b.loss, b.training, list(b.layers))
    for x, y in zip(a.layers.values(), b.layers.values(), strict=True):
        assert (x.threshold, x.measured, x.nbytes) == (y.threshold, y.measured, y.nbytes)
        for one, other in ((x.fc1, y.fc1), (x.fc2, y.fc2)):
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert np.array_equal(one.data, other.data)
        assert np.array_equal(x.fc1_bias, y.fc1_bias)
        assert np.array_equal(x.fc2_bias, y.fc2_bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_saved_is_loaded_in_every_format(model, tmp_path, dtype):
    made = random_predictors(model, ARCH, dtype=dtype)
    made.loss = 0.0125
    made.save(tmp_path / "p")
    same(Predictors.load(tmp_path / "p", ARCH, made.model), made)


def test_a_layer_is_found_by_its_number_however_names_sort(model, tmp_path):
    """Of twelve layers 10 and 11 sort before 2, and the layers are given in no order."""
    rng = np.random.default_rng(3)
    made = Predictors(model_hash(model), {})
    for n in rng.permutation(12).tolist():
        made.layers[n] = random_layer(rng, ARCH.d_model, ARCH.n_neurons)
        made.layers[n].fc2_bias[:] = n
    del made.layers[7]  # a layer may have none
    made.save(tmp_path / "p")
    found = Predictors.load(tmp_path / "p", ARCH, made.model).layers
    assert list(found) == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    assert all((layer.fc2_bias == n).all() for n, layer in found.items())


def test_the_safetensors_library_reads_the_file(file):
    tensors = load_file(file)
    assert tensors["layers.11.ffn.fc2.weight"].shape == (ARCH.n_neurons, 64 * 34 // 32)
    assert tensors["layers.3.ffn.threshold"] == 0


def test_the_model_opens_with_predictors_and_finds_them(model):
    made = random_predictors(model, ARCH, seed=1)
    install(model, made)
    tier = MmapTier()
    assert PREDICTORS in open_model(model, tier, verify=True).manifest.files
    tier.close()
    same(model_predictors(model, ARCH), made)


def test_a_model_without_predictors_says_how_to_make_them(tmp_path):
    bare = write_toy_model(tmp_path / "bare")
    with pytest.raises(FormatError, match="no predictors") as refusal:
        model_predictors(bare, toy_architecture())
    assert "pi2 train-predictor" in refusal.value.hint
    with pytest.raises(FormatError, match="No such file"):
        model_predictors(bare, toy_architecture(), tmp_path / "nothing")


def test_predictors_of_another_model_are_refused(file):
    with pytest.raises(FormatError, match="another model"):
        Predictors.load(file, ARCH, "0" * 64)


def rewritten(file, change):
    """The file with ``change(metadata, tensors)`` applied to its header; the data stays."""
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    raw = json.loads(whole[8 : 8 + length])
    metadata = raw.pop("__metadata__")
    tensors = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in raw.items()}
    change(metadata, tensors)
    head, _ = build_header(tensors, metadata, 4096)
    file.write_bytes(head + whole[8 + length :])


def renamed(tensors, old, new):
    items = [(new if name == old else name, value) for name, value in tensors.items()]
    tensors.clear()
    tensors.update(items)


FC1, FC2 = "layers.3.ffn.fc1.weight", "layers.3.ffn.fc2.weight"


def bytes_of(tensors):
    """Of both weights of layer 3."""
    return sum(int(np.prod(tensors[name][1])) for name in (FC1, FC2))


HOSTILE = {
    "format": lambda m, t: m.update(format="pi2 predictors 2"),
    "unknown tensor": lambda m, t: renamed(t, FC1, "layers.3.ffn.fc3.weight"),
    "unknown tensor ": lambda m, t: renamed(t, FC1, "layers.12.ffn.fc1.weight"),
    "unknown tensor  ": lambda m, t: renamed(t, FC1, "layers.03.ffn.fc1.weight"),
    "give the format": lambda m, t: m.pop(FC1),
    "give the format ": lambda m, t: m.update({FC1: "q2_k"}),
    "is U8": lambda m, t: m.update({FC1: "q4_0"}),
    "not F32": lambda m, t: t.update({"layers.3.ffn.threshold": ("U8", (4,))}),
    "not U8": lambda m, t: t.update({FC2: ("U8", tuple(reversed(t[FC2][1])))}),
    "impossible width": lambda m, t: t.update({FC1: ("U8", (0, 68)), FC2: ("U8", (bytes_of(t),))}),
    "malformed": lambda m, t: m.update(measured='{"loss": "no", "layers": {}}'),
    "malformed ": lambda m, t: m.update(measured='{"loss": null, "layers": {"1": [0.1, 0.2]}}'),
    "malformed  ": lambda m, t: m.update(measured='{"loss": null, "layers": {"1": [0.1, 0.2, 7]}}'),
    "measured is not": lambda m, t: m.update(measured="[]"),
    "training is not": lambda m, t: m.update(training="nonsense"),
    "checksum": lambda m, t: m.update(sha256="0" * 64),
}


@pytest.mark.parametrize("why", sorted(HOSTILE))
def test_a_header_that_lies_is_refused(model, file, why):
    rewritten(file, HOSTILE[why])
    with pytest.raises(FormatError, match=why.strip()) as refusal:
        Predictors.load(file, ARCH, model_hash(model))
    assert str(file) in str(refusal.value)
    assert refusal.value.hint


def test_a_layer_that_lacks_a_tensor_is_refused(model, tmp_path):
    made = random_predictors(model, ARCH)
    made.save(tmp_path / "p")
    rewritten(tmp_path / "p", lambda m, t: renamed(t, "layers.11.ffn.threshold", "layers.11.ffn.fc1.bias"))
    with pytest.raises(FormatError):
        Predictors.load(tmp_path / "p", ARCH, made.model)


@pytest.mark.parametrize("name", ["fc1_bias", "fc2_bias"])
def test_a_bias_that_is_no_number_is_refused(model, tmp_path, name):
    made = random_predictors(model, ARCH)
    getattr(made.layers[5], name)[3] = np.nan
    made.save(tmp_path / "p")
    with pytest.raises(FormatError, match="no number"):
        Predictors.load(tmp_path / "p", ARCH, made.model)


def test_a_file_cut_or_changed_anywhere_is_refused(model, file):
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    for at in [0, 7, 8, 9, *rng.integers(0, len(whole), 30).tolist()]:
        file.write_bytes(whole[:at])
        with pytest.raises(Pi2Error):
            Predictors.load(file, ARCH, model_hash(model))
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    for at in rng.integers(start, len(whole), 20).tolist():
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(FormatError, match="checksum"):
            Predictors.load(file, ARCH, model_hash(model))


def test_flipped_bytes_in_the_header_never_crash(model, file):
    whole = file.read_bytes()
    rng = np.random.default_rng(1)
    for at in rng.integers(0, 5000, 150).tolist():
        file.write_bytes(whole[:at] + rng.bytes(1) + whole[at + 1 :])
        try:
            Predictors.load(file, ARCH, model_hash(model))
        except Pi2Error:
            continue  # a change without consequence may be accepted
