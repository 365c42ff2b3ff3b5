"""Keys and values of the tokens seen so far."""

from __future__ import annotations

import mmap
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi2.architecture import Architecture
from pi2.errors import BudgetError
from pi2.tensor import F32

KvDType = type[np.float32] | type[np.float16]
Kv = NDArray[np.floating[Any]]
_UNRESERVED = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # in mmap since 3.13


def kv_bytes(arch: Architecture, tokens: int, dtype: KvDType = np.float32) -> int:
    """Memory that keys and values of so many tokens take: whole pages for every head of a layer."""
    head = tokens * arch.head_dim * np.dtype(dtype).itemsize
    pages = -(-head // mmap.PAGESIZE) + 1  # it need not begin at a page
    return arch.n_layers * 2 * arch.n_kv_heads * pages * mmap.PAGESIZE if tokens > 0 else 0


class KvCache:
    """Room for ``limit`` tokens in memory that the system hands out page by page as tokens come.

    So it grows without being copied, and takes what is used.  Belongs to the fixed region of memory.
    ``dtype`` is what the backend asks for (``Backend.kv_dtype``).  Raises BudgetError if the system cannot
    even number so many pages.
    """

    def __init__(self, arch: Architecture, limit: int | None = None, dtype: KvDType = np.float32) -> None:
        self.limit = min(limit or arch.max_context, arch.max_context)
        self.length = 0
        """Tokens that every layer has seen."""
        self._arch = arch
        self._dtype = dtype
        self._most = 0  # tokens that there has been room for
        shape = (2, arch.n_kv_heads, self.limit, arch.head_dim)
        self._layers = [_untouched(shape, dtype) for _ in range(arch.n_layers)]

    @property
    def nbytes(self) -> int:
        """Memory taken so far: pages that were written to once stay."""
        return self.nbytes_for(self._most)

    def nbytes_for(self, context: int) -> int:
        """Memory that ``context`` tokens take, ``limit`` at most."""
        return kv_bytes(self._arch, min(context, self.limit), self._dtype)

    def reserve(self, length: int) -> None:
        """Make room for ``length`` tokens in all.  Raises BudgetError beyond ``limit``."""
        if length > self.limit:
            raise BudgetError(
                f"the text needs {length} tokens of context, there is room for {self.limit}",
                hint="shorten the prompt or --max-tokens, or raise --context if the model allows it",
            )
        self._most = max(self._most, length)

    def layer(self, layer: int) -> tuple[Kv, Kv]:
        """All room for keys and values of a layer, (kv_heads, room, head_dim) each, C-contiguous."""
        keys, values = self._layers[layer]
        return keys, values

    def append(self, layer: int, keys: F32, values: F32, start: int | None = None) -> tuple[Kv, Kv]:
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


def _untouched(shape: tuple[int, ...], dtype: KvDType) -> Kv:
    """Zeros that take memory once they are written to, and then in small pages only."""
    count = int(np.prod(shape, dtype=object))
    nbytes = max(1, count * np.dtype(dtype).itemsize)
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _UNRESERVED)
    except (OSError, OverflowError, ValueError):
        raise BudgetError(
            f"this system cannot map a KV cache of {shape[2]} tokens", hint="set --context to what you need"
        ) from None
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    values: Kv = np.frombuffer(pages, dtype, count)
    return values.reshape(shape)
