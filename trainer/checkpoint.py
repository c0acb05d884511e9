"""The checkpoint of a run: one file, written whole or not at all, read without running code.

A checkpoint is for resuming; what a run produces is a bundle.
"""

from __future__ import annotations

import io
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from medley import files
from medley.errors import DataError

__all__ = ["load_checkpoint", "make_folder", "save_checkpoint", "write_whole"]


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers, texts and containers of them.

    Raises:
        DataError: the file cannot be written, such as on a full disk; an older one stays.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote.

    Raises:
        DataError: there is none, or it is not a checkpoint.
    """
    try:
        # weights_only: tensors and plain containers; a pickle with anything else in it is refused,
        # not run.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DataError(f"{path.parent}: no checkpoint to resume from") from error
    except (OSError, RuntimeError, EOFError, UnpicklingError, ValueError, KeyError) as error:
        raise DataError(f"{path} is not a readable checkpoint") from error
    if not isinstance(state, dict):
        raise DataError(f"{path} is not a checkpoint of a run")
    return state


def write_whole(path: Path, data: bytes) -> None:
    """Put a file in place whole or not at all, even if the machine stops in between.

    Raises:
        DataError: it cannot be written; nothing is left behind, an older file stays.
    """
    try:
        files.write_whole(path, data)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}", code="not_written") from error


def make_folder(path: Path) -> None:
    """Make a folder and those above it, unless it is there.

    Raises:
        DataError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to {path}: {error.strerror}", code="not_written") from error
