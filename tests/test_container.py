"""Writer and reader together: what is converted comes back, by pi2 and by the stock safetensors library."""

import json

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pi2 import inventory
from pi2.api import Probe, StorageTier
from pi2.builtin.mmap_tier import MmapTier
from pi2.container import Manifest, list_file, open_model, read_manifest
from pi2.container.layout import DENSE, NEURONS
from pi2.container.reader import PiModel
from pi2.container.safetensors_file import build_header, read_header
from pi2.convert import QuantPlan, convert
from pi2.errors import FormatError, OptionError
from pi2.tensor import DTYPES, Tensor, encode
from safetensors import safe_open
from safetensors.numpy import load_file
from sources import TOKENIZER, RandomSource, tiny

SHAPES = {
    "plain": tiny(),
    "tied": tiny(tied=True, n_layers=1),
    "no gate, biases": tiny(gated=False, activation="relu2", ffn_bias=True, o_bias=True, qkv_bias=True),
    "gate and biases": tiny(ffn_bias=True, norm="layer", norm_bias=True),
    "learned positions": tiny(rope=None, norm_place="post", final_norm=False),
    "odd width": tiny(d_model=36, n_heads=2, n_kv_heads=1, head_dim=18, rope=None),
    "sandwich": tiny(norm_place="sandwich", qk_norm=True, n_neurons=64),
}


class CopyingTier(StorageTier):
    """A tier with the floor methods only: no views."""

    name = "copying"

    def __init__(self):
        self.files = []

    @classmethod
    def probe(cls):
        return Probe(1, "for tests")

    def open_file(self, path):
        self.files.append(path)
        return len(self.files) - 1

    def read(self, file, ranges, into):
        content = self.files[file].read_bytes()
        into[:] = np.frombuffer(b"".join(content[o : o + n] for o, n in ranges.tolist()), np.uint8)


def assert_holds(model, source, quant):
    """Every weight of ``source`` is in ``model`` in the format wanted, or in f16 where a note says so."""
    arch = source.architecture
    assert model.architecture == arch
    for name in inventory.dense_vectors(arch):
        np.testing.assert_array_equal(model.vector(name), source.vector(name))
    for name, shape in inventory.dense_matrices(arch).items():
        tensor = model.matrix(name)
        kind = {"embed": quant.embed, "head": quant.head}.get(name.split(".")[0], quant.attention)
        fits = kind in ("f32", "f16") or shape[1] % 32 == 0
        assert tensor.shape == shape
        assert tensor.dtype == (kind if fits else "f16")
        assert fits or any("cannot be stored" in note for note in model.manifest.notes)
        np.testing.assert_array_equal(tensor.data, encode(source.tensor(name).to_f32(), tensor.dtype))
    g = model.geometry
    for layer in range(arch.n_layers):
        bundles = model.bundles(layer)
        assert bundles.shape == (arch.n_neurons, g.stride)
        neurons = g.unpack(bundles)
        for part, name in inventory.neuron_matrices(arch, layer).items():
            expected = Tensor.from_f32(source.tensor(name).to_f32(), getattr(g, part)).to_f32()
            np.testing.assert_array_equal(getattr(neurons, part), expected)
        for name in inventory.neuron_biases(arch, layer):
            part = name.split(".")[-2]
            np.testing.assert_array_equal(getattr(neurons, f"{part}_bias"), source.vector(name))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_converted_model_comes_back(tmp_path, shape, dtype):
    source, quant = RandomSource(SHAPES[shape], template="{{ messages }}"), QuantPlan.named(dtype)
    path = convert(source, tmp_path / "m", quant)
    with_view = open_model(path, MmapTier())
    for model in (with_view, open_model(path, CopyingTier(), verify=False)):
        assert_holds(model, source, quant)
        assert model.tokenizer_json == TOKENIZER
        assert model.chat_template == "{{ messages }}"
        assert model.nbytes == (path / DENSE).stat().st_size + (path / NEURONS).stat().st_size
        model.close()
    assert with_view.verified
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


