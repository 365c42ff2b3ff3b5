"""``Engine``: a model, a backend and a tokenizer wired together.  It decides nothing by itself."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pi2.api import Backend, CachePolicy, Predictor, StorageTier
from pi2.chat_template import render
from pi2.container.reader import PiModel, open_model
from pi2.decoder import Decoder, FfnCount
from pi2.errors import BudgetError, FormatError, OptionError
from pi2.kv_cache import KvCache
from pi2.model_choice import find_model
from pi2.plugins import Plugins
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


def parse_choice(text: str | None) -> tuple[str | None, dict[str, str]]:
    """``name:key=value,key=value`` -> (name, options)."""
    if text is None:
        return None, {}
    name, _, rest = text.partition(":")
    options = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise OptionError(f"{item!r} is no option", hint="write name:key=value,key=value")
        options[key.strip()] = value.strip()
    return name or None, options


class Engine:
    """An opened model.  Use as a context manager, or call ``close``."""

    def __init__(
        self,
        model: PiModel,
        backend: Backend,
        storage: StorageTier,
        predictor: Predictor,
        policy: CachePolicy,
        *,
        context: int | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = TextTokenizer(model.tokenizer_json)
        if self.tokenizer.vocab_size > model.architecture.vocab_size:
            raise FormatError(
                f"the tokenizer knows {self.tokenizer.vocab_size} tokens,"
                f" the model only {model.architecture.vocab_size}"
            )
        predictor.attach(model, backend)
        self._parts = {"backend": backend, "storage": storage, "predictor": predictor, "policy": policy}
        self._lossless = predictor.lossless or not model.architecture.sparse
        self._context = context
        self.decoder = Decoder(model, backend, predictor)
        self._resources = ExitStack()

    @classmethod
    def open(
        cls,
        model: str | Path | None = None,
        *,
        backend: str | None = None,
        storage: str | None = None,
        predictor: str | None = None,
        policy: str | None = None,
        context: int | None = None,
        verify: bool | None = None,
        plugins: Plugins | None = None,
    ) -> Self:
        """Open ``model`` (a directory, an installed model's name, or None for the only installed one).

        Parts are named as ``name:key=value,...``; None picks the best that can run here.  ``context`` caps
        the KV cache, in tokens.  Raises Pi2Error with a hint.
        """
        plugins = plugins or Plugins.installed()
        path = find_model(None if model is None else str(model), plugins)
        with ExitStack() as stack:

            def part(kind: str, choice: str | None) -> Any:
                name, options = parse_choice(choice)
                opened = plugins.pick(kind, name).open(options)
                stack.callback(opened.close)
                return opened

            tier = part("storage_tiers", storage)
            parts = (
                part("backends", backend),
                tier,
                part("predictors", predictor),
                part("cache_policies", policy),
            )
            opened = open_model(path, tier, verify=verify)
            stack.callback(opened.close)
            engine = cls(opened, *parts, context=context)
            engine._resources = stack.pop_all()
            return engine

    def close(self) -> None:
        """Close the model and the parts, in reverse order of opening.  Safe to call twice."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with the model's own begin-of-text token if it has one."""
        return self.tokenizer.encode(text, bos=True)

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer.

        ``messages`` are {"role": ..., "content": ...}.  Raises FormatError if the model has no template.
        """
        template = self.model.chat_template
        if template is None:
            raise FormatError("this model has no chat template", hint="use --raw to continue a text")
        arch = self.model.architecture
        bos = "" if arch.bos_id is None else self.tokenizer.token_text(arch.bos_id)
        eos = self.tokenizer.token_text(arch.eos_ids[0]) if arch.eos_ids else ""
        text = render(template, [dict(m) for m in messages], bos_token=bos, eos_token=eos)
        return self.tokenizer.encode(text, bos=False)

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Generation:
        """Continue ``prompt`` in a session of its own."""
        return Session(self).generate(prompt, sampling)

    def session(self) -> Session:
        """A conversation that keeps its KV cache from call to call."""
        return Session(self)

    def logits(self, ids: Sequence[int]) -> F32:
        """Logits after every token of ``ids``, (n, vocab), for evaluation."""
        cache = KvCache(self.model.architecture, self._context)
        chunks = [
            self.decoder.forward(_ids(ids[i : i + PREFILL_CHUNK]), cache, all_logits=True)
            for i in range(0, len(ids), PREFILL_CHUNK)
        ]
        return np.concatenate(chunks)

    def setup(self) -> dict[str, Any]:
        """What runs: names of the parts, whether the output is that of the dense model, the configuration."""
        names = {kind: part.name for kind, part in self._parts.items()}
        config = {
            "model": str(self.model.path),
            "family": self.model.architecture.family,
            "context": self._context or self.model.architecture.max_context,
            "prefill_chunk": PREFILL_CHUNK,
            "checksums_verified": self.model.verified,
        }
        return {**names, "lossless": self._lossless, "config": config}


class Session:
    """Tokens seen so far and their KV cache."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.cache = KvCache(engine.model.architecture, engine._context)
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
        """Feed ``ids`` in chunks; logits after the last."""
        for i in range(0, len(ids), PREFILL_CHUNK):
            chunk = ids[i : i + PREFILL_CHUNK]
            logits = self.engine.decoder.forward(_ids(chunk), self.cache)
            self.seen.extend(chunk)
        return logits


class Generation:
    """Iterates over pieces; ``stats`` are true at any moment."""

    def __init__(self, session: Session, prompt: Sequence[int], sampling: Sampling) -> None:
        arch = session.engine.model.architecture
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
        sampler = Sampler(sampling, session.engine.model.architecture.vocab_size)
        output = _Output(session.engine.tokenizer, sampling.stop)
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
        start = time.perf_counter()
        logits = session.forward(self._prompt[shared:])
        stats.prefill_s = time.perf_counter() - start
        stats.prefilled_tokens = len(self._prompt) - shared
        return logits

    def _decode(self, token: int) -> F32:
        count = self._session.engine.decoder.ffn_count
        before = FfnCount(count.active, count.total)
        logits = self._session.forward([token])
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


def _ids(ids: Sequence[int]) -> NDArray[np.int64]:
    return np.asarray(ids, np.int64)
