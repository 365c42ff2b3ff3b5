"""A native consumer of storage tiers, as ctypes writes one: reads through a ``pi2_storage_abi``."""

from __future__ import annotations

import ctypes
from ctypes import CFUNCTYPE, POINTER, c_double, c_int32, c_int64, c_uint32, c_void_p
from typing import ClassVar

from pi2.api import Ranges
from pi2.tensor import U8


class Read(ctypes.Structure):
    _fields_: ClassVar = [("offset", c_int64), ("nbytes", c_int64), ("into", c_void_p)]


class Failure(ctypes.Structure):
    _fields_: ClassVar = [("code", c_int32), ("offset", c_int64)]


class StorageAbi(ctypes.Structure):
    _fields_: ClassVar = [
        ("version", c_uint32),
        ("size", c_uint32),
        ("self", c_void_p),
        (
            "submit",
            CFUNCTYPE(c_int64, c_void_p, c_int64, POINTER(Read), c_int64, c_int32, POINTER(Failure)),
        ),
        ("wait", CFUNCTYPE(c_int32, c_void_p, c_int64, c_double, POINTER(Failure))),
        ("cancel", CFUNCTYPE(None, c_void_p, c_int64)),
    ]


def read_through(address: int, file: int, ranges: Ranges, into: U8, priority: int) -> int:
    """Reads as ``StorageTier.read`` does, by the struct at ``address``; returns 0 or an errno."""
    abi = StorageAbi.from_address(address)
    assert abi.version == 1
    assert abi.size >= ctypes.sizeof(StorageAbi)
    reads, at = (Read * len(ranges))(), into.ctypes.data
    for read, (offset, nbytes) in zip(reads, ranges.tolist(), strict=True):
        read.offset, read.nbytes, read.into = offset, nbytes, at
        at += nbytes
    failure = Failure()
    ticket = abi.submit(abi.self, file, reads, len(ranges), priority, ctypes.byref(failure))
    if ticket == 0:
        assert failure.code > 0, "a refused submit says why"
        return int(failure.code)
    code = int(abi.wait(abi.self, ticket, -1.0, ctypes.byref(failure)))
    assert code == failure.code
    return code