@given(
    formats=st.tuples(*[st.sampled_from(DTYPES)] * 6),
    stored=st.sampled_from(DTYPES),
    gated=st.booleans(),
    bias=st.booleans(),
    page=st.sampled_from([64, 512, 4096, 16384]),
    neurons=st.integers(1, 40),
)
@settings(deadline=None, max_examples=25)
def test_any_mixture_of_formats_comes_back(tmp_path_factory, formats, stored, gated, bias, page, neurons):
    quant = QuantPlan(**dict(zip(("gate", "up", "down", "attention", "embed", "head"), formats, strict=True)))
    arch = tiny(gated=gated, ffn_bias=bias, n_neurons=neurons, n_layers=2)
    source = RandomSource(arch, dtype=stored)
    path = convert(source, tmp_path_factory.mktemp("any") / "m", quant, page=page)
    model = open_model(path, MmapTier())
    for name in inventory.dense_matrices(arch):
        ours, theirs = model.matrix(name), source.tensor(name)
        expected = theirs.data if ours.dtype == stored else encode(theirs.to_f32(), ours.dtype)
        np.testing.assert_array_equal(ours.data, expected)
    for layer in range(2):
        places = model.geometry.segments()
        for part, name in inventory.neuron_matrices(arch, layer).items():
            offset, size = places[part]
            theirs, dtype = source.tensor(name), getattr(quant, part)
            expected = theirs.data if dtype == stored else encode(theirs.to_f32(), dtype)
            np.testing.assert_array_equal(model.bundles(layer)[:, offset : offset + size], expected)
        place = model.ffn_place(layer)
        assert place.ffn == layer
        assert place.offset % max(4096, page) == 0
        raw = place.path.read_bytes()[place.offset : place.offset + neurons * model.geometry.stride]
        assert raw == model.bundles(layer).tobytes()


@pytest.mark.parametrize("shape", SHAPES)
def test_stock_safetensors_opens_both_files(tmp_path, shape):
    source = RandomSource(SHAPES[shape])
    path = convert(source, tmp_path / "m", QuantPlan.named("q4_0"))
    model = open_model(path, MmapTier())
    dense, neurons = load_file(path / DENSE), load_file(path / NEURONS)
    assert set(dense) == set(inventory.dense_matrices(source.architecture)) | set(
        inventory.dense_vectors(source.architecture)
    )
    for name in inventory.dense_matrices(source.architecture):
        assert dense[name].tobytes() == model.matrix(name).data.tobytes()
    for layer in range(source.architecture.n_layers):
        np.testing.assert_array_equal(neurons[inventory.ffn_name(layer)], model.bundles(layer))
    with safe_open(path / DENSE, "numpy") as f:
        assert f.metadata()["embed.weight"] == model.matrix("embed.weight").dtype


def test_bytes_are_read_only_and_aligned_where_the_shapes_allow(tmp_path):
    path = convert(RandomSource(tiny()), tmp_path / "m", QuantPlan.named("q4_0"))
    for tier in (MmapTier(), CopyingTier()):
        model = open_model(path, tier)
        for array in (model.bundles(0), model.matrix("embed.weight").data, model.vector("final_norm.weight")):
            assert not array.flags.writeable
    assert read_header(path / DENSE).data_start % 4096 == 0
    assert read_header(path / NEURONS).data_start % 4096 == 0


def test_unknown_names_are_key_errors(tmp_path):
    model = open_model(convert(RandomSource(tiny()), tmp_path / "m", QuantPlan.named("f32")), MmapTier())
    for ask in (lambda: model.matrix("nothing"), lambda: model.vector("nothing"), lambda: model.bundles(9)):
        with pytest.raises(KeyError):
            ask()


