"""Between text and token ids: the tokenizer, streaming back to text, and stop texts.

A token is not a text: a character may be spread over several (byte-level BPE, byte fallback), and how a
token reads depends on its neighbours.  :class:`Stream` gives out only what no later token can change.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from pi2.errors import FormatError, OptionError

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>\Z")
_REPLACEMENT = "\ufffd"  # what a decoder makes of bytes that are not UTF-8, or not yet


class TextTokenizer:
    """A tokenizer of the ``tokenizers`` library, read from the text of its tokenizer.json.

    Padding and truncation that the file may ask for are switched off.  Raises FormatError.
    """

    def __init__(self, json_text: str) -> None:
        self._tokenizer = _parse(json_text)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        """Control tokens, which are no part of the text unless asked for."""
        decoder = self._tokenizer.decoder
        self._byte_fallback = decoder is not None and b'"ByteFallback"' in decoder.__getstate__()

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the added ones included; a model's logits may be padded beyond it."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, special: bool = True, bos: bool) -> list[int]:
        """Token ids of ``text``.

        ``special``: control tokens spelt out in the text count as such, else they are plain text.
        ``bos``: add what the tokenizer's own post-processor puts around a text, usually one BOS, and
        nothing for models that have none.  Raises OptionError if ``text`` holds lone surrogates.
        """
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise OptionError(
                f"character {e.start} of the text is not Unicode", hint="give the text as UTF-8"
            ) from None
        tokenizer = self._tokenizer if special else self._literal
        ids: list[int] = _guarded(lambda: tokenizer.encode(text, add_special_tokens=bos).ids, "encode a text")
        return ids

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of ``ids``, with or without control tokens.  Ids beyond the vocabulary read as nothing."""
        known = [i for i in ids if 0 <= i < 1 << 32]
        text: str = _guarded(
            lambda: self._tokenizer.decode(known, skip_special_tokens=not special), "decode tokens"
        )
        return text

    def token_text(self, token: int) -> str:
        """How the vocabulary spells a token ("Ġthe", "<0x0A>").  Raises OptionError if it has no such id."""
        if token not in self:
            raise OptionError(f"the vocabulary has no token {token}")
        return str(self._tokenizer.id_to_token(token))

    def id_of(self, text: str) -> int | None:
        """The id of the token that is spelt so, if there is one."""
        token: int | None = self._tokenizer.token_to_id(text)
        return token

    def __contains__(self, token: int) -> bool:
        """Whether the vocabulary has this id."""
        return 0 <= token < 1 << 32 and self._tokenizer.id_to_token(token) is not None

    def is_byte(self, token: int) -> bool:
        """Whether a token is one byte of a character that the vocabulary lacks (SentencePiece's fallback)."""
        return self._byte_fallback and _BYTE_TOKEN.match(self.token_text(token)) is not None

    @cached_property
    def _literal(self) -> Tokenizer:
        """The same tokenizer, blind to control tokens; a second one, so that both may be used at once."""
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.encode_special_tokens = True
        return tokenizer


def _parse(json_text: str) -> Tokenizer:
    tokenizer: Tokenizer = _guarded(lambda: Tokenizer.from_str(json_text), "read tokenizer.json")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _guarded(call: Callable[[], Any], doing: str) -> Any:
    """Run a call into the library, which reports bad tokenizers by Exception and by Rust panics."""
    try:
        return call()
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        reason = str(e).splitlines()[0][:200] if str(e) else type(e).__name__
        raise FormatError(
            f"the tokenizer cannot {doing}: {reason}", hint="the model's tokenizer.json is damaged or too new"
        ) from None


class Stream:
    """Turns tokens into text as they come.  The pieces, with ``finish()``, add up to ``decode(all ids)``.

    Held back are incomplete characters, and runs of byte tokens: a byte that turns out not to be UTF-8
    makes the decoder reject its whole run.  Control tokens read as nothing, unless ``special``.
    """

    def __init__(self, tokenizer: TextTokenizer, *, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._window: list[int] = []  # the last ids; the first of them only give context to the others
        self._context = 0  # how many of them have been given out in full
        self._done = 0  # characters of the window's text that have been given out

    def push(self, token: int) -> str:
        """Add a token; return the text that is now certain, perhaps none."""
        if token not in self._tokenizer or (token in self._tokenizer.special_ids and not self._special):
            return ""  # the decoder leaves these out
        self._window.append(token)
        if self._tokenizer.is_byte(token):
            return ""
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT):
            return self._advance(text[:-1])
        piece = self._advance(text)
        if piece:
            self._shorten()
        return piece

    def finish(self) -> str:
        """The text held back: no more tokens will come.  Incomplete characters read as U+FFFD."""
        return self._advance(self._decode(self._window))

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, special=self._special)

    def _advance(self, certain: str) -> str:
        piece = certain[self._done :]
        self._done += len(piece)
        return piece

    def _shorten(self) -> None:
        """Keep only the ids that gave the last piece: decoders treat the start of a text specially."""
        self._window = self._window[self._context :]
        self._context = len(self._window)
        self._done = len(self._decode(self._window))


class StopStrings:
    """Ends a text before the first stop string, however the text is cut into pieces.

    The first is the one complete first; of those complete at the same character, the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._stopped = False

    def feed(self, text: str) -> tuple[str, bool]:
        """Add text; return what may be given out, and whether the end was met.  Nothing comes after it."""
        if self._stopped or not text:
            return "", self._stopped
        self._held += text
        hits = [(at + len(s), at) for s in self._stops if (at := self._held.find(s)) >= 0]
        if hits:
            cut = min(hits)[1]
            self._stopped = True
        else:
            cut = len(self._held) - self._open_end()
        piece, self._held = self._held[:cut], self._held[cut:]
        return piece, self._stopped

    def finish(self) -> str:
        """The text held back, which turned out to be no stop string."""
        rest = "" if self._stopped else self._held
        self._held = ""
        return rest

    def _open_end(self) -> int:
        """Length of the longest end of the held text that could become a stop string."""
        longest = max((len(s) - 1 for s in self._stops), default=0)
        for n in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-n:]) for s in self._stops):
                return n
        return 0
