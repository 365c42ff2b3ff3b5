"""A model larger than its memory: pi2 with half of the FFN weights on flash beside llama.cpp with mmap.

PYTHONPATH=tests python tests/benchmarks/offload.py DIRECTORY RESULT.json [--pieces disk llama.cpp pi2]

DIRECTORY is one of ``make_model.py``'s.  Pieces run in turns, each in a process and a memory cgroup of its
own (page cache counted, the model's files dropped from it before), each under three minutes:

    disk               speed of the disk and of the memory
    llama.cpp          mmap, not repacked, under the limit: all dense weights and half of the FFNs' fit
    pi2                --memory within the same limit, the model's low-rank predictor
    pi2 exact          the same without a predictor: every gate is computed
    pi2 in memory, pi2 exact in memory, llama.cpp in memory (repacked)    no limit
    prefill            pi2, --prefill tokens at once under the limit; and without: "prefill in memory"
    llama.cpp prefill  the same under the limit, as the paper compares it
    mmap, flash, flash-lru, baseline, bundle, cache    modes of ``pi2 bench``, under the limit
    "pi2 [exact] KEY=VALUE..."    with other options: two_phase=off, prefetch=off, policy=lfu, storage=...

RESULT.json grows by one piece at a time: a run that was stopped goes on, ``--minutes`` stops one.  All get
the same tokens: a prompt, then tokens one by one, of which the first ``--settle`` fill the cache and do not
count.  Prints a summary with ratios within a repeat; the paper's figures stand beside.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import disk
import numpy as np
from contenders import Contender
from decode import READ_BYTES, machine, read_speed
from in_memory import architecture
from offload_summary import summary
from pi2.bench import MODES, Mode
from pi2.container import read_manifest
from pi2.memory_cgroup import MemoryCgroup, drop_page_cache
from pi2.stats import versions
from pi2.tensor import row_bytes

PEERS = ("mmap", "flash", "flash-lru", "baseline", "bundle", "cache")
Piece = dict[str, Any]
_WARM = 9  # tokens of a prompt that reads every weight of a model without limit


def memory_limit(model: Path, offloaded: float) -> int:
    """Bytes of all weights but for the share ``offloaded`` of the FFNs', without padding.

    KV cache, buffers, interpreter and predictor have to fit in there as well.
    """
    manifest, arch = read_manifest(model), architecture(model)
    ffns = arch.n_layers * arch.n_neurons * 3 * row_bytes("q4_0", arch.d_model)
    return int(manifest.files["dense.safetensors"].nbytes + (1 - offloaded) * ffns)


class Bench:
    """The pieces, as methods that return what is put into the result file."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model, self.gguf = options.directory / "model", options.gguf or options.directory / "model.gguf"
        self.limit = options.limit or memory_limit(self.model, options.offloaded)
        vocab = architecture(self.model).vocab_size
        total = max(options.prompt + options.settle + options.decode, options.prefill + 1)
        self.ids = np.random.default_rng(0).integers(0, vocab, total).tolist()
        self.pieces: dict[str, Callable[[], Piece]] = {
            "disk": self.disk,
            "llama.cpp": lambda: self.llama(limited=True),
            "pi2": lambda: self.pi2(MODES["pipeline"], options.predictor),
            "pi2 exact": lambda: self.pi2(MODES["pipeline"], "exact"),
            "pi2 in memory": lambda: self.pi2(MODES["memory"], options.predictor),
            "pi2 exact in memory": lambda: self.pi2(MODES["memory"], "exact"),
            "llama.cpp in memory": lambda: self.llama(limited=False),
            "prefill": lambda: self.pi2(MODES["pipeline"], options.predictor, prefill=True),
            "prefill in memory": lambda: self.pi2(MODES["memory"], options.predictor, prefill=True),
            "llama.cpp prefill": lambda: self.llama(limited=True, prefill=True),
        }
        self.pieces |= {name: lambda mode=MODES[name]: self.pi2(mode, options.predictor) for name in PEERS}

    def run(self, name: str) -> Piece:
        """A piece by its name; ``pi2 [exact] KEY=VALUE...`` is one with other options than the usual ones."""
        if name in self.pieces:
            return self.pieces[name]()
        first, *words = name.split()
        if first != "pi2" or not all("=" in word or word == "exact" for word in words):
            raise SystemExit(f"no piece is called {name!r}: there are {', '.join(self.pieces)}")
        predictor = "exact" if "exact" in words else self.options.predictor
        return self.pi2(MODES["pipeline"], predictor, changes=[word for word in words if "=" in word])

    def disk(self) -> Piece:
        neurons = self.model / "neurons.safetensors"
        stride = read_manifest(self.model).geometry.stride
        drop_page_cache(neurons)
        buffers = [np.ones(READ_BYTES, np.uint8) for _ in range(self.options.threads)]
        return disk.speeds(neurons, stride) | {"memory_read_gb_s": read_speed(buffers)}

    def tokens(self, decode: int, prefill: bool) -> tuple[list[int], int]:
        """All tokens, and how many of them are the prompt."""
        o = self.options
        return (
            (self.ids[: o.prefill + 1], o.prefill) if prefill else (self.ids[: o.prompt + decode], o.prompt)
        )

    def llama(self, *, limited: bool, prefill: bool = False) -> Piece:
        o = self.options
        ids, prompt = self.tokens(o.llama_decode if limited else o.settle + o.decode, prefill)
        options = {"threads": o.threads, "context": len(ids) + 8, "repack": not limited}
        return self._run("llama.cpp", self.gguf, ids, prompt, limited, **options)

    def pi2(self, mode: Mode, predictor: str, *, prefill: bool = False, changes: Sequence[str] = ()) -> Piece:
        o = self.options
        ids, prompt = self.tokens(o.settle + o.decode, prefill)
        chosen: dict[str, Any] = {
            "backend": f"cpu:threads={o.threads}",
            "predictor": predictor,
            "offload": {},
        }
        for item in (*o.offload, *changes):
            key, _, value = item.partition("=")
            if key == "storage":
                chosen[key] = value
            else:
                chosen["offload"][key] = _value(value)
        options = mode.arguments(chosen, self.limit) | {"context": len(ids) + 8}
        return self._run("pi2", self.model, ids, prompt, mode.limited, **options)

    def _run(
        self, kind: str, model: Path, ids: list[int], prompt: int, limited: bool, **options: Any
    ) -> Piece:
        files = sorted(model.iterdir()) if model.is_dir() else [model]
        drop_page_cache(*files)
        with MemoryCgroup(self.limit) if limited else nullcontext() as group:
            start = time.perf_counter()
            with Contender(kind, model, cgroup=group and group.path, **options) as contender:
                loaded = time.perf_counter() - start
                if not limited:
                    contender.run(ids[:_WARM], _WARM - 1)  # now it is in memory
                answer = contender.run(ids, prompt)
                rss = _rss(contender.pid)
                charged = group.figures() if group else None
        return answer | {"load_s": loaded, "rss": rss, "cgroup": charged, "setup": contender.setup}