def test_the_manifest_says_what_the_model_is_and_is_plain_yaml(tmp_path):
    source = RandomSource(tiny())
    source.notes = ["gate was K-quantised: dequantised"]
    path = convert(source, tmp_path / "m", QuantPlan.named("q4_0"))
    raw = yaml.safe_load((path / "pi2.yaml").read_text())
    assert (raw["format"], raw["version"], raw["family"]) == ("pi2", 1, "llama")
    assert raw["source"] == source.provenance
    assert raw["notes"] == source.notes
    assert raw["quantisation"] == {
        "gate": "q4_0", "up": "q4_0", "down": "q4_0", "attention": "q4_0", "embed": "q8_0", "head": "q8_0"
    }  # fmt: skip
    assert raw["bundle"]["segments"] == {"gate": [0, 36], "up": [48, 36], "down": [96, 36]}
    assert set(raw["files"]) == {"config.json", "tokenizer.json", DENSE, NEURONS}
    assert json.loads((path / "config.json").read_text())["d_model"] == 64


def test_a_manifest_survives_its_file(tmp_path):
    path = convert(RandomSource(tiny()), tmp_path / "m", QuantPlan.named("q8_0"))
    manifest = read_manifest(path)
    assert Manifest.from_yaml(manifest.to_yaml().encode()) == manifest


def test_an_optional_file_can_be_listed_later_and_is_then_checked(tmp_path):
    path = convert(RandomSource(tiny()), tmp_path / "m", QuantPlan.named("q8_0"))
    (path / "plan.yaml").write_text("threads: 2\n")
    assert open_model(path, MmapTier()).verified  # an unlisted file is nobody's business
    list_file(path, "plan.yaml")
    assert open_model(path, MmapTier()).manifest.files["plan.yaml"].nbytes == 11
    (path / "plan.yaml").write_text("threads: 9\n")
    with pytest.raises(FormatError, match=r"checksum of plan\.yaml"):
        open_model(path, MmapTier())
    assert not open_model(path, MmapTier(), verify=False).verified
    with pytest.raises(FormatError, match="no optional file"):
        list_file(path, "../plan.yaml")
    with pytest.raises(FormatError, match="missing"):
        list_file(path, "statistics.safetensors")


def test_weights_beyond_the_limit_are_checksummed_only_when_asked(tmp_path, monkeypatch):
    path = convert(RandomSource(tiny()), tmp_path / "m", QuantPlan.named("q8_0"))
    with (path / NEURONS).open("r+b") as f:
        f.seek(-5000, 2)
        f.write(b"\xff\xfe\xfd")
    monkeypatch.setattr("pi2.container.reader.VERIFY_UP_TO", 1000)
    model = open_model(path, MmapTier())
    assert isinstance(model, PiModel)
    assert not model.verified
    with pytest.raises(FormatError, match=r"checksum of neurons\.safetensors"):
        open_model(path, MmapTier(), verify=True)
    monkeypatch.undo()
    with pytest.raises(FormatError, match=r"checksum of neurons\.safetensors"):
        open_model(path, MmapTier())


@given(
    tensors=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda s: s != "__metadata__"),
        st.tuples(
            st.sampled_from(["U8", "F16", "F32", "I64"]), st.lists(st.integers(0, 9), max_size=3).map(tuple)
        ),
        max_size=6,
    ),
    align=st.sampled_from([8, 512, 4096]),
)
@settings(deadline=None, max_examples=60)
def test_a_header_reads_back_as_it_was_built(tmp_path_factory, tensors, align):
    head, header = build_header(tensors, {"a": "b"}, align)
    path = tmp_path_factory.mktemp("header") / "x.safetensors"
    path.write_bytes(head + bytes(sum(e.nbytes for e in header.entries.values())))
    assert read_header(path) == header
    assert header.data_start == len(head)
    assert len(head) % align == 0


def test_plans_have_names_and_exceptions():
    assert QuantPlan.named("q4_0") == QuantPlan(
        gate="q4_0", up="q4_0", down="q4_0", attention="q4_0", embed="q8_0", head="q8_0"
    )
    plan = QuantPlan.named("q4_0", attention="q8_0", embed=None, down="f16")
    assert (plan.attention, plan.embed, plan.down, plan.up) == ("q8_0", "q8_0", "f16", "q4_0")
    with pytest.raises(OptionError, match="q5_1"):
        QuantPlan.named("q5_1")
    with pytest.raises(OptionError, match="no kind of matrix"):
        QuantPlan.named("f16", router="f32")
