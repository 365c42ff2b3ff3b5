"""A sparse LM head: a low-rank estimate of all logits, and exact logits for the K tokens it finds best.

The head of a small model is a third of the bytes that a token reads.  Tokens that are no candidates keep
their estimate, so that every token has a probability and a bias on it counts.  Lossy: the likeliest token
may be no candidate, and a distribution that is sampled from has an estimated tail.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pi2.container.head import HEAD, HeadEstimate
from pi2.container.layout import DENSE
from pi2.engine import Engine
from pi2.errors import OptionError
from pi2.kv_cache import KvCache
from pi2.tensor import F32, Ids
from pi2.text_files import opening, read_texts

SEQUENCE = 256  # tokens of a sequence of the text that a head is judged on, if the context has room


class SparseHead:
    """Stands in for the LM head of an engine's decoder."""

    def __init__(self, engine: Engine, estimate: HeadEstimate, candidates: int) -> None:
        vocab = engine.model.architecture.vocab_size
        if not 0 < candidates <= vocab:
            raise OptionError(
                f"--sparse-head takes a number of tokens, not {candidates}",
                hint=f"1 to {vocab}: 512 is usual",
            )
        self.estimate = estimate
        self._decoder, self._backend = engine.decoder, engine.backend
        self._candidates = candidates
        self._rows = engine.backend.place(estimate.rows)
        self._basis = np.ascontiguousarray(np.concatenate((estimate.basis, estimate.mean[None])))

    def __call__(self, x: F32) -> F32:
        """Final states (n, d) -> logits (n, vocab), exact for ``candidates`` tokens of each row."""
        small: F32 = x @ self._basis.T  # (n, rank + 1)
        logits = np.empty((len(x), self.estimate.rows.rows), np.float32)
        self._backend.linear(self._rows, np.ascontiguousarray(small[:, :-1]), logits)
        logits += small[:, -1:]
        for state, row in zip(x, logits, strict=True):
            best = best_ids(row, self._candidates)
            if len(best):
                row[best] = self._decoder.exact_head(state[None], best)[0]
        return logits

    def describe(self) -> str:
        return f"sparse: estimate of rank {self.estimate.rank}, {self._candidates} exact logits"


def best_ids(scores: F32, k: int) -> Ids:
    """Places of the ``k`` largest of ``scores`` (n,), ascending; of equals at the border the first ones.

    Fewer if there are NaNs among them.
    """
    if k >= len(scores):
        return np.arange(len(scores), dtype=np.int32)
    border = np.partition(scores, -k)[-k]  # five times as fast as argpartition
    above = np.flatnonzero(scores > border)
    level = np.flatnonzero(scores == border)[: k - len(above)]
    return np.sort(np.concatenate((above, level))).astype(np.int32)


def use_sparse_head(engine: Engine, candidates: int) -> SparseHead:
    """Give ``engine`` the sparse head whose estimate lies in its model.

    Raises FormatError if the model has no estimate, or a damaged one; OptionError if it does not fit.
    """
    if engine.offloaded is not None:
        raise OptionError(
            "--sparse-head does not go with --memory: its estimate is in no budget", hint="leave one out"
        )
    head = open_sparse_head(engine, candidates)
    engine.decoder.head, engine.lossy_head = head, head.describe()
    return head


def open_sparse_head(engine: Engine, candidates: int) -> SparseHead:
    """The sparse head of the engine's model, not yet in use."""
    model = engine.model
    sha256 = model.manifest.files[DENSE].sha256
    return SparseHead(engine, HeadEstimate.load(model.path / HEAD, model.architecture, sha256), candidates)


@dataclass(slots=True)
class HeadScore:
    """A sparse head beside the exact one, on text."""

    description: str
    tokens: int = 0
    agreed: int = 0
    """Tokens for which both find the same next token likeliest."""
    kl: float = 0.0
    """Sum of the Kullback-Leibler divergences from the exact distribution, in nats."""
    exact_s: float = 0.0
    sparse_s: float = 0.0

    @property
    def agreement(self) -> float:
        return self.agreed / self.tokens

    def to_json(self) -> dict[str, Any]:
        """For ``--json``; ``kl`` is the mean."""
        return {
            "head": self.description,
            "tokens": self.tokens,
            "agreement": self.agreement,
            "kl": self.kl / self.tokens,
            "exact_head_s": self.exact_s / self.tokens,
            "sparse_head_s": self.sparse_s / self.tokens,
        }

    def table(self) -> list[tuple[str, str]]:
        """For people."""
        found = self.to_json()
        exact, sparse = (f"{found[f'{name}_head_s'] * 1e3:.2f} ms" for name in ("exact", "sparse"))
        return [
            ("head", found["head"]),
            ("agreement", f"{self.agreement:.2%} of the likeliest tokens, of {self.tokens}"),
            ("KL", f"{found['kl']:.4f} nats from the exact distribution"),
            ("time", f"{sparse} a token, the exact head {exact}"),
        ]

    def add(self, exact: F32, sparse: F32) -> None:
        """Logits of one token, (vocab,) each."""
        p, q = _log_softmax(exact), _log_softmax(sparse)
        self.tokens += 1
        self.agreed += int(exact.argmax() == sparse.argmax())
        self.kl += float(np.sum(np.exp(p) * (p - q)))


def judge_head(
    engine: Engine,
    paths: Sequence[Path],
    candidates: int,
    tokens: int,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> HeadScore:
    """Compare the sparse head with the exact one on every token of ``tokens`` of the texts.

    Both are timed token by token, one after the other, as in decoding.
    """
    head = open_sparse_head(engine, candidates)
    score = HeadScore(head.describe())
    for name, states in final_states(engine, paths, tokens):
        for x in states:
            start = time.perf_counter()
            exact = engine.decoder.exact_head(x[None])[0]
            between = time.perf_counter()
            sparse = head(x[None])[0]
            score.sparse_s += time.perf_counter() - between
            score.exact_s += between - start
            score.add(exact, sparse)
        progress(name, score.tokens, max(tokens, score.tokens))
    return score


def final_states(engine: Engine, paths: Sequence[Path], tokens: int) -> list[tuple[str, F32]]:
    """What the LM head is given on the first ``tokens`` of the texts: (file, states (n, d)) by sequence."""
    before = opening(engine.tokenizer)
    arch, decoder = engine.model.architecture, engine.decoder
    length = min(SEQUENCE, KvCache(arch, engine.context).limit - len(before))
    if length < 1:
        raise OptionError("the context has no room for a token", hint="raise --context")
    states: list[tuple[str, F32]] = []
    kept = decoder.head

    def capture(x: F32) -> F32:
        states.append((name, x[len(before) :].copy()))
        return np.zeros((len(x), 1), np.float32)

    wanted = max(1, tokens // length)
    try:
        decoder.head = capture
        for text in read_texts(paths, engine.tokenizer, length):
            name = text.path.name
            for ids in text.sequences[: wanted - len(states)]:
                whole = np.concatenate((np.array(before, np.int64), ids))
                decoder.forward(whole, KvCache(arch, len(whole)), all_logits=True)
            if len(states) == wanted:
                break
    finally:
        decoder.head = kept
    return states


def _log_softmax(logits: F32) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    wide = logits.astype(np.float64)
    wide -= wide.max()
    result: np.ndarray[tuple[int], np.dtype[np.float64]] = wide - np.log(np.exp(wide).sum())
    return result
