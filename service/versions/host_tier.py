"""Versions that are ready in memory to go to the device, so that none of them need be read again.

The most recently used of them, as many as fit into a number of bytes; a version that is on the
device too gives way first, since it needs its copy least. Belongs to the event loop's thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from medley.admission import PackedBundle

__all__ = ["HostTier", "Prepared"]


@dataclass(frozen=True, eq=False)
class Prepared:
    """All that can be done for a version before it goes to the device."""

    packed: PackedBundle
    zero_shot_CE: Tensor  # its classes, encoded by the untouched text tower

    @property
    def size_bytes(self) -> int:
        """What it takes in memory."""
        return self.packed.size_bytes + self.zero_shot_CE.nbytes


class HostTier:
    """Prepared versions by the digest of their bundle."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, Prepared] = OrderedDict()  # the least recently used first

    @property
    def digests(self) -> frozenset[str]:
        """What is here."""
        return frozenset(self._kept)

    @property
    def size_bytes(self) -> int:
        """What it all takes."""
        return sum(one.size_bytes for one in self._kept.values())

    def get(self, digest: str) -> Prepared | None:
        """A version, if it is here; counts as a use."""
        if digest in self._kept:
            self._kept.move_to_end(digest)
        return self._kept.get(digest)

    def put(self, digest: str, prepared: Prepared, *, on_device: Collection[str]) -> None:
        """Keep a version as the most recently used, and let go of others until all fit.

        Args:
            digest: of its bundle.
            prepared: the version.
            on_device: digests of versions that are there, and give way before others.
        """
        self._kept[digest] = prepared
        self._kept.move_to_end(digest)
        waiting = [d for d in self._kept if d not in on_device]
        order = [d for d in self._kept if d in on_device] + waiting
        while self.size_bytes > self._max_bytes:
            del self._kept[order.pop(0)]

    def drop(self, digest: str) -> None:
        """Let go of a version, if it is here."""
        self._kept.pop(digest, None)
