"""Triton's binary form of the Open Inference Protocol's tensors, read and written.

`BYTES` is a run of values, each after its length as four bytes, little-endian; `FP32` is four
bytes each. Source: the binary tensor data extension of Triton's documentation.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from service.errors import RequestError

__all__ = ["read_values", "written_floats", "written_texts"]

_LENGTH = struct.Struct("<I")


def read_values(data: bytes) -> list[bytes]:
    """The values of a `BYTES` tensor.

    Raises:
        RequestError: the data end within a value.
    """
    values, at = [], 0
    while at < len(data):
        start = at + _LENGTH.size
        if start > len(data):
            raise _cut_off()
        (size,) = _LENGTH.unpack_from(data, at)
        at = start + size
        if at > len(data):
            raise _cut_off()
        values.append(data[start:at])
    return values


def written_texts(texts: Sequence[str]) -> bytes:
    """`BYTES`, UTF-8."""
    values = [text.encode() for text in texts]
    return b"".join(_LENGTH.pack(len(value)) + value for value in values)


def written_floats(numbers: Sequence[float]) -> bytes:
    """`FP32`."""
    return struct.pack(f"<{len(numbers)}f", *numbers)


def _cut_off() -> RequestError:
    what = "the binary data end within a value"
    return RequestError(f"inputs.0: {what}", errors=[{"where": "inputs.0", "what": what}])
