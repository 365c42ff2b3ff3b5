"""The C interface of the reader, one declaration a function (pi2_ufs.h, pi2_abi.h)."""

from __future__ import annotations

import ctypes
import functools
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_double, c_int32, c_int64, c_uint32, c_void_p
from importlib.resources import as_file, files
from typing import ClassVar

ENGINES = {"uring": 0, "threads": 1, "buffered": 2}
PENDING, MORE = -1, 1 << 8


class Read(ctypes.Structure):
    _fields_: ClassVar = [("offset", c_int64), ("nbytes", c_int64), ("into", c_void_p)]


class Failure(ctypes.Structure):
    _fields_: ClassVar = [("code", c_int32), ("offset", c_int64)]


class StorageAbi(ctypes.Structure):
    _fields_: ClassVar = [
        ("version", c_uint32),
        ("size", c_uint32),
        ("self", c_void_p),
        ("submit", CFUNCTYPE(c_int64, c_void_p, c_int64, c_void_p, c_int64, c_int32, POINTER(Failure))),
        ("wait", CFUNCTYPE(c_int32, c_void_p, c_int64, c_double, POINTER(Failure))),
        ("cancel", CFUNCTYPE(None, c_void_p, c_int64)),
    ]


class Model(ctypes.Structure):
    _fields_: ClassVar = [
        (name, c_double)
        for name in (
            "sequential_small", "sequential_large", "random_small", "random_large",
            "near_range", "far_range", "far_factor", "queues_factor", "core_factor",
        )
    ]  # fmt: skip


class Options(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, c_int32) for name in ("engine", "depth", "threads", "must_be_direct", "cpu")),
        *((name, c_int64) for name in ("block", "merge", "gap")),
        ("deadline", c_double),
        ("model", POINTER(Model)),
    ]


class Counts(ctypes.Structure):
    _fields_: ClassVar = [
        (name, c_int64)
        for name in (
            "ranges", "reads", "merged", "bytes", "direct_files", "buffered_files",
            "registered_buffers", "registered_files",
        )
    ]  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL | None:
    """The reader's library with its functions declared, or None if this installation has none."""
    with as_file(files("pi2_storage_ufs") / "libpi2_ufs.so") as path:
        if not path.exists():
            return None
        lib = ctypes.CDLL(str(path))
    signatures: dict[str, tuple[object, list[object]]] = {
        "pi2_ufs_uring": (c_int32, []),
        "pi2_ufs_open": (c_void_p, [POINTER(Options), POINTER(c_int32)]),
        "pi2_ufs_close": (None, [c_void_p]),
        "pi2_ufs_open_file": (c_int64, [c_void_p, c_char_p]),
        "pi2_ufs_open_descriptor": (c_int64, [c_void_p, c_int32, c_int64]),
        "pi2_ufs_count": (None, [c_void_p, POINTER(Counts)]),
        "pi2_ufs_abi": (POINTER(StorageAbi), [c_void_p]),
        "pi2_ufs_device_open": (c_void_p, [POINTER(Model), c_int32]),
        "pi2_ufs_device_close": (None, [c_void_p]),
        "pi2_ufs_device_read": (c_double, [c_void_p, c_double, c_int64, c_int64, c_int64]),
    }
    for function, (result, arguments) in signatures.items():
        declared = getattr(lib, function)
        declared.restype, declared.argtypes = result, arguments
    return lib
