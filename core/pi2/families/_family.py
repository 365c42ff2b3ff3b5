"""What a family of models is: how its configuration reads, and what its tensors are called."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pi2.architecture import Architecture

_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One module of this package assigns one of these to ``FAMILY``; nothing else knows the family."""

    name: str
    architectures: tuple[str, ...]
    """Hugging Face's class names, as in the key ``architectures`` of config.json."""
    gguf: tuple[str, ...] = ()
    """Values of GGUF's ``general.architecture``."""
    gguf_permuted: bool = False
    """GGUF stores the rows of q and k with the halves of each head interleaved."""
    configure: Callable[[Mapping[str, Any]], Architecture]
    """From the keys of Hugging Face's config.json.  Raises FormatError, UnsupportedModel."""
    names: Mapping[str, str]
    """Canonical name (``pi2.inventory``) -> Hugging Face's; ``{N}`` stands for the layer in both."""
    norm_offset: float = 0.0
    """Added to the norm weights of a Hugging Face file, which stores w - 1; GGUF stores w."""
    position_offset: int = 0
    """Rows of Hugging Face's learned position matrix that lie before position 0."""

    def foreign(self, name: str) -> str:
        """Hugging Face's name of the tensor with this canonical name."""
        layer = _LAYER.match(name)
        if layer is None:
            return self.names[name]
        template = self.names["layers.{N}." + name[layer.end() :]]
        return template.replace("{N}", layer[1])
