"""Every kernel of every profile on tiny sizes: what tests/opencl.sh runs under oclgrind, for data races."""

import numpy as np
import pytest
from pi2.attention import AttentionSpec
from pi2.tensor import Tensor
from pi2.testing.attention_reference import attention as right_attention
from pi2_backend_opencl import attention, caps, device, trials
from pi2_backend_opencl.backend import OpenclBackend

PROFILES = (None, "adreno730", "adreno830", "minimal")


@pytest.fixture(scope="module", params=PROFILES, ids=str)
def opened(request, tmp_path_factory):
    if not (probe := OpenclBackend.probe()):
        pytest.skip(probe.reason)
    found = device.choose_device(None)
    variant = caps.resolve(found.caps, caps.load_profile(request.param) if request.param else None)
    return device.Device(found, variant, tmp_path_factory.getbasetemp() / "tiny")


def test_products_and_ffns(opened):
    assert trials.problems(opened) == []
    assert trials.background_problem(opened) is None


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("window", [None, 3])
def test_attention(opened, dtype, window):
    rng = np.random.default_rng(1)
    d, heads, dim, start, n = 32, 2, 24, 5, 3
    shapes = {"q": (heads * dim, d), "k": (dim, d), "v": (dim, d), "o": (d, heads * dim)}
    weights = {
        name: Tensor.from_f32(rng.standard_normal(shape, dtype=np.float32) / 6)
        for name, shape in shapes.items()
    }
    spec = AttentionSpec(heads=heads, kv_heads=1, head_dim=dim, scale=0.2, window=window, **weights)
    keys, values = rng.standard_normal((2, 1, start + n, dim)).astype(dtype)
    x = rng.standard_normal((n, d), dtype=np.float32)
    before = (part[:, :start].astype(np.float32) for part in (keys, values))
    expected = right_attention(spec, x, *before, 1e-5, halves=dtype == np.float16)
    out = np.empty_like(x)
    block = attention.place_attention(opened, spec)
    attention.attention(opened, block, x, keys, values, start, out, integers=False)
    assert expected.output.accepts(out)
