"""What the conformance kit does not ask: devices, profiles, caches, self-tests and faults."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pi2_backend_opencl
import pyopencl as cl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pi2.errors import OptionError, PluginError
from pi2.plugins import Plugins
from pi2.tensor import DTYPES, Tensor, encode
from pi2.testing.plugin import examples
from pi2_backend_opencl import caps, device, matrix, selftest, trials
from pi2_backend_opencl.backend import OpenclBackend
from pi2_backend_opencl.layout import GROUP, PLANES, clustered

PROFILES = ("adreno730", "adreno830", "minimal")


@pytest.fixture(scope="module")
def found():
    if not (probe := OpenclBackend.probe()):
        pytest.skip(probe.reason)  # where one is expected, the first test fails
    return device.choose_device(None)


@pytest.fixture(scope="module")
def backend(found, tmp_path_factory):
    opened = OpenclBackend.open({"cache": str(tmp_path_factory.mktemp("kernels"))})
    yield opened
    opened.close()


@pytest.mark.skipif("PI2_EXPECT_OPENCL" not in os.environ, reason="PI2_EXPECT_OPENCL is not set")
def test_the_driver_is_the_expected_one():
    assert os.environ["PI2_EXPECT_OPENCL"] in OpenclBackend.probe().reason
    assert OpenclBackend.probe()


def test_it_registers_one_backend():
    plugins = Plugins()
    plugins.add("opencl", pi2_backend_opencl)
    assert plugins.hooks_of("opencl") == ["pi2_backends"]
    assert plugins.of("backends") == {"opencl": OpenclBackend}


def test_who_computes_elsewhere_does_not_load_the_driver():
    program = "import sys, pi2.plugins as p; p.Plugins.installed().pick('backends', 'numpy')"
    shown = f"{program}; print('pi2_backend_opencl' in sys.modules, 'pyopencl' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", shown], capture_output=True, check=True, text=True)
    assert done.stdout.split() == ["True", "False"]


def test_opencl_on_a_cpu_never_wins_over_native_kernels(found):
    assert found.caps.cpu == (OpenclBackend.probe().score < 10)


def test_without_a_driver_it_says_so(monkeypatch):
    def none():
        raise cl.LogicError("clGetPlatformIDs failed: PLATFORM_NOT_FOUND_KHR")

    monkeypatch.setattr(cl, "get_platforms", none)
    assert OpenclBackend.probe().score == 0
    with pytest.raises(PluginError, match="no OpenCL device") as refusal:
        OpenclBackend.open()
    assert "driver" in refusal.value.hint


def test_a_driver_that_compiles_nothing_is_passed_over(found, monkeypatch):
    def refused(device, caps):
        return "unknown target CPU 'generic'"

    monkeypatch.setattr(device, "_fault", refused)
    probe = OpenclBackend.probe()
    assert probe.score == 0
    assert "unknown target CPU" in probe.reason
    with pytest.raises(PluginError, match="compiles nothing: unknown target CPU"):
        OpenclBackend.open()


def test_a_device_is_chosen_by_its_name(found):
    assert device.choose_device(found.caps.name[:4].lower()).name == found.name
    with pytest.raises(OptionError, match="is called 'Voodoo'") as refusal:
        OpenclBackend.open({"device": "Voodoo"})
    assert found.name in refusal.value.hint


@pytest.mark.parametrize("options", [{"activations": "int4"}, {"profile": "pixel"}], ids=str)
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(OptionError):
        OpenclBackend.open(options)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"colour": 1}', '{"name": 3}', '{"name": "x", "max_group": 0}', '{"fp16": true}',
     '{"name": "x", "max_group": "many"}', '{"name": "x", "images": 1}'],
)  # fmt: skip
def test_a_hostile_profile_is_one_clear_error(tmp_path, content):
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(OptionError) as refusal:
        caps.load_profile(str(path))
    assert "adreno730" in refusal.value.hint


def test_a_profile_of_ones_own_is_taken(tmp_path, found):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"name": "mine", "max_group": 64, "images": False}))
    assert caps.resolve(found.caps, caps.load_profile(str(path))).splits == 1


@pytest.mark.parametrize("name", PROFILES)
def test_a_variant_keeps_within_the_limits_of_device_and_profile(found, name):
    variant = caps.resolve(found.caps, caps.load_profile(name))
    assert caps.LANES * variant.splits <= min(found.caps.max_group, caps.load_profile(name).max_group)
    assert variant.limits.max_allocation <= found.caps.max_allocation
    assert bool(variant.emulated) == (name != "minimal" and found.caps.family != "adreno")


def test_the_adreno_compiler_is_read_out_of_the_drivers_version():
    long = "OpenCL 3.0 QUALCOMM build: commit #16c1863 Date: 01/19/23 Compiler E031.38.11.12"
    assert caps.adreno_compiler(long) == ("E031", 38, 11, 12)
    assert caps.adreno_compiler("Compiler DX.17.2") == ("DX", 17, 2, 0)
    assert caps.adreno_compiler("3.0-rc2") == ()


@examples(50)
@given(
    dtype=st.sampled_from(DTYPES), rows=st.integers(1, 200), groups=st.integers(1, 4), seed=st.integers(0, 99)
)
def test_the_layout_is_a_permutation_of_the_weights(dtype, rows, groups, seed):
    cols = groups * GROUP
    weights = np.random.default_rng(seed).standard_normal((rows, cols), dtype=np.float32)
    tensor = Tensor(encode(weights, dtype), dtype, cols)
    clusters = -(-rows // caps.LANES)
    words, scales = clustered(tensor, 0, clusters)
    shape = (clusters, groups * PLANES[dtype], caps.LANES, 16)
    back = words.reshape(shape).transpose(0, 2, 1, 3).reshape(clusters * caps.LANES, -1)
    assert np.array_equal(back[:rows], tensor.data[:, : back.shape[1]])
    assert not back[rows:].any()
    if dtype in ("q4_0", "q8_0"):
        halves = scales.reshape(clusters, groups, caps.LANES, 2).transpose(0, 2, 1, 3)
        assert np.array_equal(halves.reshape(-1, 2 * groups)[:rows], tensor.data[:, back.shape[1] :])


@pytest.mark.parametrize("n", [1, 63, 64, 200])
@pytest.mark.parametrize("profile", [None, *PROFILES])
def test_tails_of_clusters_are_right_in_shards_of_any_size(found, tmp_path_factory, profile, n):
    """Allocations so small that every cluster is a shard of its own."""
    rng = np.random.default_rng(n)
    tensor = Tensor(encode(rng.standard_normal((256, 64), dtype=np.float32), "q4_0"), "q4_0", 64)
    variant = caps.resolve(found.caps, caps.load_profile(profile) if profile else None)
    limits = dataclasses.replace(variant.limits, max_allocation=4096)
    folder = tmp_path_factory.getbasetemp() / "tails"
    opened = device.Device(found, dataclasses.replace(variant, limits=limits), folder)
    placed = matrix.place_matrix(opened, tensor)
    assert len(placed.shards) == 256 // caps.LANES // max(1, 4096 // placed.shape.cluster_bytes)
    x = rng.standard_normal((1, 64), dtype=np.float32)
    rows = np.sort(rng.choice(256, n, replace=False)).astype(np.int32)
    y, got = opened.scratch("y", 4 * n), np.empty((1, n), np.float32)
    matrix.multiply(opened, placed, matrix.send_inputs(opened, x, integers=False), rows, y, n)
    opened.fetch(y, got)
    opened.close()
    np.testing.assert_allclose(got, x @ tensor.to_f32()[rows].T, rtol=1e-4, atol=1e-4)


def test_compiled_kernels_are_kept_and_damaged_ones_are_built_anew(found, tmp_path):
    def open_and_count():
        opened = device.Device(found, caps.resolve(found.caps), tmp_path)
        opened.programs.kernel("neurons", "combine", opened.variant)
        opened.programs.kernel("neurons", "combine", opened.variant)
        return opened.programs.compiled, opened.programs.loaded

    assert open_and_count() == (1, 0)
    assert open_and_count() == (0, 1)
    (binary,) = tmp_path.iterdir()
    binary.write_bytes(b"damaged")
    assert open_and_count() == (1, 0)
    assert open_and_count() == (0, 1)


def test_a_folder_that_cannot_be_written_costs_only_time(found, tmp_path):
    blocked = tmp_path / "file"
    blocked.touch()
    opened = device.Device(found, caps.resolve(found.caps), blocked / "kernels")
    opened.programs.kernel("neurons", "combine", opened.variant)
    assert opened.programs.compiled == 1


def test_a_build_that_the_driver_refuses_falls_back_aloud(found, tmp_path):
    odd = dataclasses.replace(caps.resolve(found.caps), options=("-qcom-enable-large-buffer",))
    opened, remarks = trials.first_that_works(found, odd, tmp_path)
    assert len(remarks) == 1
    assert "FELL BACK to plain kernels" in remarks[0]
    assert "refuses" in remarks[0]
    assert not trials.problems(opened)


def test_wrong_numbers_are_noticed_and_nothing_is_left_to_fall_back_to(found, tmp_path, monkeypatch):
    true = trials.matrix.multiply

    def miscompiled(*arguments):
        true(*arguments)
        true(*arguments[:3], None, *arguments[4:])
        cl.enqueue_fill_buffer(arguments[0].queue, arguments[4], np.float32(1), 0, 4)

    monkeypatch.setattr(trials.matrix, "multiply", miscompiled)
    with pytest.raises(PluginError, match="computes wrong numbers") as refusal:
        trials.first_that_works(found, caps.resolve(found.caps), tmp_path)
    assert "--backend cpu" in refusal.value.hint


@pytest.mark.parametrize(("error", "says"), [(cl.MemoryError, "no memory left"), (cl.RuntimeError, "failed")])
def test_what_a_driver_raises_is_one_clear_error(backend, monkeypatch, error, says):
    def broken(*arguments):
        raise error("clEnqueueNDRangeKernel failed: OUT_OF_RESOURCES")

    monkeypatch.setattr(matrix, "multiply", broken)
    weight = backend.place(Tensor(encode(np.zeros((1, 32), np.float32), "f32"), "f32", 32))
    with pytest.raises(PluginError, match=says) as refusal:
        backend.linear(weight, np.zeros((1, 32), np.float32), np.zeros((1, 1), np.float32))
    assert refusal.value.hint


def test_the_selftest_for_owners_of_a_device_is_json_with_right_kernels(found, capsys):
    selftest.main(["--rows", "64", "--cols", "64", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["ok"]
    assert set(said["best"]) == {"f32", "int8"}
    assert said["variants"]["plain"]["background"]["wrong"] is None
    assert said["variants"]["plain"]["wrong"] == []
    assert said["variants"]["as detected"]["launch_s"] > 0
    selftest.main(["--rows", "64", "--cols", "64"])
    assert ": ok\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        selftest.main(["--rows", "3"])
    with pytest.raises(SystemExit, match="Voodoo"):
        selftest.main(["--device", "Voodoo"])
