"""The model is whole, small, sparse, and answers."""

from pathlib import Path

import pi2_model_smollm2_relu
import pytest
from pi2.builtin.mmap_tier import MmapTier
from pi2.container.reader import open_model
from pi2.engine import Engine
from pi2.plugins import Plugins
from pi2.sampling import Sampling

(NAME, PATH), *REST = pi2_model_smollm2_relu.pi2_models().items()


@pytest.fixture(scope="module")
def engine():
    with Engine.open(PATH) as opened:
        yield opened


def answer(engine, question):
    generation = engine.generate(
        engine.chat_prompt([{"role": "user", "content": question}]), Sampling(max_tokens=48)
    )
    text = "".join(piece.text for piece in generation)
    return text, generation.stats


def test_the_hook_names_one_model():
    assert (NAME, REST) == ("smollm2-relu", [])
    plugins = Plugins()
    plugins.add("smollm2-relu", pi2_model_smollm2_relu)
    assert plugins.models == {"smollm2-relu": PATH}


def test_every_checksum_is_right_and_the_activation_is_relu():
    model = open_model(PATH, MmapTier(), verify=True)
    assert model.verified
    assert (model.architecture.family, model.architecture.activation) == ("llama", "relu")


def test_all_files_together_have_at_most_95_megabytes():
    assert sum(file.stat().st_size for file in Path(PATH).iterdir()) <= 95e6


@pytest.mark.parametrize(("question", "word"), [("What is the capital of France?", "Paris")])
def test_it_answers_in_coherent_english(engine, question, word):
    text, stats = answer(engine, question)
    assert word in text
    assert stats.stop_reason == "eos"
    assert text[0].isupper()
    assert text.rstrip()[-1] in ".!"


def test_less_than_half_of_the_neurons_are_active(engine):
    _, stats = answer(engine, "Tell me about the moon.")
    assert 0.05 < stats.density < 0.5
