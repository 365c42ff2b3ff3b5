"""Predictors that others trained: GGUF, .pt files and checkpoints, in twelve layers that sort wrongly."""

import struct

import gguf
import numpy as np
import pytest
import torch
from pi2.errors import FormatError, OptionError, Pi2Error, StorageError, UnsupportedModel
from pi2.lowrank.imports import import_predictors
from pi2.testing.models import toy_architecture
from safetensors.numpy import save_file

ARCH = toy_architecture(n_layers=12)
D, N = ARCH.d_model, ARCH.n_neurons


def weights(width=40):
    """Layer -> fc1, fc2; the layer's number is the first weight of both."""
    rng = np.random.default_rng(0)
    found = {}
    for layer in range(12):
        found[layer] = (
            rng.normal(0, 1, (width, D)).astype(np.float32),
            rng.normal(0, 1, (N, width)).astype(np.float32),
        )
        found[layer][0][0, 0] = found[layer][1][0, 0] = layer
    return found


def write_gguf(path, made, rename=lambda name: name):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(12)
    for layer in sorted(made, key=str):
        for part, values in enumerate(made[layer], 1):
            writer.add_tensor(rename(f"blk.{layer}.fc{part}.weight"), values)
    writer.add_tensor("output_norm.weight", np.ones(D, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_powerinfer(path, made):
    whole = write_gguf(path, made).read_bytes()
    path.write_bytes(b"PWRI" + whole[4:])
    return path


def write_pt(path, made):
    path.mkdir()
    for layer, (fc1, fc2) in made.items():
        torch.save(
            {"fc1.weight": torch.tensor(fc1), "fc2.weight": torch.tensor(fc2)}, path / f"model_{layer}.pt"
        )
    return path


def write_checkpoint(path, made, at="model.layers.{}.mlp.predictor.fc{}.weight"):
    path.mkdir()
    tensors = {at.format(layer, part): w for layer, both in made.items() for part, w in enumerate(both, 1)}
    save_file(tensors | {"model.norm.weight": np.ones(D, np.float32)}, path / "model.safetensors")
    return path


WRITERS = {"gguf": write_gguf, "powerinfer": write_powerinfer, "pt": write_pt, "checkpoint": write_checkpoint}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_gives_the_same_predictors_in_the_right_layers(tmp_path, kind):
    made = weights()
    found = import_predictors(WRITERS[kind](tmp_path / "p", made), ARCH, "f32")
    assert list(found) == list(range(12))
    for layer, predictor in found.items():
        fc1, fc2 = predictor.fc1.to_f32(), predictor.fc2.to_f32()
        assert (predictor.width, predictor.threshold, predictor.measured) == (64, 0.0, None)  # filled up
        assert fc1[0, 0] == fc2[0, 0] == layer
        assert np.array_equal(fc1[:40], made[layer][0])
        assert np.array_equal(fc2[:, :40], made[layer][1])
        assert not fc1[40:].any()
        assert not fc2[:, 40:].any()


def test_weights_are_stored_as_asked(tmp_path):
    path = write_pt(tmp_path / "p", weights(32))
    assert import_predictors(path, ARCH, "q4_0")[7].fc2.dtype == "q4_0"


@pytest.mark.parametrize("kind", WRITERS)
def test_predictors_of_another_model_are_refused(tmp_path, kind):
    path = WRITERS[kind](tmp_path / "p", weights())
    with pytest.raises(OptionError, match="not of 96 inputs"):
        import_predictors(path, toy_architecture(n_layers=12, d_model=96), "f32")
    with pytest.raises(FormatError, match="of no layer"):
        import_predictors(path, toy_architecture(n_layers=11), "f32")


@pytest.mark.parametrize("kind", WRITERS)
def test_half_a_predictor_is_refused(tmp_path, kind):
    made = weights()
    made[4] = made[4][:1]
    if kind == "pt":
        path = write_pt(tmp_path / "p", weights())
        torch.save({"fc1.weight": torch.tensor(made[4][0])}, path / "model_4.pt")
    else:
        path = WRITERS[kind](tmp_path / "p", made)
    with pytest.raises(FormatError, match="layer 4 is incomplete"):
        import_predictors(path, ARCH, "f32")


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    made = weights()
    made[3][0][1, 1] = np.inf
    with pytest.raises(FormatError, match="layer 3 holds what is no number"):
        import_predictors(write_gguf(tmp_path / "p", made), ARCH, "f32")


def test_predictors_of_experts_are_not_taken_for_those_of_layers(tmp_path):
    at = "model.layers.{}.block_sparse_moe.experts.0.predictor.fc{}.weight"
    with pytest.raises(UnsupportedModel, match="every expert"):
        import_predictors(write_checkpoint(tmp_path / "p", weights(), at), ARCH, "f32")


class Evil:
    """Unpickling it would make a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_that_would_run_code_does_not(tmp_path):
    path = write_pt(tmp_path / "p", weights())
    torch.save({"fc1.weight": Evil(tmp_path / "evil")}, path / "model_2.pt")
    with pytest.raises(FormatError, match=r"model_2\.pt is no PyTorch file of tensors"):
        import_predictors(path, ARCH, "f32")
    assert not (tmp_path / "evil").exists()
    torch.save([1, 2], path / "model_2.pt")
    with pytest.raises(FormatError, match="does not hold named tensors"):
        import_predictors(path, ARCH, "f32")


def test_what_holds_no_predictors_says_what_would(tmp_path):
    (tmp_path / "empty").mkdir()
    write_gguf(tmp_path / "bare", {})
    write_checkpoint(tmp_path / "plain", {})
    for name in ("empty", "bare", "plain"):
        with pytest.raises(FormatError, match="holds no predictors") as refusal:
            import_predictors(tmp_path / name, ARCH, "f32")
        assert "PowerInfer" in refusal.value.hint
    with pytest.raises(StorageError, match="no such file"):
        import_predictors(tmp_path / "absent", ARCH, "f32")


def test_a_damaged_gguf_is_one_error(tmp_path):
    whole = write_powerinfer(tmp_path / "p", weights()).read_bytes()
    for at in (0, 3, 9, 200, len(whole) // 2):
        (tmp_path / "p").write_bytes(whole[:at])
        with pytest.raises(Pi2Error):
            import_predictors(tmp_path / "p", ARCH, "f32")
    (tmp_path / "p").write_bytes(whole[:8] + struct.pack("<Q", 1 << 60) + whole[16:])
    with pytest.raises(Pi2Error):
        import_predictors(tmp_path / "p", ARCH, "f32")
