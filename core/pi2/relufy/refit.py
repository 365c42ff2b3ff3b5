"""Closed-form refit of W_down, layer by layer: the twin's residual stream follows the original's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pi2.errors import Pi2Error
from pi2.relufy.corpus import Row
from pi2.relufy.network import Network
from pi2.relufy.twin import Twin
from pi2.relufy.workplace import read_arrays, save


def refit(
    original: Network,
    twin: Twin,
    rows: Sequence[Row],
    ridge: float,
    workplace: Path,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> None:
    """Solve for W_down of every layer on ``rows``, in order, each behind the refitted ones before it.

    Minimises |h W - t|^2 + r |W - W_old|^2, with h the activations of the twin, t what its stream lacks to
    the original's, and r ``ridge`` x the mean of h^2 summed over tokens.  A layer that is done lies in
    ``workplace``, and the next run takes it from there.  Memory: the streams of ``rows``, and two matrices
    of neurons x neurons.
    """
    student = twin.network()
    with torch.no_grad():
        places = [original.place(row) for row in rows]
        theirs = [original.embed(row) for row in rows]
        ours = [student.embed(row) for row in rows]
        for layer in range(twin.arch.n_layers):
            attended = [original.attention(x, layer, p) for x, p in zip(theirs, places, strict=True)]
            terms = [original.ffn(original.before_ffn(x, layer), layer)[1] for x in attended]
            theirs = [original.after_ffn(x, y, layer) for x, y in zip(attended, terms, strict=True)]
            ours = [student.attention(x, layer, p) for x, p in zip(ours, places, strict=True)]
            wanted = _wanted(twin, attended, terms, ours)
            _refit_layer(
                student, twin, layer, ours, wanted, ridge, workplace / f"refit-{layer:04d}.safetensors"
            )
            ours = [_pass_ffn(student, x, layer) for x in ours]
            on_layer(layer)


def _pass_ffn(network: Network, x: Tensor, layer: int) -> Tensor:
    return network.after_ffn(x, network.ffn(network.before_ffn(x, layer), layer)[1], layer)


def _wanted(twin: Twin, attended: list[Tensor], terms: list[Tensor], ours: list[Tensor]) -> list[Tensor]:
    """What the twin's FFN should add: the original's term, and what the streams differ by before it.

    Behind the FFN's own norm (sandwich) a difference could not be made good: there, the term alone.
    """
    if twin.arch.norm_place == "sandwich":
        return terms
    return [x + y - z for x, y, z in zip(attended, terms, ours, strict=True)]


def _refit_layer(
    student: Network,
    twin: Twin,
    layer: int,
    ours: list[Tensor],
    wanted: list[Tensor],
    ridge: float,
    done: Path,
) -> None:
    name = f"layers.{layer}.ffn.down.weight"
    down = twin.masters[name]
    if done.exists():
        read_arrays(done, {name: down.numpy()})
    else:
        down.copy_(_solve(student, twin, layer, ours, wanted, ridge))
        save(done, {name: down.numpy()}, {"layer": layer})
    twin.show(name)


def _solve(
    student: Network, twin: Twin, layer: int, ours: list[Tensor], wanted: list[Tensor], ridge: float
) -> Tensor:
    """W_down (neurons, d) of the least squares problem, by a Cholesky factorisation."""
    old = twin.masters[f"layers.{layer}.ffn.down.weight"]
    bias = twin.masters.get(f"layers.{layer}.ffn.down.bias")
    gram = torch.zeros(len(old), len(old))
    right = torch.zeros_like(old)
    for x, y in zip(ours, wanted, strict=True):
        _, h = student.hidden(student.before_ffn(x, layer), layer)  # (T, neurons)
        gram.addmm_(h.T, h)
        right.addmm_(h.T, y if bias is None else y - bias)
    pull = ridge * float(gram.diagonal().mean())
    gram.diagonal().add_(pull)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if int(failed) or pull == 0:
        raise Pi2Error(
            f"the refit of layer {layer} has no solution: its activations are degenerate",
            hint="give more --refit-tokens or another text, or leave the refit out with --refit-tokens 0",
        )
    return torch.cholesky_solve(right + pull * old, factor)
