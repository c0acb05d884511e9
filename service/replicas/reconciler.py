"""Brings what is served here to what the registry says, and knows how far behind it is.

One step; when it is made is for `follower.py` and `tasks.py`, which see to it that there is one at
a time. Belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import time

from medley.errors import MedleyError
from service.bundles.store import BundleStore
from service.errors import StorageError, UnavailableError
from service.registry.desired import Desired
from service.registry.registry import Registry
from service.signals.metrics import Metrics
from service.signals.signals import Signals
from service.versions.live import Live, Resident
from service.versions.residency import Residency

__all__ = ["Reconciler"]

log = logging.getLogger(__name__)


class Reconciler:
    """Reads the registry and lets the residency follow.

    Args:
        registry: says what should be served.
        store: forgets the bytes of what is not served any more.
        residency: brings versions to the device, and flips.
        signals: forget tasks that are gone.
        metrics: count what came of it.
    """

    def __init__(
        self,
        *,
        registry: Registry,
        store: BundleStore,
        residency: Residency,
        signals: Signals,
        metrics: Metrics,
    ) -> None:
        self._registry = registry
        self._store = store
        self._residency = residency
        self._signals = signals
        self._metrics = metrics
        self._behind_since_s: float | None = None
        self._read = 0  # the generation that was read last
        metrics.before_scrape.append(self._measure)

    @property
    def live(self) -> Live:
        """What is served now."""
        return self._residency.live

    @property
    def lag_s(self) -> float:
        """For how long it has been known that the registry is ahead; 0 if it is not."""
        since_s = self._behind_since_s
        return 0.0 if since_s is None else time.monotonic() - since_s

    async def catch_up(self) -> None:
        """Serve by what the registry says now.

        Raises:
            UnavailableError, StorageError: it cannot be read, or something it wants cannot be had
                now; what was served still is.
        """
        served = self.live.snapshot.desired
        try:
            desired = await asyncio.to_thread(self._registry.read, served)
        except MedleyError:
            self._metrics.follows.labels("unavailable").inc()
            raise
        if desired is not served or not self._residency.complete:
            await self.follow(desired)

    async def follow(self, desired: Desired, *admitted: Resident) -> None:
        """Serve by this state, which the registry has just given; forget what it lacks.

        Args:
            desired: the state.
            admitted: what has been loaded for it already.

        Raises: as for `catch_up`.
        """
        before = self.live.snapshot.desired
        if desired.generation < before.generation:
            self._metrics.follows.labels("unavailable").inc()
            raise UnavailableError(
                f"the registry is at generation {desired.generation}, this server has served"
                f" {before.generation}",
                code="registry_unavailable",
            )
        self._read = desired.generation
        if self._behind_since_s is None:
            self._behind_since_s = time.monotonic()
        await self._follow(desired, *admitted)
        self._behind_since_s = None
        for task in before.tasks.keys() - desired.tasks.keys():
            self._signals.forget(task)
        for digest in before.files - desired.files:
            await self.remove(digest)

    async def remove(self, digest: str) -> None:
        """Forget bytes that no record names; what cannot be removed now goes at the next start."""
        try:
            await asyncio.to_thread(self._store.remove, digest)
        except StorageError as error:
            log.warning("a bundle that is not needed any more stays: %s", error)

    async def _follow(self, desired: Desired, *admitted: Resident) -> None:
        failed = self.live.snapshot.failed
        begun_s = time.monotonic()
        try:
            await self._residency.follow(desired, *admitted)
        except MedleyError:
            self._metrics.follows.labels("unavailable").inc()
            raise
        more = self.live.snapshot.failed.keys() - failed.keys()
        self._metrics.follows.labels("failed" if more else "ok").inc()
        self._metrics.follow_s.observe(time.monotonic() - begun_s)

    def _measure(self) -> None:
        """Say how far it is; before each scrape."""
        snapshot, metrics = self.live.snapshot, self._metrics
        served = snapshot.desired.generation
        metrics.generation.labels("desired").set(max(served, self._read))
        metrics.generation.labels("observed").set(served)
        metrics.registry_lag_s.set(self.lag_s)
        live = set(snapshot.desired.live.items())
        known = snapshot.desired.records.keys() - snapshot.failed.keys()
        metrics.versions.labels("live").set(len(live & known))
        metrics.versions.labels("ready").set(len(known - live))
        metrics.versions.labels("failed").set(len(snapshot.failed))
