"""Tokenizers, streaming and stop strings, on small tokenizers of both great kinds, made here."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pi2.errors import FormatError, OptionError
from pi2.text import StopStrings, Stream, TextTokenizer
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

quick = settings(deadline=None, max_examples=150)
CORPUS = [
    "the cat sat on the mat",
    " the  dog, 3.14!\n",
    "naïve café 你好 🙂🙃 ÷ é",
    "\t\tdef f(x):\r\n    return x",
]
KINDS = ["byte-level", "spm-strip", "spm-keep", "metaspace"]


@cache
def build(kind: str) -> Tokenizer:
    """byte-level: GPT-2, Llama 3, Qwen.  spm-strip: Llama 2.  spm-keep: Gemma 3.  metaspace: T5."""
    control = [AddedToken(t, special=True) for t in ("<s>", "</s>", "<|end|>")]
    if kind == "byte-level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(CORPUS * 3, trainer)
    else:
        tokenizer = Tokenizer(models.BPE(vocab=spm_vocab(), merges=[], byte_fallback=True, unk_token="<unk>"))
        steps = [normalizers.Prepend("▁")] if kind != "spm-keep" else []
        if kind == "metaspace":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
            tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
        else:
            tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
            tail = [decoders.Strip(" ", 1, 0)] if kind == "spm-strip" else []
            head = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            tokenizer.decoder = decoders.Sequence(head + tail)
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens([AddedToken("  "), AddedToken("<think>")])
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    return tokenizer


def spm_vocab() -> dict[str, int]:
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += [*"▁abcdefghij.,!\n", "▁the", "▁▁", "▁▁▁▁", "cat", "\ufffd", "é", "你"]
    return {piece: i for i, piece in enumerate(pieces)}


@cache
def text_tokenizer(kind: str) -> TextTokenizer:
    return TextTokenizer(build(kind).to_str())


def streamed(tokenizer, ids, **options):
    stream = Stream(tokenizer, **options)
    pieces = [stream.push(i) for i in ids]
    return [*pieces, stream.finish()]


@st.composite
def token_ids(draw, kind):
    """Any ids, with many bytes of characters, whole and broken, and ids beyond the vocabulary."""
    tokenizer = text_tokenizer(kind)
    size = tokenizer.vocab_size
    text = st.text(st.sampled_from("a é你🙂🙃\ufffd ÿ\n")).map(lambda t: tokenizer.encode(t, bos=False))
    anything = st.lists(st.integers(0, size + 5), max_size=8)
    parts = draw(st.lists(st.one_of(text, anything), max_size=5))
    ids = [i for part in parts for i in part]
    cut = draw(st.integers(0, len(ids)))
    return ids[cut:] if draw(st.booleans()) else ids[:cut]


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(data=st.data())
def test_the_pieces_of_a_stream_add_up_to_the_decoded_text(kind, data):
    tokenizer, special = text_tokenizer(kind), data.draw(st.booleans())
    ids = data.draw(token_ids(kind))
    assert "".join(streamed(tokenizer, ids, special=special)) == tokenizer.decode(ids, special=special)


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(data=st.data())
def test_a_stream_gives_out_only_what_every_continuation_keeps(kind, data):
    tokenizer = text_tokenizer(kind)
    ids, more = data.draw(token_ids(kind)), data.draw(token_ids(kind))
    certain = "".join(streamed(tokenizer, ids)[:-1])
    assert tokenizer.decode(ids + more).startswith(certain)


@pytest.mark.parametrize("kind", ["byte-level", "spm-strip"])
def test_a_character_comes_whole_and_as_soon_as_it_is_certain(kind):
    tokenizer = text_tokenizer(kind)
    ids = tokenizer.encode("a🙃a", bos=False)
    pieces = streamed(tokenizer, ids)
    assert [p for p in pieces if p] in (["a", "🙃", "a"], ["a", "🙃a"])  # a byte run ends with its successor
    assert pieces[-1] == ""


def test_an_answer_that_ends_inside_a_character_ends_with_a_replacement():
    tokenizer = text_tokenizer("byte-level")
    ids = tokenizer.encode("a🙃", bos=False)[:-1]
    assert streamed(tokenizer, ids)[-1] == "\ufffd"


@pytest.mark.parametrize("kind", ["byte-level", "spm-keep"])  # the others prepend spaces
@quick
@given(text=st.text(st.sampled_from("abc é你🙂\n.,the")))
def test_decoding_undoes_encoding(kind, text):
    tokenizer = text_tokenizer(kind)
    assert tokenizer.decode(tokenizer.encode(text, bos=True)).strip() == text.strip()


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_in_a_text_count_only_if_asked_for(kind):
    tokenizer = text_tokenizer(kind)
    end = tokenizer.id_of("<|end|>")
    assert end in tokenizer.special_ids
    assert end in tokenizer.encode("a<|end|>", bos=False)
    literal = tokenizer.encode("a<|end|>", special=False, bos=False)
    assert end not in literal
    assert end in tokenizer.encode("a<|end|>", bos=False)  # the two ways do not disturb each other
    if kind == "byte-level":
        assert tokenizer.decode(literal) == "a<|end|>"


def test_bos_is_what_the_post_processor_adds():
    tokenizer = text_tokenizer("byte-level")
    plain = tokenizer.encode("cat", bos=False)
    assert tokenizer.encode("cat", bos=True) == [tokenizer.id_of("<s>"), *plain]
    assert tokenizer.decode(tokenizer.encode("cat", bos=True)) == "cat"
    assert tokenizer.decode(tokenizer.encode("cat", bos=True), special=True) == "<s>cat"


def test_padding_and_truncation_of_the_file_do_not_reach_the_prompt():
    inner = Tokenizer.from_str(build("byte-level").to_str())
    inner.enable_truncation(2)
    inner.enable_padding(length=50)
    ids = TextTokenizer(inner.to_str()).encode("the cat sat on the mat", bos=False)
    assert ids == text_tokenizer("byte-level").encode("the cat sat on the mat", bos=False)


def test_tokens_have_texts_and_texts_ids():
    tokenizer = text_tokenizer("spm-strip")
    assert tokenizer.token_text(tokenizer.id_of("▁the")) == "▁the"
    assert tokenizer.id_of("no such token") is None
    assert tokenizer.is_byte(tokenizer.id_of("<0x41>"))
    assert not tokenizer.is_byte(tokenizer.id_of("cat"))
    for token in (-1, tokenizer.vocab_size, 1 << 40):
        with pytest.raises(OptionError, match=f"no token {token}"):
            tokenizer.token_text(token)


def test_text_that_is_not_unicode_is_refused():
    with pytest.raises(OptionError, match="character 2 of the text is not Unicode"):
        text_tokenizer("byte-level").encode("ab\udcff", bos=True)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": 3}', "[" * 100_000, "\ud800"])
def test_a_text_that_is_no_tokenizer_is_refused(text):
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        TextTokenizer(text)


def broken(change) -> str:
    raw = json.loads(build("byte-level").to_str())
    change(raw)
    return json.dumps(raw)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.pop("model"),
        lambda raw: raw["model"].update(type="Unheard"),
        lambda raw: raw["model"].update(vocab={"a": -1}),
        lambda raw: raw["model"].update(merges=[["never", "heard"]]),
        lambda raw: raw.update(decoder={"type": "Unheard"}),
        lambda raw: raw.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}}),
        lambda raw: raw.update(version="9.0"),
    ],
)
def test_a_damaged_tokenizer_is_refused(change):
    with pytest.raises(FormatError, match=r"tokenizer"):
        TextTokenizer(broken(change))


def test_a_tokenizer_that_fails_at_work_is_a_clear_error():
    raw = json.loads(build("spm-strip").to_str())
    raw["model"].update(vocab={"a": 0}, byte_fallback=False, unk_token="<gone>")
    raw["added_tokens"], raw["post_processor"] = [], None
    with pytest.raises(FormatError, match="cannot encode a text"):
        TextTokenizer(json.dumps(raw)).encode("zebra", bos=True)


STOPS = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=3)


@quick
@given(stops=STOPS, text=st.text("ab\n", max_size=30), cuts=st.lists(st.integers(0, 30), max_size=6))
def test_a_text_ends_before_its_first_stop_string_however_it_is_cut(stops, text, cuts):
    ends = [(at + len(s), at) for s in stops if (at := text.find(s)) >= 0]
    expected = text[: min(ends)[1]] if ends else text
    places = sorted({0, len(text), *(min(c, len(text)) for c in cuts)})
    stopper, given_out, stopped = StopStrings(stops), "", False
    for a, b in pairwise(places):
        piece, stopped = stopper.feed(text[a:b])
        given_out += piece
        assert expected.startswith(given_out)
        if not stopped:  # nothing is withheld that cannot become a stop string
            withheld = text[:b][len(given_out) :]
            assert not withheld or any(s.startswith(withheld) for s in stops)
    assert stopped == bool(ends)
    assert given_out + stopper.finish() == expected


def test_nothing_comes_after_the_stop():
    stopper = StopStrings(("END",))
    assert stopper.feed("xEN") == ("x", False)
    assert stopper.feed("Dy") == ("", True)
    assert stopper.feed("more") == ("", True)
    assert stopper.finish() == ""
