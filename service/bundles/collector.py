"""Deletes bundles from the shared store that nobody needs, and puts lost ones back.

A bundle goes when no version names it, no replica uses it, nobody is about to register it, and all
that has been so for long enough. What cannot be found out deletes nothing. One replica at a time
does it, beside its serving. A unified model lies there like a bundle, and is kept like one.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from medley.errors import MedleyError
from service.bundles.apart import run_apart
from service.bundles.ledger import ARRIVING_S, Ledger
from service.bundles.places import INCOMING
from service.bundles.store import BundleStore
from service.registry.desired import Desired
from service.registry.registry import Registry
from service.signals.metrics import Metrics

__all__ = ["Collected", "Collector"]

log = logging.getLogger(__name__)
FIRST_S, EVERY_S = 10.0, 300.0  # the first soon, so that what is lost is seen soon


@dataclass(frozen=True)
class Collected:
    """What a pass through the store found, by digest, and did."""

    named: frozenset[str]  # by a version, or used by a replica
    unused_s: dict[str, float]  # for how long, of those that stay
    lost: frozenset[str]  # named, and not in the store
    deleted: frozenset[str] = frozenset()
    mended: frozenset[str] = frozenset()  # lost before


class Collector:
    """Of one replica.

    Args:
        registry: says what is named.
        store: this replica's, which has a shared one.
        ledger: of the same cluster.
        in_use: digests that living replicas use; raises MedleyError if that cannot be known.
        keep_s: how long a bundle is kept that nobody needs.
        metrics: told what was found.
    """

    def __init__(
        self,
        *,
        registry: Registry,
        store: BundleStore,
        ledger: Ledger,
        in_use: Callable[[], Collection[str]],
        keep_s: float,
        metrics: Metrics,
    ) -> None:
        assert store.shared is not None
        self._registry = registry
        self._store = store
        self._shared = store.shared
        self._ledger = ledger
        self._in_use = in_use
        self._keep_s = keep_s
        self._metrics = metrics

    async def run(self, *, first_s: float = FIRST_S, every_s: float = EVERY_S) -> None:
        """Collect again and again until cancelled; what goes wrong is tried again next time."""
        pause_s = first_s
        while True:
            await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))
            pause_s = every_s
            try:
                await asyncio.wrap_future(run_apart(self.collect, name="collector"))
            except MedleyError as error:
                log.warning("the bundle store was not collected: %s", error)

    def collect(self, *, dry_run: bool = False) -> Collected | None:
        """Go through the store once, on this thread; a dry run deletes and mends nothing.

        Returns:
            None if another replica does so now.

        Raises:
            UnavailableError: the registry is away.
            StorageError: the store is.
        """
        with self._ledger.turn() as ours:
            return self._collect(dry_run) if ours else None

    def _collect(self, dry_run: bool) -> Collected:
        # The registry first: what it names by now has had its bytes in the store before.
        desired = self._registry.read()
        needed = desired.files
        there, halves = self._shared.digests(), self._shared.blobs.names(f"{INCOMING}/")
        unused = there - needed - frozenset(self._in_use())
        ages_s = self._ledger.mark(unused.union(halves))
        unused_s = {digest: ages_s[digest] for digest in sorted(unused)}
        # A mounted folder's listing may be a little old: what it lacks is asked for by name.
        lost = frozenset(digest for digest in needed - there if not self._shared.has(digest))
        found = Collected(there - unused, unused_s, lost)
        if not dry_run:
            self._delete_halves({name: ages_s[name] for name in halves})
            found = self._mend_all(self._delete_old(found, desired))
        self._measure(found)
        return found

    def _delete_old(self, found: Collected, desired: Desired) -> Collected:
        old = [digest for digest, age_s in found.unused_s.items() if age_s >= self._keep_s]
        deleted = frozenset(digest for digest in old if self._delete(digest, desired))
        stays = {digest: s for digest, s in found.unused_s.items() if digest not in deleted}
        return replace(found, unused_s=stays, deleted=deleted)

    def _mend_all(self, found: Collected) -> Collected:
        mended = frozenset(digest for digest in found.lost if self._mend(digest))
        return replace(found, lost=found.lost - mended, mended=mended)

    def _delete(self, digest: str, desired: Desired) -> bool:
        """Of a deletion that fails nobody knows whether it goes on: its mark ends by itself."""
        if not self._ledger.condemn(digest, desired=desired, keep_s=self._keep_s):
            return False
        self._shared.remove(digest)
        self._ledger.release(digest)
        self._metrics.store_collected.inc()
        log.info("the bundle store forgets %s: nobody needs it", digest)
        return True

    def _delete_halves(self, ages_s: dict[str, float]) -> None:
        """What somebody has begun to put and never will finish."""
        for name, age_s in ages_s.items():
            if age_s >= max(self._keep_s, ARRIVING_S):
                self._shared.blobs.delete(name)

    def _mend(self, digest: str) -> bool:
        if not self._store.mend(digest):
            log.error("the bundle store has lost %s, and this replica has no copy", digest)
            return False
        log.warning("the bundle store had lost %s; this replica has put it again", digest)
        return True

    def _measure(self, found: Collected) -> None:
        counts = {"named": found.named, "unused": found.unused_s, "lost": found.lost}
        for state, digests in counts.items():
            self._metrics.store_bundles.labels(state).set(len(digests))
