"""Options that several commands share, each under its one name, and what they are turned into."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pi2.errors import OptionError

if TYPE_CHECKING:
    from pi2.api import ModelSource
    from pi2.engine import Engine
    from pi2.hybrid import HybridOptions
    from pi2.offload_options import OffloadOptions
    from pi2.plugins import Plugins

_PART = "name, or name:key=value,key=value; without it the best that can run here"

Model = Annotated[
    str | None,
    typer.Option("--model", help="Directory of a pi2 model, or name of an installed one [env: PI2_MODEL]."),
]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Directory of a pi2 model, or name of an installed one.")
]
Texts = Annotated[list[Path], typer.Argument(metavar="TEXT...", help="Text files, UTF-8.")]
Tokens = Annotated[int | None, typer.Option("--tokens", min=1, help="Use so many tokens at most.")]
Backend = Annotated[str | None, typer.Option("--backend", help=f"What computes ({_PART}).")]
Storage = Annotated[str | None, typer.Option("--storage", help=f"What reads the weights ({_PART}).")]
Predictor = Annotated[str | None, typer.Option("--predictor", help=f"What names active neurons ({_PART}).")]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Resident memory of the whole process at most, like 2G or 900MiB: FFN weights stay on flash.",
    ),
]
Policy = Annotated[
    str | None, typer.Option("--policy", help=f"What leaves the neuron cache first ({_PART}).")
]
Hot = Annotated[
    float | None,
    typer.Option(
        "--hot",
        metavar="SHARE",
        help="Share of each FFN that is hot: computed by the --backend, if that is an accelerator, beside"
        " --cold; else, with --memory, kept in the cache for ever [default: half of the cache].",
    ),
]
Cold = Annotated[
    str | None,
    typer.Option(
        "--cold",
        help="Makes --backend the accelerator of the --hot share: what computes everything else"
        " (name, or name:key=value,key=value).",
    ),
]
HybridDetails = Annotated[
    str | None,
    typer.Option(
        "--hybrid",
        metavar="KEY=V,...",
        help="How an accelerator and the CPU share a model: attention=cpu|accelerator,"
        " prefill=cpu|accelerator, most=SHARE, cluster=N, lost=stop|cpu.",
    ),
]
SparseHead = Annotated[
    int | None,
    typer.Option(
        "--sparse-head",
        metavar="K",
        help="Exact logits for K tokens only, an estimate for the others (lossy; pi2 train-head makes it).",
    ),
]
OffloadDetails = Annotated[
    str | None,
    typer.Option(
        "--offload",
        metavar="KEY=V,...",
        help="How weights are read: prefetch=auto|on|off, two_phase=auto|on|off, cluster=N,"
        " pipeline=auto|native|python.",
    ),
]
Trace = Annotated[
    Path | None,
    typer.Option("--trace", help="Write what is read and computed when to this file, for Perfetto."),
]
Verify = Annotated[
    bool,
    typer.Option("--verify", help="Compare the checksum of every file first, however large."),
]
Context = Annotated[
    int | None,
    typer.Option("--context", min=1, help="Tokens of the KV cache; without it the model's maximum."),
]
System = Annotated[str | None, typer.Option("--system", help="System message, before the conversation.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="Tokens of an answer at most.")]
Temperature = Annotated[
    float, typer.Option("--temperature", help="0 takes the likeliest token; 0.7 to 1 is livelier.")
]
TopK = Annotated[int, typer.Option("--top-k", help="Sample from the K likeliest tokens; 0 is all.")]
TopP = Annotated[float, typer.Option("--top-p", help="Sample from the likeliest that sum to P.")]
MinP = Annotated[float, typer.Option("--min-p", help="Drop tokens below P times the likeliest.")]
RepetitionPenalty = Annotated[
    float, typer.Option("--repetition-penalty", help="Divide the logits of recent tokens; 1 is off.")
]
PresencePenalty = Annotated[
    float, typer.Option("--presence-penalty", help="Subtract from the logits of recent tokens.")
]
FrequencyPenalty = Annotated[
    float, typer.Option("--frequency-penalty", help="The same, for each time that they occurred.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")]
Greedy = Annotated[bool, typer.Option("--greedy", help="The same as --temperature 0.")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text. Repeatable.")
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(
        "--logit-bias", metavar="ID=V", help="Add V to a token's logit; -inf forbids it. Repeatable."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no figures.")]


def parse_bias(items: list[str] | None) -> dict[int, float]:
    """``["42=-1.5"]`` -> {42: -1.5}.  Raises OptionError."""
    bias = {}
    for item in items or []:
        token, _, value = item.partition("=")
        try:
            bias[int(token)] = float(value)
        except ValueError:
            raise OptionError(f"--logit-bias takes ID=V, not {item!r}", hint="for example 42=-1.5") from None
    return bias


def choose_temperature(temperature: float, greedy: bool) -> float:
    """Raises OptionError if both options are given and contradict each other."""
    if greedy and temperature != 0:
        raise OptionError(f"--greedy contradicts --temperature {temperature:g}", hint="leave one of them out")
    return temperature


def installed_plugins() -> Plugins:
    """The plugins that the environment allows."""
    from pi2.config import Settings
    from pi2.plugins import Plugins

    return Plugins.installed(Settings.from_environment())


def load_source(path: Path, plugins: Plugins) -> ModelSource:
    """A foreign model, opened by the importer that recognises it."""
    from pi2.formats import detect

    importers = plugins.of("model_formats").values()
    source: ModelSource = detect(path, importers).open().load(path)  # type: ignore[arg-type]  # of that kind
    return source


def open_engine(
    model: str | None,
    *,
    backend: str | None = None,
    storage: str | None = None,
    predictor: str | None = None,
    context: int | None = None,
    verify: bool = False,
    offload: OffloadOptions | None = None,
    hybrid: HybridOptions | None = None,
    cold: str | None = None,
    sparse_head: int | None = None,
) -> Engine:
    """The engine that the options describe; without ``model`` the environment's choice."""
    from pi2.cli.output import print_notes
    from pi2.config import Settings
    from pi2.engine import Engine

    engine = Engine.open(
        model or Settings.from_environment().model,
        backend=backend,
        storage=storage,
        predictor=predictor,
        context=context,
        verify=verify or None,
        plugins=installed_plugins(),
        offload=offload,
        hybrid=hybrid,
        cold=cold,
    )
    if sparse_head is not None:
        _use_sparse_head(engine, sparse_head)
    print_notes(engine)
    return engine


