"""``Engine``: a model, a backend and a tokenizer wired together.  It decides nothing by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, Self

from pi2.api import Backend, CachePolicy, Plugin, Predictor, StorageTier
from pi2.budget import DEFAULT_CONTEXT, GROUP, Outside
from pi2.builtin.lfu_policy import LfuPolicy
from pi2.config import Settings
from pi2.container.reader import PiModel, open_model
from pi2.decoder import Decoder, kv_dtype
from pi2.errors import FormatError, OptionError
from pi2.ffns import Ffns, ResidentFfns
from pi2.hybrid import ColdOnly, HybridFfns, HybridOptions
from pi2.hybrid_setup import Hybrid, Placed, beside
from pi2.model_choice import find_model
from pi2.offload import OffloadedFfns
from pi2.offload_options import OffloadOptions
from pi2.offload_setup import Offload, attach, open_ffns
from pi2.plugins import Plugins, probe
from pi2.powers import SupportsAsyncRead
from pi2.sampling import Sampling
from pi2.session import PREFILL_CHUNK, Generation, Session
from pi2.tensor import F32
from pi2.text import TextTokenizer
from pi2.trace import TraceWriter


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


def best_reader(plugins: Plugins) -> str:
    """The best storage tier for weights that stay on flash: one that reads while something is computed.

    Where there is none, whatever tier is best.
    """
    tiers = plugins.of("storage_tiers")
    able = {name: probe(tier).score for name, tier in tiers.items() if issubclass(tier, SupportsAsyncRead)}
    best = max(able, key=lambda name: able[name], default=None)
    return best if best is not None and able[best] > 0 else str(plugins.pick("storage_tiers").name)


class Engine:
    """An opened model.  Use as a context manager, or call ``close``."""

    def __init__(
        self,
        model: PiModel,
        backend: Backend,
        storage: StorageTier,
        predictor: Predictor,
        *,
        context: int | None = None,
        offload: OffloadOptions | None = None,
        policy: CachePolicy | None = None,
        hybrid: Hybrid | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = TextTokenizer(model.tokenizer_json)
        if self.tokenizer.vocab_size > model.architecture.vocab_size:
            raise FormatError(
                f"the tokenizer knows {self.tokenizer.vocab_size} tokens,"
                f" the model only {model.architecture.vocab_size}"
            )
        self.backend = backend
        """What computes; the accelerator's neighbour, if there is one."""
        self._parts: dict[str, Plugin] = {"backend": backend, "storage": storage, "predictor": predictor}
        self._lossless = predictor.lossless
        self.context = context
        """Tokens of the KV cache at most; None: the model's maximum."""
        self.offloaded: OffloadedFfns | None = None
        """The FFNs on flash, if a budget was set."""
        self.lossy_head: str | None = None
        """What stands in for the LM head, if something does."""
        self.hybrid: HybridFfns | None = None
        """The FFNs of an accelerator and ``backend``, if they share the model."""
        self._placed: Placed | None = None
        self._resources = ExitStack()
        setup = None
        if hybrid is not None:
            self._parts = {**self._parts, "backend": hybrid.accelerator, "cpu": backend}
            self._placed = Placed(model, hybrid, resident=offload is None)
        if offload is not None:
            policy = policy or LfuPolicy()
            setup = self._offload_setup(backend, offload, policy, hybrid)
        self.decoder = self._open(storage, predictor, setup, hybrid)

    def _offload_setup(
        self, backend: Backend, options: OffloadOptions, policy: CachePolicy, hybrid: Hybrid | None
    ) -> Offload:
        most = self.model.architecture.max_context
        self.context = min(self.context or DEFAULT_CONTEXT, most)
        self._parts["policy"] = policy
        setup = Offload(options, policy, self.context, min(PREFILL_CHUNK, self.context), kv_dtype(backend))
        computes = [(backend, self.model.resident_bytes)]
        if hybrid is not None and self._placed is not None:
            setup.options = dataclasses.replace(options, hot=0.0)  # they are the accelerator's
            setup.elsewhere = self._placed.nbytes
            if hybrid.options.attention == "accelerator":
                setup.kv = kv_dtype(hybrid.accelerator)
            if hybrid.options.prefill == "accelerator":
                setup.dense = hybrid.accelerator
            computes.append((hybrid.accelerator, self._placed.weights(self.model)))
        setup.outside = Outside(computes)
        return setup

    def _open(
        self, storage: StorageTier, predictor: Predictor, setup: Offload | None, hybrid: Hybrid | None
    ) -> Decoder:
        model, backend, placed = self.model, self.backend, self._placed
        if setup is None:
            predictor.attach(model, backend)
        else:
            attach(model, backend, predictor, setup)

        def make_ffns() -> Ffns:
            handles = [] if placed is None else placed.place(None if setup is None else storage)
            if setup is None:
                ffns: Ffns = ResidentFfns(model, backend)
            else:
                named = predictor if placed is None else ColdOnly(predictor, placed.hot)
                ffns = self.offloaded = open_ffns(model, backend, storage, named, setup)
                self._resources.callback(self.offloaded.close)
            if placed is not None:
                ffns = self.hybrid = placed.ffns(ffns, handles, self._trace(placed))
                self._resources.callback(self.hybrid.close)
            return ffns

        attends = hybrid.accelerator if hybrid and hybrid.options.attention == "accelerator" else None
        decoder = Decoder(model, backend, predictor, make_ffns, attends)
        if attends is not None and self.hybrid is not None:
            decoder.attention_lost, self.hybrid.also = self.hybrid.lose, decoder.take_attention
        return decoder

    def _trace(self, placed: Placed) -> TraceWriter | None:
        if self.offloaded is not None:
            return self.offloaded.trace
        path = placed.options.trace
        if path is None:
            return None
        trace = TraceWriter(path)
        self._resources.callback(trace.close)
        return trace

    @classmethod
    def open(
        cls,
        model: str | Path | None = None,
        *,
        backend: str | None = None,
        storage: str | None = None,
        predictor: str | None = None,
        context: int | None = None,
        verify: bool | None = None,
        plugins: Plugins | None = None,
        offload: OffloadOptions | None = None,
        hybrid: HybridOptions | None = None,
        cold: str | None = None,
    ) -> Self:
        """Open ``model`` (a directory, an installed model's name, or None for the only installed one).

        Parts are named as ``name:key=value,...``; None picks the best that can run here.  ``context`` caps
        the KV cache, in tokens.  ``offload`` leaves the FFN weights on flash, under a budget of memory.
        ``hybrid`` makes ``backend`` an accelerator beside the backend ``cold``, which has the rest.
        Raises Pi2Error with a hint.
        """
        plugins = plugins or Plugins.installed(Settings.from_environment())
        path = find_model(None if model is None else str(model), plugins)
        with ExitStack() as stack:

            def part(kind: str, choice: str | None) -> Any:
                name, options = parse_choice(choice)
                opened = plugins.pick(kind, name).open(options)
                stack.callback(opened.close)
                return opened

            if offload is not None and storage is None:
                storage = best_reader(plugins)
            tier = part("storage_tiers", storage)
            computes = part("backends", backend)
            shared = None
            if hybrid is not None:
                shared = Hybrid(computes, hybrid)
                computes = part("backends", cold or beside(plugins, computes.name))
            parts = (computes, tier, part("predictors", predictor))
            policy = None if offload is None else part("cache_policies", offload.policy)
            opened = open_model(path, tier, verify=verify, views=offload is None)
            stack.callback(opened.close)
            engine = cls(opened, *parts, context=context, offload=offload, policy=policy, hybrid=shared)
            stack.enter_context(engine._resources)  # closed before what it stands on
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
        from pi2.chat_template import render  # with Jinja: 3 MB that only a conversation needs

        arch, template = self.model.architecture, self.model.chat_template
        if template is None:
            raise FormatError("this model has no chat template", hint="use --raw to continue a text")
        bos = "" if arch.bos_id is None else self.tokenizer.token_text(arch.bos_id)
        eos = self.tokenizer.token_text(arch.eos_ids[0]) if arch.eos_ids else ""
        text = render(template, [dict(m) for m in messages], bos_token=bos, eos_token=eos)
        return self.tokenizer.encode(text, bos=False)

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Generation:
        """Continue ``prompt`` in a session of its own."""
        return self.session().generate(prompt, sampling)

    def session(self) -> Session:
        """A conversation that keeps its KV cache from call to call."""
        group = 1 if self.offloaded is None else GROUP
        return Session(self.decoder, self.tokenizer, self.context, group)

    def logits(self, ids: Sequence[int]) -> F32:
        """Logits after every token of ``ids``, (n, vocab), for evaluation."""
        return self.session().logits(ids)

    @property
    def notes(self) -> list[str]:
        """What the user should know of how the model runs: slower than could be, smaller than wise."""
        parts = (ffns.notes for ffns in (self.offloaded, self.hybrid) if ffns is not None)
        return [*self.rounded, *chain.from_iterable(parts)]

    @property
    def rounded(self) -> list[str]:
        """Which backends do not compute with the weights as they are."""
        parts = (part for part in self._parts.values() if isinstance(part, Backend))
        return [f"{part.name}: {part.lossy}" for part in parts if part.lossy is not None]

    @property
    def losses(self) -> list[str]:
        """Why the output may not be the dense model's, if it may not."""
        missed = (("neurons", not self._lossless), ("tokens", self.lossy_head is not None))
        return [f"{what} may be missed" for what, lossy in missed if lossy] + self.rounded

    def setup(self) -> dict[str, Any]:
        """What runs: names of the parts, whether the output is that of the dense model, the configuration."""
        names: dict[str, Any] = {kind: part.name for kind, part in self._parts.items() if kind != "cpu"}
        names["emulated"] = any(isinstance(part, Backend) and part.emulated for part in self._parts.values())
        config = {
            "model": str(self.model.path),
            "family": self.model.architecture.family,
            "context": self.context or self.model.architecture.max_context,
            "prefill_chunk": PREFILL_CHUNK,
            "parts": {kind: part.describe() for kind, part in self._parts.items()},
            "checksums_verified": self.model.verified,
        }
        if outside := Outside((part, 0) for part in self._parts.values() if isinstance(part, Backend))():
            names["outside_bytes"] = outside
        if self.offloaded is not None:
            regions = self.offloaded.regions
            names["budget_bytes"] = regions.budget
            config["regions"] = regions.to_json()
            config["offload"] = dataclasses.asdict(self.offloaded.options)
            config["two_phase"] = self.offloaded.two_phase
        if self.hybrid is not None and self._placed is not None:
            names["hybrid"] = self._placed.describe(self.hybrid, self.backend)
            config["hybrid"] = dataclasses.asdict(self.hybrid.options)
        if self.notes:
            config["notes"] = self.notes
        if self.lossy_head is not None:
            config["head"] = self.lossy_head
        if self.losses:
            config["losses"] = self.losses
        return {**names, "lossless": not self.losses, "config": config}
