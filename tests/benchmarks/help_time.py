"""How long ``pi2 --help`` takes: whole processes, wall clock.  Prints JSON with every repeat.

python tests/benchmarks/help_time.py [REPEATS]
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time

import pi2
import typer

COMMAND = [sys.executable, "-m", "pi2", "--help"]


def once(command: list[str]) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main(repeats: int) -> None:
    bare = [sys.executable, "-c", "pass"]
    once(COMMAND)  # compiles the bytecode
    pairs = [(once(COMMAND), once(bare)) for _ in range(repeats)]  # alternating
    seconds, start_up = zip(*pairs, strict=True)
    report = {
        "what": "pi2 --help",
        "median_s": statistics.median(seconds),
        "worst_s": max(seconds),
        "seconds": seconds,
        "bare_python_median_s": statistics.median(start_up),
        "machine": f"{platform.processor() or platform.machine()}, {platform.system()} {platform.release()}",
        "versions": {
            "pi2": pi2.__version__,
            "python": platform.python_version(),
            "typer": typer.__version__,
        },
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
