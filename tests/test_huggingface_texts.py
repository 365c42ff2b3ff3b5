"""What stands beside the weights in Hugging Face's layout: configuration, tokenizer, chat template."""

import json

import pytest
from huggingface_files import LLAMA, write
from pi2.errors import FormatError
from pi2.formats.huggingface import HuggingFaceFormat


def load(path):
    return HuggingFaceFormat.open().load(path)


def change_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_tokenizer_model_alone_is_refused_with_the_way_to_convert_it(tmp_path):
    path = write(tmp_path / "m", LLAMA)
    (path / "tokenizer.json").rename(path / "tokenizer.model")
    with pytest.raises(FormatError, match=r"no tokenizer\.json") as e:
        load(path)
    assert "AutoTokenizer" in e.value.hint


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    path = write(tmp_path / "m", LLAMA)
    raw = json.loads((path / "tokenizer.json").read_text())
    raw["model"]["vocab"] = {f"w{i}": i for i in range(51)} | {"a": 51}
    (path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(FormatError, match="knows 52 tokens, the model only 50"):
        load(path)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[1]", b"{", b'{"a": NaN}', b"[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(tmp_path, content):
    path = write(tmp_path / "m", LLAMA)
    (path / "config.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"config\.json"):
        load(path)


def test_a_config_of_absurd_size_is_refused(tmp_path):
    path = write(tmp_path / "m", LLAMA)
    (path / "config.json").write_bytes(b" " * (1 << 23))
    with pytest.raises(FormatError, match="more than"):
        load(path)


NAMED = [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]


@pytest.mark.parametrize(
    ("given", "expected"),
    [("S", "S"), (None, None), (NAMED, "D"), (NAMED[:1], "T"), ([], None)],
)
def test_the_chat_template_of_the_tokenizer_is_found(tmp_path, given, expected):
    path = write(tmp_path / "m", LLAMA)
    assert load(path).chat_template() is None
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": given}))
    assert load(path).chat_template() == expected
    (path / "chat_template.jinja").write_text("J")
    assert load(path).chat_template() == "J"


@pytest.mark.parametrize("given", [3, [1], [{"name": "x"}]])
def test_a_chat_template_that_is_no_template_is_refused(tmp_path, given):
    path = write(tmp_path / "m", LLAMA)
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": given}))
    with pytest.raises(FormatError, match="chat_template"):
        load(path)


def test_generation_settings_come_before_the_configuration(tmp_path):
    path = write(tmp_path / "m", LLAMA)
    assert load(path).architecture.eos_ids == (2,)
    (path / "generation_config.json").write_text('{"eos_token_id": [3, 2], "bos_token_id": 1}')
    arch = load(path).architecture
    assert (arch.bos_id, arch.eos_ids) == (1, (3, 2))
    (path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert load(path).architecture.eos_ids == (2,)


@pytest.mark.parametrize("value", [-1, "</s>", 1.5, [2, None], [[2]], True, 1 << 30])
def test_an_impossible_end_of_text_is_refused(tmp_path, value):
    path = write(tmp_path / "m", LLAMA)
    change_config(path, eos_token_id=value)
    with pytest.raises(FormatError, match="eos_token_id"):
        load(path)


def test_an_end_of_text_beyond_the_vocabulary_is_refused(tmp_path):
    path = write(tmp_path / "m", LLAMA)
    change_config(path, eos_token_id=50)
    with pytest.raises(FormatError, match="outside of the vocabulary"):
        load(path)
