"""How much of one thing all requests together may hold: bytes of bodies, or images in work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from service.errors import BusyError

__all__ = ["Room", "Take"]

Take = Callable[[int], None]


class Room:
    """So much room and no more; belongs to the event loop."""

    def __init__(self, limit: int, unit: str) -> None:
        self.used = 0
        self._limit = limit
        self._unit = unit

    @contextmanager
    def share(self) -> Iterator[Take]:
        """Take some of the room, in several pieces if need be, and give all back at the end.

        What it yields raises BusyError where there is not enough room.
        """
        taken = 0

        def take(amount: int) -> None:
            nonlocal taken
            if self.used + amount > self._limit:
                raise BusyError(f"all {self._limit} {self._unit} that this server holds are taken")
            self.used += amount
            taken += amount

        try:
            yield take
        finally:
            self.used -= taken
