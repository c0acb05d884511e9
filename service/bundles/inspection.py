"""What is in a shared store, compared with what the registry's newest copy there names.

Asks no Redis and changes nothing. What goes is for `collector.py`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from medley.errors import BundleError
from service.bundles.blobs import ID_FILE, Blobs
from service.bundles.places import INCOMING
from service.bundles.shared_store import SharedStore, bundle_digest
from service.registry.backup import FOLDER, Backup, is_copy

__all__ = ["Inspection", "inspect"]

OURS = frozenset({ID_FILE, INCOMING, FOLDER, "bundles"})


@dataclass(frozen=True)
class Inspection:
    """Bundles by digest, other files by name."""

    generation: int | None  # of the newest copy of the registry; None if there is none
    named: frozenset[str]
    unused: frozenset[str]
    lost: frozenset[str]
    damaged: dict[str, str]  # and why; of what was verified
    foreign: tuple[str, ...]
    halves: tuple[str, ...]  # of what is being put, or never was to its end

    @property
    def is_sound(self) -> bool:
        """Whether every bundle that the registry names can be had."""
        return not self.lost and self.named.isdisjoint(self.damaged)


def inspect(blobs: Blobs, *, verify: bool = True) -> Inspection:
    """Look through a store; with `verify`, fetch each bundle and check every byte of it.

    Raises:
        StorageError: it cannot be used now.
        RegistryError: a newer Medley wrote the registry's copy.
    """
    state = Backup(blobs).newest()  # first: what it names had its bytes there before
    named = frozenset() if state is None else state.desired().files
    there = SharedStore(blobs).digests()
    return Inspection(
        generation=None if state is None else state.generation,
        named=named,
        unused=there - named,
        lost=named - there,
        damaged=dict(_damaged(SharedStore(blobs), sorted(there))) if verify else {},
        foreign=tuple(_foreign(blobs)),
        halves=tuple(blobs.names(f"{INCOMING}/")),
    )


def _damaged(store: SharedStore, digests: Iterable[str]) -> Iterator[tuple[str, str]]:
    with tempfile.TemporaryDirectory(prefix="medley-") as folder:
        for digest in digests:
            try:
                store.fetch(digest, Path(folder) / "bundle")
            except BundleError as error:
                yield digest, str(error)


def _foreign(blobs: Blobs) -> Iterator[str]:
    """Files that Medley never wrote, which it leaves alone."""
    yield from (name for name in blobs.names("") if name not in OURS)
    yield from (name for name in blobs.names("bundles/") if bundle_digest(name) is None)
    yield from (name for name in blobs.names(f"{FOLDER}/") if not is_copy(name))
