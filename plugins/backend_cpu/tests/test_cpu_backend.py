"""What the conformance kit does not ask: threads, instruction sets, options, a library that is missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pi2_backend_cpu
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pi2.api import FfnSpec
from pi2.bundle import BundleGeometry
from pi2.engine import Engine
from pi2.errors import OptionError
from pi2.plugins import Plugins
from pi2.sampling import Sampling
from pi2.tensor import DTYPES, Tensor
from pi2.testing import BackendTests
from pi2.testing.models import toy_architecture, write_toy_model
from pi2.testing.plugin import examples
from pi2_backend_cpu import native
from pi2_backend_cpu.backend import CpuBackend

ISAS = native.instruction_sets(native.library())


class EveryWay(BackendTests):
    plugin = CpuBackend


for _isa in ISAS:
    for _activations in ("int8", "f32"):
        _options = {"isa": _isa, "activations": _activations, "threads": "2"}
        _name = f"Test_{_isa}_{_activations}"
        globals()[_name] = type(_name, (EveryWay,), {"options": _options})
del EveryWay


def python_starts():
    """False under qemu-user: the kernel beneath it cannot run the emulated machine's programs."""
    try:
        return subprocess.run([sys.executable, "-c", ""]).returncode == 0
    except OSError:
        return False


def test_this_cpu_has_more_than_scalar_kernels():
    assert ISAS[-1] == "scalar"
    assert len(ISAS) > 1


@pytest.mark.skipif("PI2_EXPECT_ISA" not in os.environ, reason="PI2_EXPECT_ISA is not set")
def test_the_best_instruction_set_is_the_expected_one():
    assert ISAS[0] == os.environ["PI2_EXPECT_ISA"]
    backend = CpuBackend.open({"threads": "1"})
    assert backend.describe().startswith(f"{ISAS[0]}, ")
    backend.close()


@examples(25)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    n=st.sampled_from([1, 2, 7, 131]),
    isa=st.sampled_from(ISAS),
)
def test_the_bits_do_not_depend_on_the_threads(seed, dtype, n, isa):
    rng = np.random.default_rng(seed)
    d, k = 32 * int(rng.integers(1, 20)), int(rng.integers(1, 400))
    geometry = BundleGeometry(d, dtype, dtype, dtype)
    bundles = np.zeros((k, geometry.stride), np.uint8)
    for part in ("gate", "up", "down"):
        geometry.pack_into(bundles, part, rng.standard_normal((k, d), np.float32))
    weight = Tensor.from_f32(rng.standard_normal((k, d), np.float32), dtype)
    x = rng.standard_normal((n, d), np.float32)
    results = []
    for threads in (1, 2, 3, 8):
        backend = CpuBackend(threads=threads, isa=isa)
        out, y = np.empty((n, k), np.float32), np.empty((n, d), np.float32)
        backend.linear(backend.place(weight), x, out)
        active = backend.ffn(backend.place_ffn(bundles, FfnSpec(geometry, "relu")), x, y)
        results.append((out.tobytes(), y.tobytes(), active))
        backend.close()
    assert len(set(results)) == 1


@examples(40)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    blocks=st.integers(1, 70),
    isa=st.sampled_from(ISAS),
)
def test_the_bits_of_a_row_do_not_depend_on_its_neighbours(seed, dtype, blocks, isa):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 80))
    weight = Tensor.from_f32(rng.standard_normal((count, 32 * blocks), np.float32), dtype)
    x = rng.standard_normal((1, weight.cols), np.float32)
    rows = np.flatnonzero(rng.random(count) < rng.random()).astype(np.int32)
    backend = CpuBackend(threads=2, isa=isa)
    placed = backend.place(weight)
    everything, some = np.empty((1, count), np.float32), np.empty((1, len(rows)), np.float32)
    backend.linear(placed, x, everything)
    backend.linear(placed, x, some, rows)
    backend.close()
    assert some.tobytes() == everything[:, rows].tobytes()


