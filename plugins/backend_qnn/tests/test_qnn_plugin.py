"""What needs none of Qualcomm's libraries: the probe, options, versions, and how weights are packed."""

import subprocess
import sys

import numpy as np
import pi2_backend_qnn
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pi2.api import FfnSpec
from pi2.bundle import BundleGeometry
from pi2.errors import OptionError, PluginError
from pi2.plugins import Plugins
from pi2.tensor import Tensor, encode
from pi2.testing.plugin import PluginTests, examples
from pi2.testing.strategies import generators
from pi2_backend_qnn import errors, pack, probe, scaling, targets
from pi2_backend_qnn.backend import QnnBackend
from pi2_backend_qnn.placed import Ffn

GOOD = {"onnxruntime": "1.31.1", "onnxruntime-qnn": "2.7.0", "onnx": "1.23.2"}


@pytest.fixture
def without_extra(monkeypatch):
    monkeypatch.setattr(probe, "find_spec", lambda name: None)
    monkeypatch.setattr(targets, "installed", dict)


@pytest.mark.usefixtures("without_extra")
class TestWithoutTheExtra(PluginTests):
    plugin = QnnBackend

    def test_it_says_in_one_line_how_to_get_it(self):
        reason = QnnBackend.probe().reason
        assert 'pip install "pi2-backend-qnn[qnn]"' in reason
        assert "\n" not in reason
        with pytest.raises(errors.NotInstalled) as refusal:
            QnnBackend.open({"emulator": "on"})
        assert refusal.value.hint == errors.INSTALL


def test_nothing_of_the_extra_is_imported_before_it_is_needed():
    names = ("onnx", "onnxruntime", "onnxruntime_qnn")
    hide = f"import sys; sys.modules.update(dict.fromkeys({names}))"
    load = "from pi2_backend_qnn.backend import QnnBackend"
    subprocess.run([sys.executable, "-c", f"{hide}; {load}"], check=True)


def test_it_registers_one_backend():
    plugins = Plugins()
    plugins.add("qnn", pi2_backend_qnn)
    assert plugins.hooks_of("qnn") == ["pi2_backends"]
    assert plugins.of("backends") == {"qnn": QnnBackend}


def test_it_is_never_taken_by_itself():
    assert Plugins.installed().pick("backends").name != "qnn"
    assert QnnBackend.probe().score < 5


def machine(root, chip=None, device="fastrpc-cdsp"):
    (root / "dev").mkdir()
    (root / "dev" / device).touch()
    if chip is not None:
        (root / "sys/devices/soc0").mkdir(parents=True)
        (root / "sys/devices/soc0/machine").write_text(f"{chip}\n")
    return root


@pytest.mark.parametrize("device", ["fastrpc-cdsp", "adsprpc-smd"])
def test_it_says_whether_there_is_an_npu(tmp_path, device):
    assert probe.find_npu(tmp_path) is None
    npu = probe.find_npu(machine(tmp_path, "SM8650P", device))
    assert npu == probe.Npu(f"/dev/{device}", usable=True, soc="SM8650")
    assert probe.describe_npu(npu) == f"this machine has a Hexagon NPU at /dev/{device}, SM8650"
    (tmp_path / "sys/devices/soc0/machine").write_text("KALAMA")
    assert probe.find_npu(tmp_path).soc is None


def test_a_device_is_told_apart_from_the_emulator(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "find_spec", lambda name: object())
    monkeypatch.setattr(probe, "installed", lambda: GOOD)
    assert "emulator only" in probe.probe(tmp_path, "x86_64").reason
    assert probe.probe(tmp_path, "aarch64").score == 0
    found = probe.probe(machine(tmp_path, "SM8650"), "aarch64")
    assert found
    assert "only by name" in found.reason
    monkeypatch.setattr(probe, "installed", lambda: GOOD | {"onnxruntime": "1.33.0"})
    assert "1.33.0" in probe.probe(tmp_path, "x86_64").reason


@pytest.mark.parametrize(
    ("package", "version"),
    [("onnxruntime", "1.24.3"), ("onnxruntime", "1.32.0"), ("onnxruntime-qnn", "2.3.0")],
)
def test_versions_that_do_not_fit_are_named(package, version):
    targets.check_packages(GOOD)
    with pytest.raises(errors.WrongVersion, match=f"{package} {version}"):
        targets.check_packages(GOOD | {package: version})
    with pytest.raises(errors.NotInstalled, match=package):
        targets.check_packages({name: v for name, v in GOOD.items() if name != package})


