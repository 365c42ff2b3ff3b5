"""``pi2 chat``: a conversation that keeps its KV cache."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from pi2.cli import options as o
from pi2.cli.output import print_error, print_run, say, why_cut
from pi2.cli.run import write_pieces
from pi2.errors import OptionError, Pi2Error

if TYPE_CHECKING:
    from pi2.engine import Engine
    from pi2.sampling import Sampling
    from pi2.stats import RunStats

HELP = """/reset   forget the conversation
/stats   figures of the last answer
/exit    leave (or Ctrl-D)
/help    this
Ctrl-C stops an answer."""


def command(
    model: o.Model = None,
    backend: o.Backend = None,
    storage: o.Storage = None,
    predictor: o.Predictor = None,
    max_tokens: o.MaxTokens = 1024,
    temperature: o.Temperature = 0.0,
    top_k: o.TopK = 0,
    top_p: o.TopP = 1.0,
    min_p: o.MinP = 0.0,
    repetition_penalty: o.RepetitionPenalty = 1.0,
    seed: o.Seed = None,
    greedy: o.Greedy = False,
    system: o.System = None,
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
) -> None:
    """Hold a conversation, one line a turn.

    Answers go to stdout. Inside, /help lists the commands. Deterministic unless --temperature is set.
    """
    from pi2.sampling import Sampling

    sampling = Sampling(
        temperature=o.choose_temperature(temperature, greedy),
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_tokens=max_tokens,
    )
    shared = o.parse_hybrid(backend, cold, hot, hybrid, trace)
    with o.open_engine(
        model,
        backend=backend,
        storage=storage,
        predictor=predictor,
        context=context,
        verify=verify,
        offload=o.parse_offload(memory, policy, hot, offload, trace, shared),
        hybrid=shared,
        cold=cold,
        sparse_head=sparse_head,
    ) as engine:
        Chat(engine, sampling, system).loop()


class Chat:
    """The conversation and its commands."""

    def __init__(self, engine: Engine, sampling: Sampling, system: str | None) -> None:
        self._engine = engine
        self._sampling = sampling
        self._system = system
        self._last: RunStats | None = None
        self._reset()

    def _reset(self) -> None:
        self._session = self._engine.session()
        self._messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def loop(self) -> None:
        """Read lines until the end of the input or /exit."""
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if interactive:
            say("/help lists the commands, Ctrl-D leaves")
        while (line := _read_line(interactive)) is not None:
            if line == "/exit":
                return
            if line.startswith("/"):
                self._obey(line)
            elif line:
                self._answer(line)

    def _obey(self, line: str) -> None:
        if line == "/help":
            say(HELP)
        elif line == "/reset":
            self._reset()
            say("the conversation is forgotten")
        elif line == "/stats" and self._last is not None:
            print_run(self._last, self._engine.setup())
        elif line == "/stats":
            say("nothing has been said yet")
        else:
            say(f"there is no {line.split()[0]}; /help lists the commands")

    def _answer(self, line: str) -> None:
        """Print the answer.  An error costs this turn, not the conversation."""
        messages = [*self._messages, {"role": "user", "content": line}]
        try:
            generation = self._session.generate(self._engine.chat_prompt(messages), self._sampling)
            self._last = generation.stats
            stopped = "stopped" if write_pieces(generation) else why_cut(generation.stats)
            if stopped:
                say(f"({stopped})")
        except Pi2Error as e:
            print_error(e)
            say("/reset forgets the conversation")
            return
        if generation.stats.tokens:  # else it was stopped before it began, and the turn is forgotten
            self._messages = [*messages, {"role": "assistant", "content": generation.stats.text}]


def _read_line(interactive: bool) -> str | None:
    """The next line without spaces around it, or None at the end of the input."""
    try:
        if interactive:
            import readline  # noqa: F401  gives input() its line editing and history

            line = input("> ")
        else:
            line = sys.stdin.readline()
            if not line:
                return None
    except EOFError:
        say()
        return None
    except KeyboardInterrupt:
        if not interactive:
            raise
        say("\n/exit or Ctrl-D leaves")
        return ""
    except UnicodeDecodeError as e:
        raise OptionError(f"stdin is not UTF-8: {e.reason}", hint="convert it with iconv") from None
    return line.strip()
