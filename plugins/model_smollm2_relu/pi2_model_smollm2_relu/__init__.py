"""Carries the pi2 model ``smollm2-relu``: a ReLU twin of SmolLM2-135M-Instruct."""

from __future__ import annotations

from pathlib import Path

from pi2.hookspecs import hookimpl

PI2_API_VERSION = 1


@hookimpl
def pi2_models() -> dict[str, Path]:
    return {"smollm2-relu": Path(__file__).parent / "model"}
