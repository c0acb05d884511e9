"""Which image files a person means, and how many of them go into one request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["batches", "pictures"]

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})
BATCH = 16  # images per request
BATCH_BYTES = 16 * 1024 * 1024  # half of what a server takes by default


def pictures(given: Iterable[Path]) -> list[Path]:
    """Files as they are; of a folder all images in it, also deeper, by name."""
    return [path for one in given for path in (_within(one) if one.is_dir() else [one])]


def batches(paths: Iterable[Path]) -> Iterator[list[tuple[Path, bytes]]]:
    """Paths with their bytes, as many at a time as one request should have.

    Raises:
        OSError: one cannot be read.
    """
    batch: list[tuple[Path, bytes]] = []
    held_bytes = 0
    for path in paths:
        data = path.read_bytes()
        held_bytes += len(data)
        if batch and (len(batch) == BATCH or held_bytes > BATCH_BYTES):
            yield batch
            batch, held_bytes = [], len(data)
        batch.append((path, data))
    if batch:
        yield batch


def _within(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
