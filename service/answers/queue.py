"""What waits for the model: one line for each lane, taken in turn, of a bounded length.

It is not a thread and has no lock: the engine holds its own around every call. It answers nobody;
what it gives back is the caller's to answer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Generic, Protocol, TypeVar

__all__ = ["FairQueue", "Waiting"]

RESERVED = 8  # one part in so many of the room is for lanes that have nothing waiting


class Waiting(Protocol):
    """What can wait: `future` is its name in the queue, times are of one monotonic clock."""

    @property
    def future(self) -> Future[Any]:
        """What its client holds."""

    @property
    def lane(self) -> str:
        """With whom it shares its turn."""

    @property
    def submitted_s(self) -> float:
        """When it came."""

    @property
    def deadline_s(self) -> float:
        """When nobody wants it any more; infinite if never."""


W = TypeVar("W", bound=Waiting)


class FairQueue(Generic[W]):
    """Lanes take turns, one item each; within a lane the oldest goes first.

    While two lanes both have items waiting, neither gets two turns before the other gets one. A
    lane that comes, or comes back after it was empty, takes its turn after those that wait.

    There is room for `limit` items. The last eighth of it is kept for lanes that have nothing
    waiting: a lane that has may not fill the queue to its end, so that another one still gets in.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: OrderedDict[Future[Any], W] = OrderedDict()  # as they came
        self._lanes: OrderedDict[str, OrderedDict[Future[Any], W]] = OrderedDict()  # by turn
        self._expiry_s = float("inf")  # no deadline is earlier; it may have left

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def oldest_s(self) -> float:
        """When the oldest came; infinite if none waits."""
        oldest = next(iter(self._waiting.values()), None)
        return float("inf") if oldest is None else oldest.submitted_s

    @property
    def expiry_s(self) -> float:
        """When `expire` is worth a call: no item that waits has an earlier deadline."""
        return self._expiry_s

    def put(self, items: Sequence[W]) -> bool:
        """Let items of one lane wait, all or none; whether there was room."""
        if items and len(self._waiting) + len(items) > self._room(items[0].lane):
            return False
        for item in items:
            self._waiting[item.future] = item
            self._lanes.setdefault(item.lane, OrderedDict())[item.future] = item
            self._expiry_s = min(self._expiry_s, item.deadline_s)
        return True

    def pop(self) -> W | None:
        """Take the item whose turn it is out, if any waits."""
        if not self._lanes:
            return None
        lane = next(iter(self._lanes))
        self._lanes.move_to_end(lane)
        return self.remove(next(iter(self._lanes[lane])))

    def remove(self, future: Future[Any]) -> W | None:
        """Take an item out by its future; None if it does not wait (any more)."""
        item = self._waiting.pop(future, None)
        if item is not None:
            line = self._lanes[item.lane]
            del line[future]
            if not line:
                del self._lanes[item.lane]
        return item

    def expire(self, now_s: float) -> list[W]:
        """Take out, in the order in which they came, the items whose deadline has passed.

        All are looked at only when the earliest deadline has passed, not at every call.
        """
        if now_s < self._expiry_s:
            return []
        late = [item for item in self._waiting.values() if item.deadline_s <= now_s]
        for item in late:
            self.remove(item.future)
        deadlines = (item.deadline_s for item in self._waiting.values())
        self._expiry_s = min(deadlines, default=float("inf"))
        return late

    def _room(self, lane: str) -> int:
        return self._limit - (self._limit // RESERVED if lane in self._lanes else 0)
