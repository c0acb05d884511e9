"""Where a server is between its first step and its end: starting, started, draining.

Three truths follow from it and from the engine (`routes/probes.py`). It knows neither the app nor
HTTP. Belongs to the event loop's thread; only `drain` may also be called by a signal.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

__all__ = ["Lifecycle"]

log = logging.getLogger(__name__)


class Lifecycle:
    """The phases of one server; they only go forward."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.step = "beginning"  # what the start is at, for people
        self.started = False
        self.error: Exception | None = None  # why the start failed
        self._clock = clock
        self._drain_began_s: float | None = None
        self._settled = asyncio.Event()

    def at(self, step: str) -> None:
        """Say what the start is at."""
        log.info("starting: %s", step)
        self.step = step

    async def follow(self, start: Awaitable[None]) -> None:
        """Run the start to its end; what it raises is kept in `error`."""
        try:
            await start
            self.started = True
        except Exception as error:  # whatever it is: `settled` raises it
            self.error = error
        finally:
            self._settled.set()

    async def settled(self) -> None:
        """Wait until the start has ended.

        Raises:
            Exception: why it failed.
        """
        await self._settled.wait()
        if self.error is not None:
            raise self.error

    def drain(self) -> None:
        """Begin to leave: not ready from now on."""
        if self._drain_began_s is None:
            self._drain_began_s = self._clock()

    @property
    def draining(self) -> bool:
        """Whether the server is about to leave."""
        return self._drain_began_s is not None

    def drained_for_s(self) -> float:
        """How long ago it began to leave; 0 if it did not."""
        return 0.0 if self._drain_began_s is None else self._clock() - self._drain_began_s
