"""The generated benchmark model is what it claims to be."""

import dataclasses

import activity
import numpy as np
import pytest
from gguf_export import export
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_model import make
from model_check import check, decoded_inputs
from parity.llama_cpp import LlamaCpp
from pi2 import inventory
from pi2.activity import gate_values
from pi2.builtin.mmap_tier import MmapTier
from pi2.container import open_model, read_manifest
from pi2.engine import Engine
from pi2.formats.gguf_source import GgufFormat
from pi2.placement import BAND, reads
from pi2.statistics_file import STATISTICS, Statistics
from sparse_source import Shape, SparseSource

TINY = Shape(
    d_model=256, neurons=1024, layers=4, heads=4, kv_heads=2, head_dim=64, vocab=2048, context=512, rank=32
)
shapes = st.builds(
    Shape,
    d_model=st.sampled_from([96, 128, 320]),
    neurons=st.sampled_from([32, 96]),
    layers=st.integers(1, 2),
    heads=st.just(4),
    kv_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([32, 64]),
    vocab=st.sampled_from([300, 512]),
    context=st.just(64),
    rank=st.just(16),
    seed=st.integers(0, 1 << 32),
)
quick = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def names(shape):
    arch = shape.architecture()
    ffns = [name for i in range(arch.n_layers) for name in inventory.neuron_matrices(arch, i).values()]
    return [*inventory.dense_matrices(arch), *ffns]


def measured(path, tokens=160):
    with Engine.open(path, backend="numpy", context=300) as engine:
        inputs, _, _ = decoded_inputs(engine, list(range(100)), tokens)
        return activity.measure([gate_values(engine.model, ffn, x) for ffn, x in enumerate(inputs)])["mean"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make(tmp_path_factory.mktemp("tiny"), TINY, page=512, margin=0.3, collect=512)


def test_density_skew_overlap_and_predictor_are_as_asked(tiny):
    report = check(tiny, prompt=100, tokens=160, backend="numpy")
    mean = report["activity"]["mean"]
    assert 0.07 < mean["density"] < 0.13
    assert all(0.05 < d < 0.17 for d in report["activity"]["density_by_ffn"])
    assert 0.4 < mean["top"]["0.1"] < 0.6
    assert mean["overlap"]["1"] > mean["overlap_independent"] + 0.05
    assert mean["overlap"]["1"] > mean["overlap"]["8"] > mean["overlap_independent"] - 0.05
    judged = report["predictor"]
    assert judged["recall"] > 0.85
    assert judged["density"] < 0.3
    assert judged["precision"] > 0.4


@pytest.fixture(scope="module")
def unplaced(tmp_path_factory):
    directory = tmp_path_factory.mktemp("unplaced")
    return make(directory, TINY, page=512, margin=0.3, collect=512, placed=False, with_gguf=False)


def test_statistics_name_the_neurons_that_were_made_to_be_active_often(unplaced):
    counts = Statistics.load(unplaced / STATISTICS).counts
    assert counts.tokens == 512
    found, made = counts.frequency[:, 0], SparseSource(TINY)
    for layer, often in enumerate(found):
        assert np.corrcoef(often, -made.gates(layer).thresholds)[0, 1] > 0.6


def test_neurons_that_are_missing_lie_together_in_the_model_that_is_placed(tiny, unplaced):
    placed, generated = (Statistics.load(path / STATISTICS).counts for path in (tiny, unplaced))
    assert np.array_equal(np.sort(placed.counts), np.sort(generated.counts))
    assert placed.sketch.tokens == generated.sketch.tokens == 512
    for layer, often in enumerate(placed.counts[:, 0]):
        assert often[:BAND].min() >= often[BAND:].max()
        before, after = (
            reads(each.sketch.active(layer), each.counts[layer, 0] >= np.median(often))
            for each in (generated, placed)
        )
        assert after < 0.8 * before
    assert {p.name for p in tiny.parent.iterdir()} == {"model", "model.gguf"}


def test_text_wanders(tiny):
    report = check(tiny, prompt=20, tokens=100, backend="numpy")
    assert report["tokens"]["decoded"] == 100
    assert report["tokens"]["distinct"] > 50


def test_the_knobs_turn(tmp_path):
    even = make(tmp_path / "even", dataclasses.replace(TINY, skew=0.0, slow=0.0), with_gguf=False)
    dense = make(tmp_path / "dense", dataclasses.replace(TINY, density=0.4), with_gguf=False)
    mean = measured(even)
    assert mean["top"]["0.5"] < 0.8
    assert mean["overlap"]["8"] < mean["overlap_independent"] + 0.04
    assert 0.33 < measured(dense)["density"] < 0.47


@quick
@given(shapes)
def test_no_layer_writes_to_the_constant_elements_and_the_seed_decides(shape):
    source, again = SparseSource(shape), SparseSource(shape)
    other = SparseSource(dataclasses.replace(shape, seed=shape.seed + 1))
    for name in names(shape):
        tensor = source.tensor(name)
        assert np.array_equal(tensor.data, again.tensor(name).data)
        assert not np.array_equal(tensor.data, other.tensor(name).data)
        values = tensor.to_f32()
        assert np.isfinite(values).all()
        if name.endswith("attn.o.weight"):
            assert not values[:32].any()
        if name.endswith("down.weight"):
            assert not values[:, :32].any()


@settings(quick, max_examples=3)  # each waits for the disk
@given(shapes)
def test_the_gguf_holds_the_same_values(tmp_path_factory, shape):
    directory = tmp_path_factory.mktemp("pair")
    make(directory, shape)
    source, gguf = SparseSource(shape), GgufFormat().load(directory / "model.gguf")
    assert gguf.architecture.activation == "relu"
    for name in names(shape):
        assert np.array_equal(gguf.tensor(name).to_f32(), source.tensor(name).to_f32()), name


def test_llama_cpp_computes_the_same_where_the_activation_is_one_that_it_has(tmp_path):
    path = make(tmp_path, dataclasses.replace(TINY, activation="silu", layers=2), collect=256)
    ids = np.random.default_rng(0).integers(0, TINY.vocab, 40).tolist()
    with Engine.open(path, backend="numpy") as engine:
        ours = engine.logits(ids)
    peer = LlamaCpp(tmp_path / "model.gguf")
    theirs = peer.logits(ids)
    peer.close()
    assert np.abs(ours - theirs).max() < 0.1 * np.abs(theirs).max()
    assert (ours.argmax(axis=1) == theirs.argmax(axis=1)).mean() > 0.8


def test_a_second_run_makes_nothing_and_another_shape_is_refused(tiny):
    before = {p.name: p.stat().st_mtime_ns for p in tiny.iterdir()}
    assert make(tiny.parent, TINY, page=512) == tiny
    assert {p.name: p.stat().st_mtime_ns for p in tiny.iterdir()} == before
    with pytest.raises(SystemExit, match="another shape"):
        make(tiny.parent, dataclasses.replace(TINY, seed=5))


def test_the_page_sets_the_stride(tmp_path, tiny):
    assert read_manifest(tiny).geometry.stride == 432  # packed: 512 would waste too much
    wide = make(tmp_path, dataclasses.replace(TINY, d_model=4096, neurons=32, layers=1), page=512)
    assert read_manifest(wide).geometry.stride == 7168


def test_exporting_does_not_leave_half_a_file(tmp_path, tiny):
    tier = MmapTier()
    export(open_model(tiny, tier), tmp_path / "x.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]
    assert (tmp_path / "x.gguf").read_bytes() == (tiny.parent / "model.gguf").read_bytes()
    tier.close()
