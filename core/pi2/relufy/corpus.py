"""Texts to train on: plain files, and conversations rendered by the model's chat template.

A file called ``*.jsonl`` has an object a line: {"text": ...}, or {"messages": [...]} with messages that
are {"role": ..., "content": ...}.  With "verbatim": true the answers are learnt as they are written, where
otherwise the original's distribution is learnt.  The end of every text is kept for measuring.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi2.errors import OptionError
from pi2.text import TextTokenizer
from pi2.text_files import opening, read_text

Render = Callable[[Sequence[dict[str, str]], bool], str]
"""Messages, and whether an answer is to follow -> text of the conversation."""

ANSWER, VERBATIM = 1, 2
_PORTION = 1 << 16  # characters that are tokenized at a time: the tokenizer takes 100 bytes for each
_HELD_OUT_SHARE = 5  # at most a fifth of a text is held out


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens that belong together.  ``answers`` is ANSWER or VERBATIM where the *next* token is of one."""

    ids: NDArray[np.int64]
    answers: NDArray[np.int8]

    def cut(self, start: int, end: int) -> Document:
        answers = self.answers[start:end].copy()
        answers[-1:] = 0  # its next token is not there
        return Document(self.ids[start:end], answers)


@dataclass(frozen=True, slots=True)
class Row:
    """Documents packed into one row of T tokens; a token sees only its own document.  All are (T,)."""

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    documents: NDArray[np.int64]
    answers: NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class Text:
    """A file: what is trained on, and what is held out."""

    path: Path
    sha256: str
    whole: bool
    """Whether documents are used whole (conversations), not as pieces from random places (plain text)."""
    documents: list[Document]
    held_out: list[Document] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(d.ids) for d in self.documents)


def pack(documents: Sequence[Document]) -> Row:
    """One row of all ``documents``."""
    lengths = [len(d.ids) for d in documents]
    return Row(
        np.concatenate([d.ids for d in documents]),
        np.concatenate([np.arange(n) for n in lengths]),
        np.repeat(np.arange(len(documents)), lengths),
        np.concatenate([d.answers for d in documents]),
    )


def read_corpus(
    paths: Sequence[Path], tokenizer: TextTokenizer, render: Render | None, held_out: int, sequence: int
) -> list[Text]:
    """Read all texts and set ``held_out`` tokens aside, as many of each.

    Raises StorageError and OptionError that name the file, and the line, if one is of no use.
    """
    seen: dict[str, Path] = {}
    texts = []
    for path in paths:
        sha256, text = read_text(path, seen)
        whole = path.suffix == ".jsonl"
        documents = list(_lines(path, text, tokenizer, render)) if whole else [_plain(text, tokenizer)]
        documents = [d for d in documents if len(d.ids) > 1]
        texts.append(_split(Text(path, sha256, whole, documents), held_out // len(paths), sequence))
    return texts


def _plain(text: str, tokenizer: TextTokenizer) -> Document:
    """Tokenized in portions that end at a line's end, so that memory stays small."""
    ids: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    start = 0
    while start < len(text):
        end = text.find("\n", start + _PORTION) + 1 or len(text)
        ids.append(np.array(tokenizer.encode(text[start:end], special=False, bos=False), np.int64))
        start = end
    joined = np.concatenate(ids)
    return Document(joined, np.zeros(len(joined), np.int8))


def _lines(path: Path, text: str, tokenizer: TextTokenizer, render: Render | None) -> Iterator[Document]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            raw = json.loads(line)
        except (ValueError, RecursionError):
            raise OptionError(f"{where} is not JSON", hint="a .jsonl file has one object a line") from None
        if isinstance(raw, dict) and isinstance(raw.get("text"), str):
            yield begin(_plain(raw["text"], tokenizer), tokenizer)
            continue
        yield _conversation(_messages(raw, where), raw.get("verbatim") is True, tokenizer, render, where)


def _messages(raw: Any, where: str) -> list[dict[str, str]]:
    messages = raw.get("messages") if isinstance(raw, dict) else None
    good = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not good or not messages:
        raise OptionError(
            f"{where} has neither a text nor messages",
            hint='write {"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}',
        )
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _conversation(
    messages: list[dict[str, str]],
    verbatim: bool,
    tokenizer: TextTokenizer,
    render: Render | None,
    where: str,
) -> Document:
    """The rendered conversation; its answers are what follows where the template would ask for one."""
    if render is None:
        raise OptionError(
            f"{where} is a conversation", hint="the model has no chat template: give plain text"
        )

    def encode(part: Sequence[dict[str, str]], asking: bool) -> list[int]:
        return tokenizer.encode(render(part, asking), bos=False)

    ids = encode(messages, False)
    answers = np.zeros(len(ids), np.int8)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = encode(messages[:i], True), encode(messages[: i + 1], False)
        if before and ids[: len(before)] == before and ids[: len(after)] == after:
            answers[len(before) - 1 : len(after) - 1] = VERBATIM if verbatim else ANSWER
    return Document(np.array(ids, np.int64), answers)


def _split(text: Text, held_out: int, sequence: int) -> Text:
    """Move the end of ``text`` to what is held out, in documents of at most a sequence."""
    wanted = min(held_out, text.tokens // _HELD_OUT_SHARE)
    if wanted < 16:
        raise OptionError(
            f"{text.path} has {text.tokens} tokens, too few to hold some out",
            hint="give a longer text, or join small files into one with cat",
        )
    kept, ends = list(text.documents), []
    while wanted > 0:
        last = kept.pop()
        if not text.whole and len(last.ids) > wanted:
            kept.append(last.cut(0, len(last.ids) - wanted))
            last = last.cut(len(last.ids) - wanted, len(last.ids))
        ends += [last.cut(i, i + sequence) for i in range(0, len(last.ids) - 1, sequence)]
        wanted -= len(last.ids)
    if not kept:
        raise OptionError(f"{text.path} has only one document", hint="give more, or a plain text")
    return Text(text.path, text.sha256, text.whole, kept, ends)


def begin(document: Document, tokenizer: TextTokenizer) -> Document:
    """``document`` behind the model's begin-of-text token, if it has one; conversations have theirs."""
    before = np.array(opening(tokenizer), np.int64)
    zeros = np.zeros(len(before), np.int8)
    return Document(np.concatenate((before, document.ids)), np.concatenate((zeros, document.answers)))
