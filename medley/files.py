"""A file that is put in place whole or not at all, even if the machine stops in between."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: Path, data: bytes) -> None:
    """Write beside `path`, flush to the disk, and rename.

    Raises:
        OSError: it cannot be written; nothing is left behind, an older file at `path` stays.
    """
    incoming = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with incoming.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        incoming.replace(path)
        _sync_folder(path.parent)
    finally:
        incoming.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)  # the rename itself
    finally:
        os.close(handle)
