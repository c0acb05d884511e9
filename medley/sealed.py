"""A sealed safetensors file: one JSON text and named tensors, guarded by a digest of every byte.

Only the container; what text and tensors mean is for `medley/bundle.py`. The seal tells damage, not
malice: whoever writes a file seals it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import safetensors.torch
import torch
from pydantic import BaseModel, Field, TypeAdapter
from safetensors import SafetensorError
from torch import Tensor

from medley.errors import BundleError
from medley.files import write_whole

__all__ = ["SealedFile", "check_seal", "pack", "parse_json", "read", "unpack", "write"]

_KEY = "medley"  # one metadata key only: safetensors writes several in random order
_START = b'{"__metadata__":{"medley":"{\\"seal\\":\\"'
_SEAL = slice(8 + len(_START), 8 + len(_START) + 64)
_UNSEALED = "0" * 64
_MAX_HEADER_BYTES = 16 * 1024 * 1024
_CHUNK_BYTES = 1024 * 1024
_DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}


class SealedFile(NamedTuple):
    """What is inside: the JSON text, its seal included, and the tensors, on the CPU."""

    text: str
    tensors: dict[str, Tensor]


def pack(text: str, tensors: Mapping[str, Tensor]) -> bytes:
    """Put a JSON object and tensors into one sealed file; equal content gives equal bytes.

    Args:
        text: JSON of a non-empty object that has no "seal"; it becomes its first entry.
        tensors: by name, on any device.
    """
    assert text.startswith('{"')
    metadata = {_KEY: f'{{"seal":"{_UNSEALED}",{text[1:]}'}
    plain = {name: _plain(tensors[name]) for name in sorted(tensors)}
    data = safetensors.torch.save(plain, metadata)
    assert data.startswith(_START, 8)
    return data[: _SEAL.start] + _seal(data) + data[_SEAL.stop :]


def unpack(data: bytes) -> SealedFile:
    """Open a sealed file.

    Raises:
        BundleError: with code `not_safetensors`, `truncated`, `not_a_bundle` (safetensors of
            something else) or `damaged` (the seal is broken).
    """
    header_bytes = int.from_bytes(data[:8], "little")
    if data[8:9] != b"{" or header_bytes > _MAX_HEADER_BYTES:
        raise _refusal("not_safetensors", "not a safetensors file")
    if len(data) < 8 + header_bytes:
        raise _refusal("truncated", f"the file ends within its header, at byte {len(data)}")
    header = _parse(data[8 : 8 + header_bytes])
    ends = [entry.data_offsets[1] for entry in header.entries.values()]
    if len(data) < 8 + header_bytes + max(ends, default=0):
        raise _refusal("truncated", f"the file ends within its tensors, at byte {len(data)}")
    if not data.startswith(_START, 8) or header.metadata.keys() != {_KEY}:
        raise _refusal("not_a_bundle", "a safetensors file, but without a sealed Medley manifest")
    if data[_SEAL] != _seal(data):
        raise _refusal("damaged", "the seal is broken: bytes have changed since it was written")
    return SealedFile(header.metadata[_KEY], _load(data, header))


def read(source: bytes | Path, *, what: str, max_bytes: int) -> SealedFile:
    """Open a sealed file of at most so many bytes.

    Raises:
        BundleError: as `unpack`, or with code `too_large`, or `unreadable` (no such file, no
            permission); `what` is what the message calls it.
    """
    data = source if isinstance(source, bytes) else _bytes_of(source, max_bytes + 1)
    if len(data) > max_bytes:
        raise _refusal("too_large", f"the {what} is larger than the {max_bytes} bytes allowed")
    return unpack(data)


def write(path: Path, data: bytes) -> None:
    """Put a sealed file at `path`, whole or not at all.

    Raises:
        BundleError: with code `not_written`, such as on a full disk; nothing is left behind, an
            older file at `path` stays.
    """
    try:
        write_whole(path, data)
    except OSError as error:
        raise _refusal("not_written", f"cannot write {path.name}: {error.strerror}") from error


def check_seal(path: Path) -> str:
    """The seal of a file, which every byte of it bears out; nothing else is looked at.

    Raises:
        BundleError: with code `not_a_bundle` (there is no seal), `damaged` (it is broken) or
            `unreadable`.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_SEAL.stop)
            digest = hashlib.sha256(start[: _SEAL.start] + _UNSEALED.encode())
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise _refusal("unreadable", f"cannot read {path.name}: {error.strerror}") from error
    if not start.startswith(_START, 8) or len(start) < _SEAL.stop:
        raise _refusal("not_a_bundle", "there is no seal where a bundle has one")
    if start[_SEAL] != digest.hexdigest().encode():
        raise _refusal("damaged", "the seal is broken: bytes have changed since it was written")
    return digest.hexdigest()


def parse_json(text: str) -> Any:
    """Parse JSON that means the same to every reader.

    Raises:
        ValueError: not JSON, nested too deeply, or a key is repeated: of two seals or two tensors
            of one name, one reader would see the first and another the last.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a key is repeated")
    return entries


class _Entry(BaseModel):
    dtype: str
    shape: list[Annotated[int, Field(ge=0)]]
    data_offsets: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]


class _Header(NamedTuple):
    metadata: dict[str, str]
    entries: dict[str, _Entry]


_METADATA = TypeAdapter(dict[str, str])
_ENTRIES = TypeAdapter(dict[str, _Entry])


def _parse(header: bytes) -> _Header:
    try:
        raw = parse_json(header.decode())
        metadata = _METADATA.validate_python(raw.pop("__metadata__", {}))
        return _Header(metadata, _ENTRIES.validate_python(raw))
    except ValueError as error:
        raise _refusal("not_safetensors", "its header is not that of safetensors") from error


def _load(data: bytes, header: _Header) -> dict[str, Tensor]:
    strange = {entry.dtype for entry in header.entries.values()} - _DTYPES
    if strange:
        raise _refusal("not_safetensors", f"tensors of a dtype unknown here: {sorted(strange)}")
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise _refusal("not_safetensors", "its tensors overlap, leave gaps or misfit") from error


def _seal(data: bytes) -> bytes:
    """SHA-256, in hex, of the file as it is with 64 zeros for its seal."""
    digest = hashlib.sha256(data[: _SEAL.start])
    digest.update(_UNSEALED.encode())
    digest.update(memoryview(data)[_SEAL.stop :])
    return digest.hexdigest().encode()


def _bytes_of(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError as error:
        raise _refusal("unreadable", f"cannot read {path.name}: {error.strerror}") from error


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _refusal(code: str, problem: str) -> BundleError:
    return BundleError([problem], code=code)
