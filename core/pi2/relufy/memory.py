"""How much memory a relufication takes, known before it begins."""

from __future__ import annotations

from pi2 import inventory
from pi2.architecture import Architecture
from pi2.relufy.settings import Settings

_RUNTIME = 300 << 20  # Python, PyTorch, tokenizer
_LOGITS = 6  # arrays of (positions, vocab) that are alive at once: of both models, and gradients
_HIDDEN = 12  # arrays of (tokens, neurons) that a layer leaves for its gradients, all parts of it in these


def training_bytes(arch: Architecture, settings: Settings) -> int:
    """Bytes at the peak, about: weights, moments, gradients, and what a step of each worker leaves behind."""
    dense = {n: rows * cols for n, (rows, cols) in inventory.dense_matrices(arch).items()}
    frozen = sum(n for name, n in dense.items() if name.startswith(("embed.", "head.")))
    ffn = len(inventory.neuron_matrices(arch, 0)) * arch.n_neurons * arch.d_model
    trained = sum(dense.values()) - frozen + arch.n_layers * ffn
    # Original, master and rounded; two moments; gradients.  The embedding: original and rounded.
    weights = trained * (5 + settings.workers) + 2 * frozen
    tokens = 2 * settings.sequence
    step = _LOGITS * settings.kl_positions * tokens * arch.vocab_size
    step += _HIDDEN * tokens * arch.n_neurons * arch.n_layers // 2
    step += 4 * arch.n_layers * arch.n_heads * tokens * tokens
    refit = 2 * settings.refit_tokens * arch.d_model * 5 + 2 * arch.n_neurons**2
    return _RUNTIME + 4 * int(max(weights + settings.workers * step, 3 * trained + 2 * frozen + refit))
