"""This replica's word on the board: said every so often, and at once when there is news.

Nothing depends on it being heard; where the registry is away it goes on trying. Belongs to the
event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from contextlib import suppress

from medley.errors import MedleyError
from service.registry.desired import now
from service.replicas.board import Board, Lacking, Phase, Replica, State, VersionState
from service.signals.metrics import Metrics, package_version
from service.versions.live import Key
from service.versions.residency import Residency

__all__ = ["Heartbeat"]

log = logging.getLogger(__name__)
BEATS = 3  # within the time after which a replica counts as gone
SOONEST_S = 0.02  # between two of them, whatever the news


class Heartbeat:
    """Tells the board of this replica.

    Args:
        board: where.
        residency: what is served here.
        name: for people; several replicas may have the same.
        fingerprint: of the backbone.
        phase: says where this server is between its start and its end.
        ttl_s: how long others wait for the next beat.
        metrics: told how many are alive.
    """

    def __init__(
        self,
        board: Board,
        residency: Residency,
        *,
        name: str,
        fingerprint: str,
        phase: Callable[[], Phase],
        ttl_s: float,
        metrics: Metrics,
    ) -> None:
        self.id = uuid.uuid4().hex
        self.retry_s: Callable[[Key], float | None] = lambda key: None
        self._board = board
        self._residency = residency
        self._name = name
        self._fingerprint = fingerprint
        self._phase = phase
        self._every_s = ttl_s / BEATS
        self._metrics = metrics
        self._since = now()
        self._news = asyncio.Event()
        self._told: object = None
        self._beating: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to beat."""
        self._residency.live.after_flip.append(self.look)
        self._beating = asyncio.create_task(self._beat(), name="heartbeat")

    async def close(self) -> None:
        """Stop, and let the others know."""
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.wait([self._beating])
        with suppress(MedleyError):
            await asyncio.to_thread(self._board.leave, self.id)

    def look(self) -> None:
        """Beat soon if there is anything new that others wait for."""
        if self._news_of() != self._told:
            self._news.set()

    def replica(self) -> Replica:
        """What can be said of this one now."""
        snapshot, residency = self._residency.live.snapshot, self._residency
        states: dict[Key, State] = dict.fromkeys(snapshot.desired.live.items(), "live")
        states |= dict.fromkeys(residency.loading, "loading")
        states |= dict.fromkeys(snapshot.failed, "failed")
        versions = {
            "@".join(key): VersionState(
                digest=record.digest,
                state=states.get(key, "ready"),
                tier=snapshot.tier(key),
                reason=snapshot.failed.get(key),
                attempts=residency.attempts(key) if key in snapshot.failed else 0,
                retry_s=self.retry_s(key),
                unified=record.unified,
            )
            for key, record in snapshot.desired.records.items()
        }
        lacking = tuple(
            Lacking("@".join(key), reason, residency.attempts(key), self.retry_s(key))
            for key, reason in residency.lacking.items()
        )
        return Replica(
            id=self.id,
            name=self._name,
            phase=self._phase(),
            generation=snapshot.desired.generation,
            version=package_version(),
            fingerprint=self._fingerprint,
            since=self._since,
            versions=versions,
            lacking=lacking,
        )

    def _news_of(self) -> object:
        snapshot, residency = self._residency.live.snapshot, self._residency
        away = dict(residency.lacking), residency.loading
        return snapshot.desired.id, snapshot.failed, self._phase(), away

    async def _beat(self) -> None:
        while True:
            self._news.clear()
            told = self._news_of()
            try:
                alive = await asyncio.to_thread(self._board.beat, self.replica())
                self._told = told
                self._metrics.replicas.set(alive)
            except MedleyError as error:
                log.debug("the board does not hear this replica: %s", error)
            except Exception:  # the outermost loop: whatever it is, the next beat comes
                log.exception("a heartbeat failed")
            await asyncio.sleep(SOONEST_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._every_s):  # `wait_for` may lose a cancellation
                    await self._news.wait()