def _value(text: str) -> Any:
    """A number, true or false; else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _rss(pid: int) -> dict[str, int]:
    """Resident bytes of a process now and at most, as the kernel counts them."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
    )
    return {name: int(fields[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM", "RssAnon", "RssFile")}


def main(options: argparse.Namespace) -> None:
    bench = Bench(options)
    state = json.loads(options.result.read_text()) if options.result.exists() else {"repeats": []}
    state |= {
        "what": f"prompt {options.prompt}, {options.settle} + {options.decode} tokens",
        "threads": options.threads,
        "limit_bytes": bench.limit,
        "offloaded_share": options.offloaded,
        "settle": options.settle,
        "prompt": options.prompt,
        "prefill": options.prefill,
        "model": dict(read_manifest(bench.model).source),
        "bundle_stride": read_manifest(bench.model).geometry.stride,
        "machine": machine(),
        "versions": versions(),
    }
    begun = time.perf_counter()
    for repeat in range(options.repeats):
        if repeat == len(state["repeats"]):
            state["repeats"].append({})
        done = state["repeats"][repeat]
        for name in options.pieces or bench.pieces:
            if name in done:
                continue
            if options.minutes and time.perf_counter() - begun > 60 * options.minutes:
                raise SystemExit(f"stopped after {options.minutes} minutes, before {name} of repeat {repeat}")
            load = os.getloadavg()[0]
            try:
                done[name] = bench.run(name) | {"load_average_before": load}
            except RuntimeError as e:  # a budget that is refused is a finding, too: it is said on stderr
                done[name] = {"refused": str(e)}
            options.result.write_text(json.dumps(state))
    print(json.dumps(summary(state), indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--gguf", type=Path, help="where it is not in DIRECTORY")
    parser.add_argument("--pieces", nargs="+")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--settle", type=int, default=64)
    parser.add_argument("--decode", type=int, default=128)
    parser.add_argument("--llama-decode", type=int, default=6, help="tokens of llama.cpp under the limit")
    parser.add_argument("--offloaded", type=float, default=0.5, help="share of the FFN weights")
    parser.add_argument("--limit", type=int, help="bytes; without it as --offloaded says")
    parser.add_argument("--predictor", default="lowrank:max_loss=1")
    parser.add_argument("--offload", nargs="*", default=[], metavar="KEY=VALUE", help="of OffloadOptions")
    return parser.parse_args()


if __name__ == "__main__":
    main(_options())
