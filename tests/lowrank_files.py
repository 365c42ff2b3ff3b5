"""Predictor files for the tests: random ones, and one that is always right."""

import numpy as np
from pi2.activity import gate_values
from pi2.builtin.mmap_tier import MmapTier
from pi2.container import FfnPredictor, Measured, Predictors, read_manifest, replace_file
from pi2.container.predictors import PREDICTORS
from pi2.container.reader import open_model
from pi2.tensor import Tensor


def random_layer(rng, d, neurons, width=32, dtype="q8_0", measured=None):
    """A predictor that names about half of the neurons."""
    fc1 = rng.normal(0, d**-0.5, (width, d)).astype(np.float32)
    fc2 = rng.normal(0, width**-0.5, (neurons, width)).astype(np.float32)
    biases = [rng.normal(0, 0.1, n).astype(np.float32) for n in (width, neurons)]
    weights = [Tensor.from_f32(w, dtype if w.shape[1] % 32 == 0 else "f16") for w in (fc1, fc2)]
    return FfnPredictor(weights[0], biases[0], weights[1], biases[1], 0.0, measured)


def model_hash(path):
    return read_manifest(path).files["neurons.safetensors"].sha256


def random_predictors(path, arch, seed=0, **options):
    """For the pi2 model at ``path``: another width in every second layer."""
    rng = np.random.default_rng(seed)
    layers = {
        n: random_layer(rng, arch.d_model, arch.n_neurons, 32 + 32 * (n % 2), **options)
        for n in range(arch.n_layers)
    }
    layers[0] = FfnPredictor(*_fields(layers[0])[:-1], Measured(0.2, 0.5, 0.75))
    return Predictors(model_hash(path), layers, None, {"made": "by a test"})


def _fields(layer):
    return [layer.fc1, layer.fc1_bias, layer.fc2, layer.fc2_bias, layer.threshold, layer.measured]


def right_predictors(path):
    """As wide as the FFN: the gate (or what stands for it) itself, then the identity."""
    tier = MmapTier()
    model = open_model(path, tier)
    arch, layers = model.architecture, {}
    for n in range(arch.n_layers):
        zero = np.zeros((1, arch.d_model), np.float32)
        bias = gate_values(model, n, zero)[0]
        gate = gate_values(model, n, np.eye(arch.d_model, dtype=np.float32)).T - bias[:, None]
        identity = np.eye(arch.n_neurons, dtype=np.float32)
        layers[n] = FfnPredictor(
            Tensor.from_f32(np.ascontiguousarray(gate)),
            bias.copy(),
            Tensor.from_f32(identity),
            np.zeros_like(bias),
            0.0,
        )
    tier.close()
    return Predictors(model_hash(path), layers)


def install(path, predictors):
    """Put them into the pi2 model at ``path``."""
    replace_file(path, PREDICTORS, predictors.save)
    return path
