"""From logits to the next token: the parameters of generation, and a sampler that applies them.

The steps and their order are those of Hugging Face transformers (llama.cpp divides by the temperature
last, so the same numbers keep more tokens there):

    1. logit bias           added
    2. repetition penalty   divides positive, multiplies negative ones of seen tokens (CTRL, 1909.05858 §4.1)
       presence, frequency  subtracted once per seen token, and per occurrence (OpenAI's definition)
    3. temperature          0 takes the largest logit and ends here
    4. top-k                keeps the k largest
    5. top-p                keeps the fewest of the largest that hold p of what top-k left (1904.09751 §3.1)
    6. min-p                keeps those with at least min_p times the largest probability (2407.01082)

Equal logits rank by id, lowest first, so the result depends on no sorting algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from random import SystemRandom

import numpy as np
from numpy.typing import NDArray

from pi2.errors import OptionError, Pi2Error
from pi2.tensor import F32

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen, and when to end.  The default is greedy.  Raises OptionError."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_window: int = 64  # last tokens, of prompt and answer, that the penalties see
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # -inf forbids a token
    seed: int | None = None  # None: a new one each time
    max_tokens: int = 256
    stop: tuple[str, ...] = ()  # the answer ends before the first of these

    def __post_init__(self) -> None:
        for name, low, high in _BOUNDS:
            _check_number(name, getattr(self, name), low, high)
        for name in ("top_k", "penalty_window", "max_tokens", "seed"):
            value = getattr(self, name)
            if type(value) is not int and not (name == "seed" and value is None):
                raise OptionError(f"{_option(name)} is a whole number, not {_short(value)}")
        if self.top_p == 0 or self.repetition_penalty == 0:
            name = "top_p" if self.top_p == 0 else "repetition_penalty"
            raise OptionError(f"{_option(name)} cannot be 0", hint="1 switches it off")
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        object.__setattr__(self, "stop", _checked_stop(self.stop))


_BOUNDS = (
    ("temperature", 0.0, 1e6),
    ("top_k", 0, 1 << 31),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.0, 1e6),
    ("presence_penalty", -1e6, 1e6),
    ("frequency_penalty", -1e6, 1e6),
    ("penalty_window", 1, 1 << 31),
    ("seed", 0, 1 << 128),
    ("max_tokens", 1, 1 << 31),
)


def _option(name: str) -> str:
    return name.replace("_", "-")


def _short(value: object) -> str:
    return repr(value)[:60]


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if name == "seed" and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise OptionError(f"{_option(name)} is a number, not {_short(value)}")
    if not low <= value <= high:  # also refuses NaN
        raise OptionError(f"{_option(name)} is between {low:g} and {high:g}, not {_short(value)}")


def _checked_bias(bias: object) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise OptionError("logit-bias maps token ids to numbers", hint="for example --logit-bias 42=-1.5")
    for token, value in bias.items():
        if type(token) is not int or token < 0:
            raise OptionError(f"logit-bias names token {_short(token)}, which is not a token id")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or math.isnan(value) or value == math.inf:
            raise OptionError(f"logit-bias of token {token} cannot be {_short(value)}")
    return {token: float(value) for token, value in bias.items()}


def _checked_stop(stop: object) -> tuple[str, ...]:
    if isinstance(stop, str) or not isinstance(stop, Sequence):
        raise OptionError("stop is a sequence of texts")
    for text in stop:
        if not isinstance(text, str) or not text:
            raise OptionError(f"a stop text is not empty, unlike {_short(text)}")
    return tuple(stop)


class Sampler:
    """Chooses one token at a time; a pure function of logits, history, parameters and random state.

    ``seed`` is the seed in use, drawn from the system if the parameters leave it open.
    Raises OptionError if the bias names a token beyond ``vocab_size``.
    """

    def __init__(self, params: Sampling, vocab_size: int) -> None:
        for token in params.logit_bias:
            if token >= vocab_size:
                raise OptionError(
                    f"logit-bias names token {token}, but the vocabulary ends at {vocab_size - 1}"
                )
        self.params = params
        self.seed = new_seed() if params.seed is None else params.seed
        self._biased = np.fromiter(params.logit_bias.keys(), np.int64)
        self._bias = np.fromiter(params.logit_bias.values(), np.float64)

    @cached_property
    def _random(self) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(self.seed))

    def __call__(self, logits: F32, history: Sequence[int]) -> int:
        """The next token after ``history``.  ``logits`` is (vocab,) and is left as it is.

        Raises Pi2Error if the logits hold a NaN or plus infinity, or forbid every token.
        """
        ids, probabilities = self.distribution(logits, history)
        if len(ids) == 1:
            return int(ids[0])
        cumulative = np.cumsum(probabilities)
        total = cumulative[-1]
        # nextafter: rounding must not carry the draw past the last token that has a probability
        draw = min(self._random.random() * total, np.nextafter(total, 0))
        return int(ids[np.searchsorted(cumulative, draw, side="right")])

    def distribution(self, logits: F32, history: Sequence[int]) -> tuple[I64, F64]:
        """Tokens that may come next, most probable first, and their probabilities; both (n,)."""
        p = self.params
        scores = self._penalised(logits, history)
        best = int(scores.argmax())  # the first of equals; a NaN, if there is one
        largest = scores[best]
        if not np.isfinite(largest):
            raise Pi2Error(
                "the model's logits are not finite",
                hint="the weights or the backend are damaged: try another --backend, or convert again",
            )
        if p.temperature == 0:
            return np.array([best]), np.ones(1)
        with np.errstate(over="ignore", under="ignore"):
            weights = np.exp((scores - largest) / p.temperature)  # (vocab,), the largest is 1
        ids = _largest(scores, p.top_k) if p.top_k else np.arange(len(scores))
        ids = _nucleus(ids, scores, weights, p.top_p)
        ids = ids[weights[ids] >= p.min_p] if p.min_p else ids
        return ids, weights[ids] / weights[ids].sum()

    def _penalised(self, logits: F32, history: Sequence[int]) -> F64:
        """Steps 1 and 2; a float64 copy (vocab,)."""
        p = self.params
        scores = logits.astype(np.float64)
        scores[self._biased] += self._bias
        if p.repetition_penalty == 1 and p.presence_penalty == 0 and p.frequency_penalty == 0:
            return scores
        seen, counts = np.unique(np.asarray(history[-p.penalty_window :], np.int64), return_counts=True)
        values = scores[seen]
        values = np.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
        scores[seen] = values - p.presence_penalty - p.frequency_penalty * counts
        return scores


def new_seed() -> int:
    """A seed from the system's entropy, to be told to the user, so that a run can be repeated."""
    return SystemRandom().getrandbits(32)  # short enough to be typed in again


