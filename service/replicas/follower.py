"""When this replica looks at the registry: on a hint, every so often, when somebody waits for it.

What it does then is in `reconciler.py`. A replica that joins is ready with everything that others
have; what is refused here and works elsewhere is tried again. Belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from medley.errors import MedleyError
from service.errors import RegistryError, StorageError, UnavailableError
from service.registry.registry import Registry
from service.replicas.board import Board
from service.versions.live import Key
from service.versions.residency import protected
from service.versions.tasks import Tasks

__all__ = ["Follower"]

log = logging.getLogger(__name__)
JITTER = 0.2  # so that replicas do not all come at once
FIRST_S, LONGEST_S = 0.25, 10.0  # between tries while something is away
MEND_S, MEND_LONGEST_S = 2.0, 300.0  # between tries of a version that is refused here only


@dataclass
class _Mending:
    """A version that is refused here and works elsewhere."""

    pause_s: float
    next_s: float  # by `time.monotonic`


class Follower:
    """Follows a registry that replicas share; of a registry of its own it waits for changes only.

    Args:
        tasks: catch up, one change at a time.
        registry: gives hints.
        board: says what other replicas have.
        me: this one's id there.
        poll_s: how often to look without a hint; None: nobody else changes the registry.
    """

    def __init__(
        self, tasks: Tasks, registry: Registry, *, board: Board, me: str, poll_s: float | None
    ) -> None:
        self._tasks = tasks
        self._registry = registry
        self._board = board
        self._me = me
        self._poll_s = poll_s
        self._wake = asyncio.Event()
        self._failures = 0  # in a row
        self._next_s = 0.0  # when it is tried again
        self._mending: dict[Key, _Mending] = {}
        self._following: asyncio.Task[None] | None = None
        self._end_hints: Callable[[], None] = lambda: None

    async def join(self, at: Callable[[str], None]) -> None:
        """Follow for the first time, until all is here that other replicas have.

        Args:
            at: hears what it waits for.

        Raises:
            RegistryError: the registry is none for this server.
            MedleyError: a registry of its own cannot be read.
        """
        self._listen()
        while not await self._succeeds(self._tasks.restore, at):
            await self._pause()
        while refused := await self._refused_here_only():
            names = ", ".join("@".join(key) for key in refused)
            at(f"restoring tasks: {names} cannot be loaded here, but elsewhere")
            await self._pause()
            await self._succeeds(self._tasks.catch_up, at)
            await self._retry(refused)

    def start(self) -> None:
        """Go on following, if there is anybody to follow."""
        if self._poll_s is not None:
            self._following = asyncio.create_task(self._follow(self._poll_s), name="follower")

    async def close(self) -> None:
        """Stop at a place where it may."""
        await asyncio.to_thread(self._end_hints)
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait([self._following])

    def wake(self) -> None:
        """Look now."""
        self._wake.set()

    async def reached(self, generation: int, timeout_s: float) -> bool:
        """Wait until this generation is served here, or a later one; False if it is not in time."""
        live = self._tasks.live
        if live.snapshot.desired.generation >= generation:
            return True
        self.wake()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await live.reached(generation)
        return live.snapshot.desired.generation >= generation

    def retry_s(self, key: Key) -> float | None:
        """How long until a version is tried again by itself, if it is."""
        at_s = self._mending[key].next_s if key in self._mending else self._next_s
        left_s = at_s - time.monotonic()
        return round(left_s, 1) if left_s > 0 else None

    def _listen(self) -> None:
        loop = asyncio.get_running_loop()

        def hint() -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody needs it any more
                loop.call_soon_threadsafe(self.wake)

        self._end_hints = self._registry.listen(hint)

    async def _follow(self, poll_s: float) -> None:
        while True:
            pause_s = poll_s if await self._succeeds(self._tasks.catch_up) else None
            await self._mend()
            await self._pause(pause_s)

    async def _succeeds(
        self, step: Callable[[], Awaitable[None]], at: Callable[[str], None] = lambda said: None
    ) -> bool:
        """Make one step, and count in vain ones; who is alone is told what went wrong."""
        try:
            await step()
        except RegistryError:
            raise
        except (StorageError, UnavailableError) as error:
            if self._poll_s is None:
                raise
            at(f"restoring tasks: {error}")
            self._fails(error)
            return False
        except Exception:  # the outermost loop: logged, and tried again
            if self._poll_s is None or self._following is None:
                raise
            log.exception("following the registry failed")
            self._failures += 1
            return False
        if self._failures:
            log.info("the registry is followed again, after %d tries", self._failures)
        self._failures, self._next_s = 0, 0.0
        return True

    def _fails(self, error: MedleyError) -> None:
        level = logging.DEBUG if self._failures else logging.WARNING
        log.log(level, "the registry cannot be followed now: %s", error)
        self._failures += 1

    async def _pause(self, pause_s: float | None = None) -> None:
        """Wait for a hint, or for so long; by default the longer the more often it has failed."""
        if pause_s is None:
            pause_s = min(FIRST_S * 2 ** min(self._failures, 10), LONGEST_S)
        pause_s *= random.uniform(1 - JITTER, 1 + JITTER)
        if self._failures:
            self._next_s = time.monotonic() + pause_s
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s):  # `wait_for` may lose a cancellation
                await self._wake.wait()
        self._wake.clear()

    async def _refused_here_only(self) -> list[Key]:
        """Protected versions that failed here, and that another replica has."""
        snapshot = self._tasks.live.snapshot
        failed = snapshot.failed.keys() & protected(snapshot.desired)
        if not failed or self._poll_s is None:
            return []
        try:
            others = await asyncio.to_thread(self._board.replicas)
        except UnavailableError:
            return []
        digests = {
            state.digest
            for one in others
            if one.id != self._me and one.joined
            for state in one.versions.values()
            if state.state in ("live", "ready")
        }
        return sorted(key for key in failed if snapshot.desired.records[key].digest in digests)

    async def _mend(self) -> None:
        """Try again what is refused here only, the longer it is so the less often."""
        if not self._tasks.live.snapshot.failed:
            self._mending.clear()
            return
        refused, now_s = await self._refused_here_only(), time.monotonic()
        self._mending = {key: one for key, one in self._mending.items() if key in refused}
        for key in refused:
            self._mending.setdefault(key, _Mending(MEND_S, now_s + MEND_S))
        due = [key for key in refused if self._mending[key].next_s <= now_s]
        for key in due:
            one = self._mending[key]
            one.pause_s = min(2 * one.pause_s, MEND_LONGEST_S)
            one.next_s = now_s + one.pause_s
        await self._retry(due)

    async def _retry(self, keys: Iterable[Key]) -> None:
        for key in keys:
            with suppress(MedleyError):  # whatever it is: it is marked, and tried again
                await self._tasks.retry(key)
