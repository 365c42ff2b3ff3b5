"""Keys and values of the tokens seen so far."""

from __future__ import annotations

import numpy as np

from pi2.architecture import Architecture
from pi2.errors import BudgetError
from pi2.tensor import F32

_FIRST = 256  # tokens of room to begin with; then it doubles


def kv_bytes(arch: Architecture, tokens: int) -> int:
    """Memory that keys and values of so many tokens take."""
    return arch.n_layers * 2 * arch.n_kv_heads * tokens * arch.head_dim * 4


class KvCache:
    """Grows with the context, up to ``limit`` tokens.  Belongs to the fixed region of memory."""

    def __init__(self, arch: Architecture, limit: int | None = None) -> None:
        self.limit = min(limit or arch.max_context, arch.max_context)
        self.length = 0
        """Tokens that every layer has seen."""
        self._arch = arch
        self._room = 0
        self._store: F32 = np.empty((arch.n_layers, 2, arch.n_kv_heads, 0, arch.head_dim), np.float32)
        self.reserve(min(_FIRST, self.limit))

    @property
    def nbytes(self) -> int:
        return int(self._store.nbytes)

    def reserve(self, length: int) -> None:
        """Make room for ``length`` tokens in all.  Raises BudgetError beyond ``limit``."""
        if length > self.limit:
            raise BudgetError(
                f"the text needs {length} tokens of context, there is room for {self.limit}",
                hint="shorten the prompt or --max-tokens, or raise --context if the model allows it",
            )
        if length > self._room:
            room = min(self.limit, max(length, 2 * self._room))
            shape = (*self._store.shape[:3], room, self._arch.head_dim)
            grown = np.zeros(shape, np.float32)
            grown[:, :, :, : self.length] = self._store[:, :, :, : self.length]
            self._store, self._room = grown, room

    def layer(self, layer: int) -> tuple[F32, F32]:
        """All room for keys and values of a layer, (kv_heads, room, head_dim) each, C-contiguous."""
        return self._store[layer, 0], self._store[layer, 1]

    def append(self, layer: int, keys: F32, values: F32, start: int | None = None) -> tuple[F32, F32]:
        """Write (kv_heads, n, head_dim) from position ``start`` on; return the layer's until their end.

        ``start`` None: behind ``length``, which itself moves once a token's last layer is done: ``advance``.
        """
        start = self.length if start is None else start
        end = start + keys.shape[1]
        all_keys, all_values = self.layer(layer)
        all_keys[:, start:end] = keys
        all_values[:, start:end] = values
        return all_keys[:, :end], all_values[:, :end]

    def advance(self, n: int) -> None:
        self.length += n

    def truncate(self, length: int) -> None:
        """Forget all tokens from ``length`` on."""
        self.length = min(self.length, length)