def _use_sparse_head(engine: Engine, candidates: int) -> None:
    from pi2.sparse_head import use_sparse_head

    try:
        use_sparse_head(engine, candidates)
    except BaseException:
        engine.close()
        raise


def parse_offload(
    memory: str | None,
    policy: str | None,
    hot: float | None,
    details: str | None,
    trace: Path | None = None,
    hybrid: HybridOptions | None = None,
) -> OffloadOptions | None:
    """What --memory and the options that need it mean; None without them.  Raises OptionError."""
    from pi2.engine import parse_choice
    from pi2.memory import parse_bytes
    from pi2.offload_options import OffloadOptions
    from pi2.options import parse_options

    if memory is None:
        given: dict[str, object] = {"--policy": policy, "--offload": details}
        if hybrid is None:
            given |= {"--hot": hot, "--trace": trace}
        for name, value in given.items():
            if value is not None:
                needs = "--memory, or an accelerator" if name in ("--hot", "--trace") else "--memory"
                raise OptionError(f"{name} needs {needs}", hint="without it all weights are resident")
        return None
    try:
        size = parse_bytes(memory)
    except ValueError:
        raise OptionError(f"--memory takes a size, not {memory!r}", hint="for example 2G or 900MiB") from None
    settings = parse_choice(f":{details or ''}")[1]
    if clash := {"memory", "slots", "policy", "hot", "trace"} & set(settings):
        raise OptionError(f"--offload has no {min(clash)}", hint="see --help")
    chosen = parse_options(OffloadOptions, settings)
    return OffloadOptions(memory=size, policy=policy, trace=trace, hot=None if hybrid else hot, **chosen)


def parse_hybrid(
    backend: str | None,
    cold: str | None,
    hot: float | None,
    details: str | None,
    trace: Path | None = None,
) -> HybridOptions | None:
    """How --backend and the CPU share a model; None if they do not.  Raises OptionError."""
    from pi2.engine import parse_choice
    from pi2.hybrid import HybridOptions
    from pi2.hybrid_setup import is_accelerator
    from pi2.options import parse_options

    if hot is None:
        for name, value in {"--cold": cold, "--hybrid": details}.items():
            if value is not None:
                raise OptionError(f"{name} needs --hot", hint="the share of each FFN for the accelerator")
        return None
    if cold is None and not is_accelerator(installed_plugins().pick("backends", parse_choice(backend)[0])):
        if details is not None:
            raise OptionError("--hybrid needs an accelerator", hint="name it with --backend")
        return None
    settings = parse_choice(f":{details or ''}")[1]
    if clash := {"hot", "trace"} & set(settings):
        raise OptionError(f"--hybrid has no {min(clash)}", hint="see --help")
    return HybridOptions(hot=hot, trace=trace, **parse_options(HybridOptions, settings))
