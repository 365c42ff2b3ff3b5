"""Text files as sequences of tokens: what statistics are counted on and predictors are judged with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pi2.errors import OptionError, StorageError
from pi2.text import TextTokenizer


@dataclass(frozen=True, slots=True)
class TextFile:
    """A text, cut into sequences of the same length; the rest of less than a sequence is left out."""

    path: Path
    sha256: str
    sequences: NDArray[np.int64]
    """(sequences, tokens)"""


def read_texts(paths: Sequence[Path], tokenizer: TextTokenizer, sequence: int) -> Iterator[TextFile]:
    """Read and tokenise each file, without special tokens.

    Raises StorageError if one cannot be read, OptionError if one is not UTF-8, is given twice, or is
    shorter than a sequence.
    """
    seen: dict[str, Path] = {}
    for path in paths:
        sha256, text = read_text(path, seen)
        ids = np.array(tokenizer.encode(text, special=False, bos=False), np.int64)
        whole = len(ids) // sequence
        if not whole:
            raise OptionError(
                f"{path} has {len(ids)} tokens, a sequence takes {sequence}",
                hint="give a longer text, or join small files into one with cat",
            )
        yield TextFile(path, sha256, ids[: whole * sequence].reshape(whole, sequence))


def read_text(path: Path, seen: dict[str, Path]) -> tuple[str, str]:
    """SHA-256 and text of a file; enters it into ``seen``, the files by SHA-256.

    Raises StorageError if it cannot be read, OptionError if it is not UTF-8 or one of ``seen``.
    """
    data = _bytes(path)
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 in seen:
        raise OptionError(f"{path} and {seen[sha256]} are the same text", hint="give each text once")
    seen[sha256] = path
    try:
        return sha256, data.decode()
    except UnicodeDecodeError as e:
        raise OptionError(f"{path} is not UTF-8 at byte {e.start}", hint="convert it with iconv") from None


def opening(tokenizer: TextTokenizer) -> list[int]:
    """What stands before every sequence: the begin-of-text token, or nothing in models without one."""
    return tokenizer.encode("", bos=True)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise StorageError(e.strerror or str(e), path=path, hint="check the path") from None
