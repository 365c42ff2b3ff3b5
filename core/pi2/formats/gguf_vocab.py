"""Tokenizers out of the vocabularies inside of GGUF files, in the format of the ``tokenizers`` library.

Two kinds cover all families here: "gpt2" is byte-level BPE with its merges, "llama" is SentencePiece's BPE,
whose merges follow from the scores of the pieces.  Both give the tokens that llama.cpp gives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pi2.errors import FormatError, UnsupportedModel
from pi2.formats.gguf_metadata import Metadata
from pi2.formats.gguf_pretokenizers import ADDS_BOS, KEEPS_WHOLE_WORDS, SPLITS

_KEY = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BYTES = tuple(f"<0x{i:02X}>" for i in range(256))
# SentencePiece's own limit is 16 unless trained otherwise; the longest in use are runs of 31 spaces.
_MAX_PIECE = 256
# Tokens that end a turn or a text, whatever eos_token_id says; llama.cpp stops at them, too.
_END_NAMES = """
    <|eot_id|> <|im_end|> <|end|> <|end_of_turn|> <end_of_turn> <|endoftext|> <|end_of_text|> <|eom_id|> <eos>
"""
_ENDS = frozenset(_END_NAMES.split())


def tokenizer_json(meta: Metadata, vocab_size: int) -> str:
    """The content of a tokenizer.json.  ``vocab_size`` is the number of rows of the embedding.

    Raises UnsupportedModel for another kind of tokenizer or an unknown pre-tokenizer, FormatError for
    a vocabulary that contradicts itself.
    """
    kind = meta.text(f"{_KEY}model", "no_vocab")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModel(
            f"{meta.file}: tokenizers of the kind {kind[:40]!r} are not supported",
            hint="supported in GGUF files: gpt2 (byte-level BPE) and llama (SentencePiece BPE)",
        )
    tokens, types = _tokens(meta, vocab_size)
    described = _byte_level(meta, tokens) if kind == "gpt2" else _sentencepiece(meta, tokens, types)
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": _added(tokens, types),
            "post_processor": _post_processor(meta, tokens, kind),
            **described,
        },
        ensure_ascii=False,
    )


def end_ids(meta: Metadata) -> tuple[int, ...]:
    """Ids of the tokens that end a text or a turn, ascending."""
    named = (meta.optional_integer(f"{_KEY}{name}_token_id") for name in ("eos", "eot", "eom"))
    ids = {i for i in named if i is not None}
    if f"{_KEY}tokens" in meta and f"{_KEY}token_type" in meta:
        tokens = meta.strings(f"{_KEY}tokens")
        types = meta.numbers(f"{_KEY}token_type", len(tokens))
        pairs = enumerate(zip(tokens, types, strict=True))
        ids |= {i for i, (token, kind) in pairs if kind == _CONTROL and token in _ENDS}
    return tuple(sorted(ids))


def _tokens(meta: Metadata, vocab_size: int) -> tuple[list[str], list[int]]:
    stored = meta.strings(f"{_KEY}tokens")
    if not 0 < len(stored) <= vocab_size:
        raise FormatError(f"{meta.file}: {len(stored)} tokens for {vocab_size} rows of the embedding")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(stored)]
    if len(set(tokens)) != len(tokens):
        raise FormatError(f"{meta.file}: a token occurs twice in the vocabulary")
    if f"{_KEY}token_type" not in meta:
        return tokens, [_NORMAL] * len(tokens)
    return tokens, [int(x) for x in meta.numbers(f"{_KEY}token_type", len(tokens))]


def _added(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    """Tokens that are matched in the text before anything else; control tokens are special."""
    return [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": types[i] != _USER_DEFINED,
        }
        for i, token in enumerate(tokens)
        if types[i] in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]


def _post_processor(meta: Metadata, tokens: list[str], kind: str) -> dict[str, Any] | None:
    """Puts BOS before and EOS after the text, as far as the file asks for them."""
    sentencepiece = kind == "llama"
    adds_bos = sentencepiece or meta.text(f"{_KEY}pre", "default") in ADDS_BOS
    around: dict[str, dict[str, Any]] = {}
    for name, default, usual in (("bos", adds_bos, 1), ("eos", False, 2)):
        if meta.flag(f"{_KEY}add_{name}_token", default):
            at = meta.integer(f"{_KEY}{name}_token_id", usual if sentencepiece else None)
            around[name] = {"id": _token(meta, tokens, at), "ids": [at], "tokens": [tokens[at]]}
    if not around:
        return None

    def template(sequences: str) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        for type_id, sequence in enumerate(sequences):
            inner = {"Sequence": {"id": sequence, "type_id": type_id}}
            special = {k: {"SpecialToken": {"id": v["id"], "type_id": type_id}} for k, v in around.items()}
            parts += [p for p in (special.get("bos"), inner, special.get("eos")) if p]
        return parts

    return {
        "type": "TemplateProcessing",
        "single": template("A"),
        "pair": template("AB"),
        "special_tokens": {token["id"]: token for token in around.values()},
    }


def _token(meta: Metadata, tokens: list[str], index: int) -> str:
    if index >= len(tokens):
        raise FormatError(f"{meta.file}: the special token {index} is outside of the vocabulary")
    return tokens[index]


def _byte_level(meta: Metadata, tokens: list[str]) -> dict[str, Any]:
    """GPT-2's kind: text is split by regular expressions, bytes are spelt as letters, merges are given."""
    pre = meta.text(f"{_KEY}pre", "default")
    if pre not in SPLITS:
        raise UnsupportedModel(
            f"{meta.file}: the pre-tokenizer {pre[:40]!r} is not known",
            hint=f"convert the Hugging Face model instead; known here: {', '.join(sorted(SPLITS))}",
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = []
    stored = meta.strings(f"{_KEY}merges")
    if len(stored) > 8 * len(tokens):  # at most 2 per token in any known vocabulary
        raise FormatError(f"{meta.file}: {len(stored)} merges for {len(tokens)} tokens cannot be")
    for merge in stored:
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or not (left in vocab and right in vocab and left + right in vocab):
            raise FormatError(f"{meta.file}: the merge {merge[:40]!r} is not of tokens of the vocabulary")
        merges.append((left, right))
    bytes_as_letters = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    splits = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in SPLITS[pre]
    ]
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, bytes_as_letters]},
        "decoder": bytes_as_letters,
        "model": _bpe(vocab, merges, ignore_merges=pre in KEEPS_WHOLE_WORDS),
    }


