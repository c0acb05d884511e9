"""How many replicas have to have a change before whoever made it is told that it is done.

A change stands as soon as the registry has it; this only waits, by what the board says. Belongs to
the event loop's thread.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from service.errors import ConflictError, RequestError, UnavailableError
from service.replicas.board import Board, Replica

__all__ = ["Quorum", "Reached", "Refusal", "Wanted", "read_wanted"]

FIRST_S, LONGEST_S = 0.03, 0.5  # between two looks at the board


@dataclass(frozen=True)
class Wanted:
    """All replicas, more than half of them, or so many."""

    what: str  # all, majority, or a number

    def of(self, alive: int) -> int:
        """How many that is of those that are alive."""
        if self.what == "all":
            return alive
        return alive // 2 + 1 if self.what == "majority" else int(self.what)


@dataclass(frozen=True)
class Refusal:
    """A replica that has seen the change and cannot serve the version."""

    replica: str  # its id
    name: str
    reason: str


@dataclass(frozen=True)
class Reached:
    """How far a change has come."""

    generation: int
    wanted: int
    reached: int  # replicas that serve this generation, or a later one, and have the version
    alive: int
    failed: tuple[Refusal, ...] = field(default=())

    @property
    def enough(self) -> bool:
        """Whether it is where it was wanted."""
        return self.reached >= self.wanted

    @property
    def hopeless(self) -> bool:
        """Whether waiting does not help: who is not heard of may come back, a refusal stays."""
        return max(self.alive, self.wanted) - len(self.failed) < self.wanted


def read_wanted(text: str) -> Wanted:
    """Read the query parameter `replicas`.

    Raises:
        RequestError: it is neither `all`, nor `majority`, nor a positive number.
    """
    if text not in ("all", "majority") and not re.fullmatch("[1-9][0-9]{0,5}", text):
        what = "all, majority or a positive number"
        raise RequestError(
            f"replicas has to be {what}", errors=[{"where": "query.replicas", "what": what}]
        )
    return Wanted(text)


class Quorum:
    """Looks at the board until enough replicas have a change.

    Args:
        board: says what each replica serves.
        me: tells of this one, whose word there may be a moment old.
    """

    def __init__(self, board: Board, *, me: Callable[[], Replica]) -> None:
        self._board = board
        self._me = me

    async def needed(self, wanted: Wanted) -> int:
        """How many replicas that is now; a change that begins now is measured by it to its end.

        Raises:
            ConflictError: more are wanted than are alive (`too_few_replicas`).
            UnavailableError: the registry is away.
        """
        alive = len(await self.replicas())
        if wanted.of(alive) > alive:
            raise ConflictError(f"{alive} replicas are alive", code="too_few_replicas")
        return wanted.of(alive)

    async def wait(
        self, needed: int, version: str, *, generation: int, timeout_s: float
    ) -> Reached:
        """Wait until as many replicas as needed serve a generation and have a version.

        Args:
            needed: how many.
            version: task@version.
            generation: the one, or a later one.
            timeout_s: no longer than that.

        Returns:
            how far it has come: enough, or not in time, or it cannot be any more.
        """
        end_s, pause_s = time.monotonic() + timeout_s, FIRST_S
        reached = Reached(generation, needed, 0, 0)
        while True:
            with suppress(UnavailableError):  # what was seen last holds
                reached = _reached(await self.replicas(), needed, version, generation)
            left_s = end_s - time.monotonic()
            if reached.enough or reached.hopeless or left_s <= 0:
                return reached
            await asyncio.sleep(min(pause_s, left_s))
            pause_s = min(1.5 * pause_s, LONGEST_S)

    async def replicas(self) -> list[Replica]:
        """Those that have begun to answer, by name; this one as it is now.

        Raises:
            UnavailableError: the registry is away.
        """
        me = self._me()
        others = await asyncio.to_thread(self._board.replicas)
        joined = [one for one in others if one.joined and one.id != me.id]
        return sorted([*joined, me], key=lambda one: (one.name, one.id))


def _reached(replicas: Sequence[Replica], needed: int, version: str, generation: int) -> Reached:
    there = [one for one in replicas if one.generation >= generation]
    failed = tuple(
        Refusal(one.id, one.name, found.reason or "")
        for one in there
        if (found := one.versions.get(version)) is not None and found.state == "failed"
    )
    have = sum(one.holds(version) for one in there)
    return Reached(generation, needed, have, len(replicas), failed)
