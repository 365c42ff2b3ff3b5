"""``pi2 run``: one prompt, one answer."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pi2.cli import options as o
from pi2.cli.output import print_json, print_notes, print_run
from pi2.errors import OptionError, StorageError

if TYPE_CHECKING:
    from pi2.engine import Engine
    from pi2.sampling import Sampling
    from pi2.session import Generation

Prompt = Annotated[
    str | None, typer.Argument(help='The prompt; "-" reads it from stdin.', show_default=False)
]
File = Annotated[Path | None, typer.Option("--file", help="Read the prompt from a file.")]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the text as it is: no chat template.")]


def command(
    prompt: Prompt = None,
    file: File = None,
    model: o.Model = None,
    backend: o.Backend = None,
    storage: o.Storage = None,
    predictor: o.Predictor = None,
    max_tokens: o.MaxTokens = 256,
    temperature: o.Temperature = 0.0,
    top_k: o.TopK = 0,
    top_p: o.TopP = 1.0,
    min_p: o.MinP = 0.0,
    repetition_penalty: o.RepetitionPenalty = 1.0,
    presence_penalty: o.PresencePenalty = 0.0,
    frequency_penalty: o.FrequencyPenalty = 0.0,
    seed: o.Seed = None,
    greedy: o.Greedy = False,
    stop: o.Stop = None,
    logit_bias: o.LogitBias = None,
    system: o.System = None,
    raw: Raw = False,
    context: o.Context = None,
    memory: o.Memory = None,
    policy: o.Policy = None,
    hot: o.Hot = None,
    cold: o.Cold = None,
    hybrid: o.HybridDetails = None,
    offload: o.OffloadDetails = None,
    sparse_head: o.SparseHead = None,
    trace: o.Trace = None,
    verify: o.Verify = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Answer a prompt, or continue a text.

    The text goes to stdout as it comes, figures to stderr. Deterministic unless --temperature is set.
    """
    text = read_prompt(prompt, file)
    if raw and system is not None:
        raise typer.BadParameter("--raw has no place for a system message", param_hint="--system")
    from pi2.sampling import Sampling, new_seed

    if seed is None and temperature > 0:
        seed = new_seed()  # here, so that it can be told
    sampling = Sampling(
        temperature=o.choose_temperature(temperature, greedy), top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty, logit_bias=o.parse_bias(logit_bias),
        seed=seed, max_tokens=max_tokens, stop=tuple(stop or ()),
    )  # fmt: skip
    shared = o.parse_hybrid(backend, cold, hot, hybrid, trace)
    with o.open_engine(
        model, backend=backend, storage=storage, predictor=predictor, context=context, verify=verify,
        offload=o.parse_offload(memory, policy, hot, offload, trace, shared), hybrid=shared, cold=cold,
        sparse_head=sparse_head,
    ) as engine:  # fmt: skip
        _answer(engine, _prompt_ids(engine, text, system, raw), sampling, json=json, quiet=quiet)


def _answer(engine: Engine, ids: list[int], sampling: Sampling, *, json: bool, quiet: bool) -> None:
    told = len(engine.notes)
    generation = engine.generate(ids, sampling)
    if json:
        for _ in generation:
            pass
        interrupt = None
    else:
        interrupt = write_pieces(generation)
    setup = engine.setup()
    setup["config"]["sampling"] = dataclasses.asdict(sampling)
    print_notes(engine, told)
    if json:
        print_json(generation.stats.to_json(setup))
    elif not quiet and generation.stats.tokens:
        print_run(generation.stats, setup)
    if interrupt:
        raise interrupt


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from wherever it is; one newline at the end of a file or of stdin is not part of it."""
    if prompt is not None and prompt != "-":
        if file is not None:
            raise typer.BadParameter("give a prompt or a file, not both", param_hint="--file")
        return prompt
    if file is not None:
        try:
            return _decoded(file.read_bytes(), str(file))
        except OSError as e:
            raise StorageError(e.strerror or str(e), path=file, hint="check the path") from None
    if prompt is None and sys.stdin.isatty():
        raise typer.BadParameter("there is none: give it as an argument, with --file, or on stdin")
    return _decoded(sys.stdin.buffer.read(), "stdin")


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode().removesuffix("\n")
    except UnicodeDecodeError as e:
        raise OptionError(f"{where} is not UTF-8 at byte {e.start}", hint="convert it with iconv") from None


def _prompt_ids(engine: Engine, text: str, system: str | None, raw: bool) -> list[int]:
    if raw:
        return engine.encode(text)
    before = [] if system is None else [{"role": "system", "content": system}]
    return engine.chat_prompt([*before, {"role": "user", "content": text}])


def write_pieces(generation: Generation) -> KeyboardInterrupt | None:
    """Print the text as it comes, and a newline at its end; Ctrl-C ends it early and is returned."""
    interrupt = None
    try:
        for piece in generation:
            if piece.text:
                sys.stdout.write(piece.text)
                sys.stdout.flush()
    except KeyboardInterrupt as e:
        interrupt = e
    if not generation.stats.text.endswith("\n"):
        sys.stdout.write("\n")
        sys.stdout.flush()  # before the figures on stderr
    sys.stdout.flush()
    return interrupt
