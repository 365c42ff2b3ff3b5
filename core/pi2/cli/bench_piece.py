"""One piece of ``pi2 bench``, in a process of its own: asked by JSON on stdin, answers on stdout."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from pi2.bench import Piece, Work
from pi2.engine import Engine
from pi2.errors import OptionError, Pi2Error
from pi2.hybrid import HybridOptions
from pi2.offload_options import OffloadOptions
from pi2.sampling import Sampling

_HOT = 0.1  # of each FFN on the accelerator, unless --hot says otherwise


def run(request: dict[str, Any]) -> Piece:
    """Open the engine that ``request`` asks for and do its work.  Raises Pi2Error."""
    arguments = dict(request["engine"])
    if arguments.get("offload") is not None:
        arguments["offload"] = OffloadOptions(**arguments["offload"])
    if request.get("accelerated"):
        arguments = _with_accelerator(arguments)
    work, start = Work(**request["work"]), time.perf_counter()
    context = work.prefill + work.settle + work.tokens + 2
    with Engine.open(request["model"], context=context, **arguments) as engine:
        loaded = time.perf_counter() - start
        return {"load_s": loaded, **measure(engine, work)}


def measure(engine: Engine, work: Work) -> Piece:
    """Do ``work`` and say how it went; of decoding, what came after the caches had settled."""
    never = dict.fromkeys(engine.model.architecture.eos_ids, -float("inf"))
    sampling = Sampling(
        temperature=1.0, seed=work.seed, max_tokens=work.settle + work.tokens + 1, logit_bias=never
    )
    generation = engine.generate(_prompt(engine, work), sampling)
    pieces, read = iter(generation), [0]
    for _ in range(work.settle + 1):
        next(pieces)
    read[0] = _storage_bytes()
    for _ in pieces:
        pass
    stats = generation.stats
    settled = dataclasses.replace(
        stats, token_times_s=stats.token_times_s[work.settle :],
        reads=stats.reads and [stats.reads[0], *stats.reads[1 + work.settle :]],
    )  # fmt: skip
    return {
        **settled.to_json(engine.setup()),
        "token_s": stats.token_times_s,
        "prefill_s": stats.prefill_s,
        "storage_bytes_per_token": (_storage_bytes() - read[0]) / work.tokens,
        "notes": engine.notes,
    }


def _prompt(engine: Engine, work: Work) -> list[int]:
    """The first tokens of the text, which is repeated until there are enough."""
    ids = engine.encode(work.text)
    if not ids:
        raise OptionError("the text of the prompt is empty", hint="give another --file")
    return (ids * -(-work.prefill // len(ids)))[: work.prefill]


def _storage_bytes() -> int:
    """What this process made the system read from storage, page faults included; 0 where it does not say."""
    path = Path("/proc/self/io")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)


def _with_accelerator(arguments: dict[str, Any]) -> dict[str, Any]:
    """The best accelerator there is as the backend, what was the backend beside it."""
    from pi2.cli.options import installed_plugins
    from pi2.hybrid_setup import is_accelerator
    from pi2.plugins import probe

    found = {
        name: probe(cls) for name, cls in installed_plugins().of("backends").items() if is_accelerator(cls)
    }
    best = max(found, key=lambda name: found[name].score, default=None)
    if best is None or not found[best]:
        raise OptionError("not available: no accelerator can run here", hint="pi2 plugins says why")
    offload = arguments.get("offload")
    hot = _HOT if offload is None or offload.hot is None else offload.hot
    more = {"backend": best, "cold": arguments.get("backend"), "hybrid": HybridOptions(hot=hot)}
    if offload is not None:
        more["offload"] = dataclasses.replace(offload, hot=None)
    return {**arguments, **more}


def main() -> None:
    """Answer the request on stdin; what libraries print goes to stderr."""
    answer = sys.stdout
    sys.stdout = sys.stderr
    try:
        found = run(json.load(sys.stdin))
    except Pi2Error as e:
        found = {"refused": str(e), "hint": e.hint}
    json.dump(found, answer, default=str)


if __name__ == "__main__":
    main()
