"""Files that are either whole or not there: arrays, JSON and torch states, written by rename.

Not a format: numpy's, json's and torch's own, with weights_only reading.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a file beside ``path``, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{os.getpid()}-{path.name}")  # keeps the suffix: numpy adds its own
    try:
        write(scratch)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write one .npy file."""
    write_whole(path, lambda scratch: np.save(scratch, array))


def map_array(path: Path) -> NDArray[Any]:
    """Read one .npy file through the page cache, without copying it into memory."""
    return np.load(path, mmap_mode="r", allow_pickle=False)


def save_json(path: Path, value: object) -> None:
    """Write one JSON file."""
    text = json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True)
    write_whole(path, lambda scratch: _write_text(scratch, text))


def load_json(path: Path) -> Any:
    """Read one JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a dictionary of tensors, numbers and strings."""
    write_whole(path, lambda scratch: torch.save(state, scratch))


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote; refuses anything but plain values."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
