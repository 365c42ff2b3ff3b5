"""A conversation in progress: tokens in the KV cache, and the generation that continues them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pi2.decoder import Decoder, FfnCount
from pi2.errors import BudgetError, OptionError
from pi2.sampling import Sampler, Sampling
from pi2.stats import RunStats
from pi2.tensor import F32
from pi2.text import StopStrings, Stream, TextTokenizer

PREFILL_CHUNK = 256  # tokens; a chunk's activations stay near the caches, weights are read once per chunk


@dataclass(frozen=True, slots=True)
class Piece:
    """One decoded token and the text that it completed: "" while a character or stop string is open."""

    token: int
    text: str


class Session:
    """Tokens seen so far and their KV cache.

    ``group``: chunks of a prompt that go through the layers together.
    """

    def __init__(
        self, decoder: Decoder, tokenizer: TextTokenizer, context: int | None = None, group: int = 1
    ) -> None:
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.cache = decoder.new_cache(context)
        self._group = group
        self.seen: list[int] = []
        """The tokens in the KV cache."""

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Generation:
        """Continue ``prompt``, the whole conversation: what the KV cache has of it is not computed again."""
        return Generation(self, prompt, sampling)

    def keep_common_prefix(self, prompt: Sequence[int]) -> int:
        """Cut the cache back to what it shares with ``prompt``; at least one token stays to be computed."""
        shared = 0
        for a, b in zip(self.seen, prompt[:-1], strict=False):
            if a != b:
                break
            shared += 1
        self.cache.truncate(shared)
        del self.seen[shared:]
        return shared

    def forward(self, ids: Sequence[int]) -> F32:
        """Feed ``ids`` (n >= 1) in chunks; logits after the last, (vocab,)."""
        return [self._feed(group) for group in self._groups(ids)][-1]

    def logits(self, ids: Sequence[int]) -> F32:
        """Feed ``ids`` (n >= 1) in chunks; logits after each, (n, vocab)."""
        return np.concatenate([self._feed(group, all_logits=True) for group in self._groups(ids)])

    def _feed(self, chunks: Sequence[Sequence[int]], *, all_logits: bool = False) -> F32:
        arrays = [np.asarray(chunk, np.int64) for chunk in chunks]
        logits = self.decoder.forward_chunks(arrays, self.cache, all_logits=all_logits)
        for chunk in chunks:
            self.seen.extend(chunk)
        return logits

    def _groups(self, ids: Sequence[int]) -> list[list[Sequence[int]]]:
        chunks = [ids[i : i + PREFILL_CHUNK] for i in range(0, len(ids), PREFILL_CHUNK)]
        return [chunks[i : i + self._group] for i in range(0, len(chunks), self._group)]


class Generation:
    """Iterates over pieces; ``stats`` are true at any moment."""

    def __init__(self, session: Session, prompt: Sequence[int], sampling: Sampling) -> None:
        arch = session.decoder.arch
        if not prompt:
            raise OptionError("the prompt is empty", hint="a model needs at least one token to go on from")
        if max(prompt) >= arch.vocab_size or min(prompt) < 0:
            raise OptionError(f"the prompt has a token outside of 0..{arch.vocab_size - 1}")
        if len(prompt) > session.cache.limit:
            raise BudgetError(
                f"the prompt has {len(prompt)} tokens, the context {session.cache.limit}",
                hint="shorten it, or raise --context if the model allows it",
            )
        self.stats = RunStats(prompt_tokens=len(prompt))
        self._session = session
        self._prompt = list(prompt)
        self._sampling = sampling
        self._eos = frozenset(arch.eos_ids)

    def __iter__(self) -> Iterator[Piece]:
        stats, sampling, session = self.stats, self._sampling, self._session
        sampler = Sampler(sampling, session.decoder.arch.vocab_size)
        output = _Output(session.tokenizer, sampling.stop)
        start = time.perf_counter()
        logits = self._prefill()
        while True:
            token = sampler(logits, self._prompt + stats.tokens)
            elapsed = time.perf_counter() - start
            if stats.ttft_s is None:
                stats.ttft_s = elapsed
            else:
                stats.token_times_s.append(elapsed)
            stats.tokens.append(token)
            text = "" if token in self._eos else output.push(token)
            stats.stop_reason = self._reason_to_stop(token, output.stopped)
            if stats.stop_reason:
                text += output.finish()
            stats.text += text
            yield Piece(token, text)
            if stats.stop_reason:
                return
            start = time.perf_counter()
            logits = self._decode(token)

    def _reason_to_stop(self, token: int, stopped: bool) -> str | None:
        if token in self._eos:
            return "eos"
        if stopped:
            return "stop"
        if len(self.stats.tokens) >= self._sampling.max_tokens:
            return "length"
        cache = self._session.cache
        return "context" if cache.length >= cache.limit else None

    def _prefill(self) -> F32:
        session, stats = self._session, self.stats
        shared = session.keep_common_prefix(self._prompt)
        session.decoder.ffns.take_count()  # whatever was counted for others
        start = time.perf_counter()
        logits = session.forward(self._prompt[shared:])
        stats.add_read(session.decoder.ffns.take_count(), decoding=False)
        stats.prefill_s = time.perf_counter() - start
        stats.prefilled_tokens = len(self._prompt) - shared
        return logits

    def _decode(self, token: int) -> F32:
        count = self._session.decoder.ffn_count
        before = FfnCount(count.active, count.total)
        logits = self._session.forward([token])
        self.stats.add_read(self._session.decoder.ffns.take_count(), decoding=True)
        self.stats.decode_ffn.active += count.active - before.active
        self.stats.decode_ffn.total += count.total - before.total
        return logits


class _Output:
    """Tokens in, text out that is certain and holds no stop string."""

    def __init__(self, tokenizer: TextTokenizer, stops: Sequence[str]) -> None:
        self._stream, self._stops = Stream(tokenizer), StopStrings(stops)
        self.stopped = False

    def push(self, token: int) -> str:
        return self._feed(self._stream.push(token))

    def finish(self) -> str:
        return self._feed(self._stream.finish()) + self._stops.finish()

    def _feed(self, text: str) -> str:
        text, self.stopped = self._stops.feed(text)
        return text
