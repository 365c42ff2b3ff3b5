"""How text is cut into words before byte-level BPE, by GGUF's ``tokenizer.ggml.pre``.

The expressions are those of the models' own tokenizer.json; where there are several, each cuts what the
ones before it have left.  llama.cpp calls some by more than one name.
"""

from __future__ import annotations

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cl100k(digits: str) -> str:
    """The expression of tiktoken's cl100k_base, with ``digits`` in a number's piece."""
    word, marks = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*"
    return rf"{_CONTRACTION}|{word}|\p{{N}}{digits}|{marks}|{_SPACES}"


def _cased(digits: str, suffix: str) -> str:
    """The expression of tiktoken's o200k_base: words also end where a capital letter begins another."""
    word = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{word}{_UPPER}*{_LOWER}+{suffix}|{word}{_UPPER}+{_LOWER}*{suffix}"
        rf"|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


_LLAMA3 = "dbrx falcon3 llama-bpe llama-v3 llama3 smaug-bpe"
_ONE_DIGIT = "codeshell command-r exaone minerva-7b refact smollm starcoder"
_PLAIN = "a.x-4.0 exaone4 gigachat gpt-2 mellum mpt olmo phi-2 trillion"
_QWEN2 = "deepseek-r1-qwen hunyuan kormo megrez qwen2 stablelm2"

SPLITS: dict[str, tuple[str, ...]] = {
    # What llama.cpp does with files that do not say.
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    **dict.fromkeys(_PLAIN.split(), (_GPT2,)),
    **dict.fromkeys(_ONE_DIGIT.split(), (r"\p{N}", _GPT2)),
    **dict.fromkeys(_LLAMA3.split(), (_cl100k("{1,3}"),)),
    **dict.fromkeys(_QWEN2.split(), (_cl100k(""),)),
    "tekken": (_cased("", ""),),
    "gpt-4o": (_cased("{1,3}", f"{_CONTRACTION}?"),),
}
"""Name -> regular expressions, one after the other."""

KEEPS_WHOLE_WORDS = frozenset(["falcon3", "llama-bpe", "llama-v3", "llama3", "tekken"])
"""A word that is a token is taken as it is, even if no merges lead to it."""

ADDS_BOS = KEEPS_WHOLE_WORDS
"""BOS goes before the text unless the file says otherwise."""