def _sentencepiece(meta: Metadata, tokens: list[str], types: list[int]) -> dict[str, Any]:
    """SentencePiece's BPE: no splitting, a space is "▁", characters without a piece fall back to bytes."""
    prefix = meta.flag(f"{_KEY}add_space_prefix", True)
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = meta.integer(f"{_KEY}unknown_token_id", 0)
    has_bytes = all(token in vocab for token in _BYTES)
    merges = _merges_from_scores(meta, tokens, types, vocab)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    before = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    after: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        after.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, space]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": after},
        "model": _bpe(
            vocab, merges, unk_token=_token(meta, tokens, unknown), fuse_unk=True, byte_fallback=has_bytes
        ),
    }


def _merges_from_scores(
    meta: Metadata, tokens: list[str], types: list[int], vocab: dict[str, int]
) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, pieces of the best score first.

    SentencePiece joins the neighbours that make the piece of the best score; so does BPE with these merges.
    """
    scores = meta.numbers(f"{_KEY}scores", len(tokens))
    able = [i for i, kind in enumerate(types) if kind in (_NORMAL, _UNUSED)]
    able.sort(key=lambda i: -scores[i])
    merges: list[tuple[str, str]] = []
    for i in able:
        if len(tokens[i]) > _MAX_PIECE:
            raise FormatError(f"{meta.file}: a piece of {len(tokens[i])} characters cannot be")
        merges += _halves(tokens[i], vocab)
    return merges


def _halves(piece: str, vocab: dict[str, int]) -> Iterator[tuple[str, str]]:
    for cut in range(1, len(piece)):
        left, right = piece[:cut], piece[cut:]
        if left in vocab and right in vocab:
            yield left, right


def _bpe(vocab: dict[str, int], merges: list[tuple[str, str]], **changes: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
        **changes,
    }
