"""Logits from llama.cpp, through the C interface that the xllamacpp wheel exports.

Parameter structs are taken whole from llama.cpp's own defaults and passed on by value, so that only the
few fields set here must be where they are expected; their defaults are checked before they are set.
"""

import ctypes
import struct
from pathlib import Path

import numpy as np
import xllamacpp

_ROOM = 512  # bytes; more than either struct has. By-value structs of that size travel on the stack.
_F16, _F32 = 1, 0  # ggml_type


class _Params(ctypes.Structure):
    _fields_ = [("raw", ctypes.c_ubyte * _ROOM)]  # ctypes wants a list


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


@_LOG
def _quiet(level, text, data):
    """llama.cpp writes its log to stderr unless it is told where else to put it."""


def _library() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    lib.llama_log_set(_quiet, None)
    text = [ctypes.c_char_p, ctypes.c_int32]
    tokenize = [
        ctypes.c_void_p,
        *text,
        ctypes.POINTER(ctypes.c_int32),
        ctypes.c_int32,
        ctypes.c_bool,
        ctypes.c_bool,
    ]
    signatures = {
        "llama_model_default_params": (_Params, []),
        "llama_context_default_params": (_Params, []),
        "llama_model_load_from_file": (ctypes.c_void_p, [ctypes.c_char_p, _Params]),
        "llama_init_from_model": (ctypes.c_void_p, [ctypes.c_void_p, _Params]),
        "llama_model_get_vocab": (ctypes.c_void_p, [ctypes.c_void_p]),
        "llama_vocab_n_tokens": (ctypes.c_int32, [ctypes.c_void_p]),
        "llama_tokenize": (ctypes.c_int32, tokenize),
        "llama_batch_init": (_Batch, [ctypes.c_int32] * 3),
        "llama_batch_free": (None, [_Batch]),
        "llama_decode": (ctypes.c_int32, [ctypes.c_void_p, _Batch]),
        "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p]),
        "llama_free": (None, [ctypes.c_void_p]),
        "llama_model_free": (None, [ctypes.c_void_p]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


class LlamaCpp:
    """A GGUF opened by llama.cpp: KV cache in float32, no flash attention, one thread."""

    def __init__(self, path: Path, context: int = 512) -> None:
        self._lib = lib = _library()
        self._model = lib.llama_model_load_from_file(
            str(path).encode(), _with(lib.llama_model_default_params(), {})
        )
        assert self._model, f"llama.cpp cannot load {path}"
        fields = {  # offset: (expected default, value), all 32-bit
            0: (512, context),  # n_ctx
            4: (2048, context),  # n_batch
            8: (512, context),  # n_ubatch
            28: (4, 1),  # n_threads
            32: (4, 1),  # n_threads_batch
            52: (-1, 0),  # flash_attn_type
            104: (_F16, _F32),  # type_k
            108: (_F16, _F32),  # type_v
        }
        self._params = _with(lib.llama_context_default_params(), fields)
        self.context = context
        self.vocab = lib.llama_model_get_vocab(self._model)
        self.vocab_size = lib.llama_vocab_n_tokens(self.vocab)

    def tokenize(self, text: str, *, special: bool = True, bos: bool = False) -> list[int]:
        raw = text.encode()
        room = len(raw) + 8
        ids = (ctypes.c_int32 * room)()
        n = self._lib.llama_tokenize(self.vocab, raw, len(raw), ids, room, bos, special)
        assert n >= 0
        return list(ids[:n])

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits after every token of a text of its own, (n, vocab) float32."""
        lib, n = self._lib, len(ids)
        context = lib.llama_init_from_model(self._model, self._params)
        assert context, "llama.cpp cannot make a context"
        batch = lib.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        assert lib.llama_decode(context, batch) == 0
        shape = (n, self.vocab_size)
        out = np.ctypeslib.as_array(lib.llama_get_logits(context), shape).copy()
        lib.llama_batch_free(batch)
        lib.llama_free(context)
        return out

    def greedy(self, prompt: list[int], n: int) -> list[int]:
        """``n`` tokens, each the largest logit; every step from scratch, so that nothing is shared."""
        ids = list(prompt)
        for _ in range(n):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[len(prompt) :]

    def close(self) -> None:
        self._lib.llama_model_free(self._model)


def _with(params: _Params, fields: dict[int, tuple[int, int]]) -> _Params:
    raw = bytearray(params.raw)
    for offset, (default, value) in fields.items():
        (found,) = struct.unpack_from("<i", raw, offset)
        assert found == default, f"this llama.cpp lays its parameters out differently: {found} at {offset}"
        struct.pack_into("<i", raw, offset, value)
    return _Params((ctypes.c_ubyte * _ROOM).from_buffer_copy(raw))