@pytest.mark.parametrize(
    "options",
    [
        {"emulator": "maybe"}, {"cluster": "33"}, {"cluster": "0"}, {"deadline": "0"}, {"deadline": "nan"},
        {"performance": "fastest"}, {"priority": "first"}, {"vtcm_mb": "0"}, {"rpc_latency_us": "-1"},
        {"htp_arch": "75"},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_qnn_would_ignore_are_refused(options, monkeypatch):
    monkeypatch.setattr(targets, "installed", lambda: GOOD)
    with pytest.raises(OptionError):
        QnnBackend.open({"emulator": "on"} | options)


@pytest.mark.parametrize(("name", "says"), [("SM1", "there is no SoC 'SM1'"), ("sm8350", "neither fp16")])
def test_an_unknown_soc_is_refused(name, says, monkeypatch):
    monkeypatch.setattr(targets, "installed", lambda: GOOD)
    with pytest.raises(errors.WrongSoc, match=says):
        QnnBackend.open({"emulator": "on", "soc": name})


def test_no_npu_and_no_emulator_asked_for_is_an_error(monkeypatch):
    monkeypatch.setattr(targets, "installed", lambda: GOOD)
    monkeypatch.setattr(probe, "find_npu", lambda: None)
    with pytest.raises(errors.NoDevice) as refusal:
        QnnBackend.open()
    assert "emulator=on" in refusal.value.hint


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (
            "Unable to load backend, error: libQnnHtp.so: cannot open shared object file",
            errors.LibraryMissing,
        ),
        ("[E] QNN_DEVICE_ERROR_INVALID_CONFIG", errors.WrongSoc),
        ("QNN_CONTEXT_ERROR_CREATE_FROM_BINARY", errors.ContextDamaged),
        ("REASON : standalone DQ", errors.GraphRefused),
        ("", errors.GraphRefused),
    ],
)
def test_the_providers_own_reason_is_the_error(said, kind):
    error = errors.reason("This session contains graph nodes", said)
    assert type(error) is kind
    assert isinstance(error, PluginError)
    assert error.hint
    assert (said or "session contains").split("] ")[-1] in str(error)


@examples(100)
@given(dtype=st.sampled_from(("q4_0", "q8_0")), seed=st.integers(0, 99), power=st.integers(-8, 3))
def test_packing_changes_no_weight(dtype, seed, power):
    """Taken apart and put together as MatMulNBits does, the weights are GGUF's, bit for bit."""
    values = np.random.default_rng(seed).standard_normal((5, 96), dtype=np.float32) * np.float32(2.0**power)
    tensor = Tensor(encode(values, dtype), dtype, 96)
    q = pack.quants_of(tensor.data, dtype)
    packed = pack.nbits(q.quants, q.bits)
    if q.bits == 4:
        packed = np.stack((packed & 15, packed >> 4), axis=-1)
    quants = packed.reshape(5, -1, 32).astype(np.float32) - 2 ** (q.bits - 1)
    assert np.array_equal((quants * q.scales[:, :, None]).reshape(5, 96), tensor.to_f32())
    sizes = pack.sizes_of(tensor.data, dtype)
    largest = sizes.largest
    assert np.allclose(sizes.norms, np.linalg.norm(tensor.to_f32(), axis=1), rtol=1e-3)
    assert (np.abs(tensor.to_f32()).max(axis=1) <= largest).all()
    e = pack.exponent(largest)
    assert np.abs(tensor.to_f32()).max() < 2.0**e
    assert np.array_equal(np.ldexp(np.ldexp(q.scales, -e), e), q.scales)


@examples(100)
@given(seed=st.integers(0, 99), power=st.integers(-100, 100))
def test_tokens_are_scaled_without_loss(seed, power):
    x = np.random.default_rng(seed).standard_normal((3, 7), dtype=np.float32) * np.float32(2.0**power)
    x[1] = 0
    e = scaling.input_exponents(x)
    small = scaling.scaled(x, -e)
    assert np.abs(small).max() < 1
    assert np.abs(small[0]).max() >= 0.5
    assert np.array_equal(scaling.scaled(small, e), x)


@examples(200)
@given(
    rng=generators,
    activation=st.sampled_from(("relu", "relu2", "silu")),
    gated=st.booleans(),
    biased=st.booleans(),
    weak=st.integers(-20, 0),
    power=st.integers(-30, 30),
)
def test_lifted_tokens_stay_within_fp16(rng, activation, gated, biased, weak, power):
    """Whatever the tokens are, even those that agree best with a neuron: its signs, and its weights."""
    geometry = BundleGeometry(8, "f32" if gated else None, "f32", "f32", biased=biased)
    bundles, spec = np.zeros((5, geometry.stride), np.uint8), FfnSpec(geometry, activation)
    for part in geometry.segments():
        values = rng.standard_normal((5, {"bias": 1 + gated}.get(part, 8))).astype(np.float32)
        geometry.pack_into(bundles, part, np.ldexp(values, [[weak], [weak], [0], [0], [0]]))
    ffn = Ffn(bundles=bundles, spec=spec, cluster=32)
    n = geometry.unpack(bundles)
    rows = np.concatenate((n.up, n.up if n.gate is None else n.gate))
    x = np.ldexp(np.concatenate((np.sign(rows), rows)), power)
    e, fed = ffn.scaling.inputs(x, spec)
    ones = fed.get("ones", np.zeros((len(x), 1), np.float32)).astype(np.float64)

    def dots(part, rows, bias):
        scale = 2.0 ** -ffn.exponents[part]
        return np.abs(fed["x"].astype(np.float64) @ rows.T + ones * (0 if bias is None else bias)) * scale

    up = dots("up", n.up, n.up_bias)
    a = dots("gate", n.gate, n.gate_bias) if gated else up
    first = a if ffn.scaling.lifts == 1 else np.minimum(a, 2.0**scaling.RELU)  # in the graph
    h = first ** (1 + (activation == "relu2")) * (up if gated else 1)
    y = 2.0 ** ffn.exponents["hidden"] * np.abs(n.down.astype(np.float64)).sum(axis=0)
    y *= 2.0 ** -ffn.exponents["down"]
    assert max(each.max() for each in (fed["x"], ones, up, a, h, y)) < np.finfo(np.float16).max
    assert np.allclose(np.ldexp(fed["x"], e[:, None]), x, rtol=0, atol=0)


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(errors.GraphRefused, match="not finite"):
        pack.sizes_of(encode(np.full((1, 4), np.inf, np.float32), "f16"), "f16")