@examples(25)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(["relu", "relu2", "silu", "gelu"]),
    isa=st.sampled_from(ISAS),
    cut=st.integers(2, 269),
)
def test_a_token_of_many_has_the_same_bits_whatever_the_others_are(seed, dtype, activation, isa, cut):
    rng = np.random.default_rng(seed)
    d, k, n = 32 * int(rng.integers(1, 5)), int(rng.integers(1, 90)), 271  # more than one group of tokens
    geometry = BundleGeometry(d, dtype, dtype, dtype)
    bundles = np.zeros((k, geometry.stride), np.uint8)
    for part in ("gate", "up", "down"):
        geometry.pack_into(bundles, part, rng.standard_normal((k, d), np.float32))
    backend = CpuBackend(threads=2, isa=isa)
    weight = backend.place(Tensor.from_f32(rng.standard_normal((k, d), np.float32), dtype))
    ffn = backend.place_ffn(bundles, FfnSpec(geometry, activation))
    x = rng.standard_normal((n, d), np.float32)
    whole, parts = ((np.empty((n, k), np.float32), np.empty((n, d), np.float32)) for _ in range(2))
    backend.linear(weight, x, whole[0])
    active = backend.ffn(ffn, x, whole[1])
    for piece in (slice(0, cut), slice(cut, n)):
        backend.linear(weight, x[piece], parts[0][piece])
        active -= backend.ffn(ffn, x[piece], parts[1][piece])
    backend.close()
    assert active == 0
    for one, other in zip(whole, parts, strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["q4_0", "q8_0"])
def test_inputs_whose_inverse_is_infinite_are_rounded_like_any_others(isa, dtype):
    rng = np.random.default_rng(5)
    backend = CpuBackend(threads=1, isa=isa)
    weight = backend.place(Tensor.from_f32(rng.standard_normal((9, 96), np.float32), dtype))
    x, tiny = rng.standard_normal((1, 96), np.float32), np.float32(2.0**-124)
    usual, small = np.empty((1, 9), np.float32), np.empty((1, 9), np.float32)
    backend.linear(weight, x, usual)
    backend.linear(weight, x * tiny, small)
    backend.close()
    np.testing.assert_allclose(small / tiny, usual, atol=1e-2)  # 1/127 of such an input has 13 bits


@pytest.mark.parametrize("quant", ["q4_0", "q8_0", "f16"])
def test_a_model_says_the_same_with_any_number_of_threads(tmp_path, quant):
    model = write_toy_model(tmp_path / "toy", toy_architecture(), quant=quant)
    plugins = Plugins.installed()
    texts = []
    for threads in (1, 2, 3, 8):
        with Engine.open(model, backend=f"cpu:threads={threads}", plugins=plugins) as engine:
            generation = engine.generate(list(range(40)), Sampling(max_tokens=24))
            texts.append([piece.token for piece in generation])
            assert f"{threads} threads, int8" in engine.setup()["config"]["parts"]["backend"]
    assert texts.count(texts[0]) == 4


def test_the_environment_forces_an_instruction_set(monkeypatch):
    monkeypatch.setenv("PI2_CPU_ISA", "scalar")
    backend = CpuBackend.open({"threads": "1"})
    assert backend.describe() == "scalar, 1 threads, int8"
    backend.close()
    backend.close()
    monkeypatch.setenv("PI2_CPU_ISA", "sse9")
    with pytest.raises(OptionError, match="no kernels that PI2_CPU_ISA names"):
        CpuBackend.open()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"isa": "altivec"}, "no altivec kernels"),
        ({"threads": "0"}, "0 threads cannot be"),
        ({"threads": "100000"}, "cannot be"),
        ({"activations": "int4"}, "int8 or f32"),
        ({"thread": "1"}, "no option 'thread'"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(OptionError, match=said):
        CpuBackend.open(options)


@pytest.mark.skipif(not python_starts(), reason="this machine cannot start its own Python (qemu-user)")
def test_without_the_library_the_probe_says_how_to_get_it(tmp_path):
    package = Path(pi2_backend_cpu.__file__).parent
    copy = shutil.copytree(package, tmp_path / "pi2_backend_cpu", ignore=shutil.ignore_patterns("*.so"))
    assert not list(copy.glob("*.so"))
    code = (
        "from pi2_backend_cpu.backend import CpuBackend as C; from pi2.errors import PluginError\n"
        "print(C.probe().score, C.probe().reason)\n"
        "try: C.open()\n"
        "except PluginError as e: print(e.hint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("0 the kernels are missing")
    assert done.stdout.count("install g++ or clang") == 2


def test_the_plugin_registers_one_backend():
    plugins = Plugins()
    plugins.add("cpu", pi2_backend_cpu)
    assert plugins.pick("backends") is CpuBackend