def _ranked(ids: I64, scores: F64) -> I64:
    """``ids``, ascending, reordered by falling score; equals keep their order."""
    order = np.argsort(-scores[ids], kind="stable")
    result: I64 = ids[order]
    return result


def _largest(scores: F64, k: int) -> I64:
    """Ids of the ``k`` largest scores, ascending ids; of equals at the border the lowest ids."""
    if k >= len(scores):
        return np.arange(len(scores))
    border = np.partition(scores, -k)[-k]
    above = np.flatnonzero(scores > border)
    level = np.flatnonzero(scores == border)
    return np.sort(np.concatenate((above, level[: k - len(above)])))


def _nucleus(ids: I64, scores: F64, weights: F64, top_p: float) -> I64:
    """Step 5 on ``ids`` (ascending); the result is ranked."""
    if top_p == 1:
        return _ranked(ids, scores)
    shares = weights[ids] / weights[ids].sum()
    # All tokens below this share sum to less than 1 - top_p, so none of them needs sorting.
    keep = shares > (1 - top_p) / len(ids) * (1 - 1e-9)
    ranked = _ranked(ids[keep], scores)
    before = np.cumsum(weights[ranked]) - weights[ranked]
    inside = before < top_p * weights[ids].sum()
    inside[0] = True
    result: I64 = ranked[inside]
    return result
