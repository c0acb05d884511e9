"""The life of a task version on this server: taken in, live, rolled back, gone, restored at start.

Order of every change: bytes to the store, admission on the device (`service/residency.py`), one
registry transaction, flip of the pointer in memory. So a crash leaves the registry before or after,
and nothing is reported live that is not. One change at a time; requests go on meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from medley.bundle import Bundle
from service.errors import ConflictError, RequestError
from service.live import Live
from service.metrics import Metrics
from service.registry import LIVE, Desired, Registry, VersionRecord, now
from service.residency import Residency
from service.store import BundleStore, Upload

__all__ = ["RESERVED_NAMES", "Registered", "Tasks"]

RESERVED_NAMES = frozenset({"auto", "base"})


@dataclass(frozen=True)
class Registered:
    """What became of a registration; `created` is False if that very bundle was there."""

    record: VersionRecord
    created: bool


class Tasks:
    """All changes of what is served. Belongs to the event loop's thread.

    `on_step` hears where a registration is; tests die there.
    """

    def __init__(
        self,
        *,
        registry: Registry,
        store: BundleStore,
        residency: Residency,
        metrics: Metrics,
        max_bundle_bytes: int,
        on_step: Callable[[str], None] = lambda step: None,
    ) -> None:
        self._registry = registry
        self._store = store
        self._residency = residency
        self._metrics = metrics
        self._max_bundle_bytes = max_bundle_bytes
        self._on_step = on_step
        self._changes = asyncio.Lock()

    @property
    def live(self) -> Live:
        """What is served now."""
        return self._residency.live

    async def restore(self) -> None:
        """Load what the registry wants; a version that cannot be loaded is marked, not fatal."""
        desired = await asyncio.to_thread(self._registry.read)
        await asyncio.to_thread(self._store.clean, {r.digest for r in desired.versions})
        await self._residency.restore(desired)

    async def register(
        self, task: str, version: str, chunks: AsyncIterator[bytes], *, activate: bool
    ) -> Registered:
        """Take a bundle in; a version that is there with the same digest is not loaded again.

        Raises:
            BundleError, CapacityError: it does not fit; nothing has changed.
            RequestError: the bundle is for another task or version.
            ConflictError: that version exists with another digest.
            PayloadError, StorageError: too large, or the disk does not take it.
        """
        with self._store.upload(self._max_bundle_bytes) as upload:
            async for chunk in chunks:
                await asyncio.to_thread(upload.write, chunk)
            await asyncio.to_thread(upload.finish)
            self._on_step("received")
            bundle = await asyncio.to_thread(self._residency.read, upload.path)
            _check_names(bundle, task, version)
            self._on_step("verified")
            async with self._changes:
                return await self._take_in(upload, bundle, activate=activate)

    async def activate(self, task: str, version: str) -> None:
        """Make a version live; it must work here."""
        async with self._changes:
            self.live.snapshot.find(task, version)
            await self._activate(task, version)

    async def rollback(self, task: str) -> str:
        """Make the version live that was live before; returns which."""
        async with self._changes:
            desired = await asyncio.to_thread(self._registry.rollback, task)
            self._residency.publish(desired)
            return desired.live[task]

    async def delete_version(self, task: str, version: str) -> None:
        """Remove a version that is not live."""
        async with self._changes:
            await self._drop(await asyncio.to_thread(self._registry.delete_version, task, version))

    async def delete_task(self, task: str) -> None:
        """Remove a task; requests in flight still get its answers."""
        async with self._changes:
            await self._drop(await asyncio.to_thread(self._registry.delete_task, task))
            self._metrics.forget_task(task)

    async def _take_in(self, upload: Upload, bundle: Bundle, *, activate: bool) -> Registered:
        manifest, snapshot = bundle.manifest, self.live.snapshot
        key = (manifest.task, manifest.version)
        known = snapshot.desired.records.get(key)
        if known is not None and known.digest != bundle.digest:
            raise ConflictError(
                f"version {manifest.version} of {manifest.task} exists with another digest",
                code="version_exists",
            )
        if known is not None and key in snapshot.residents:
            if activate and snapshot.desired.live.get(manifest.task) != manifest.version:
                await self._activate(*key)
            return Registered(known, created=False)
        record = known or VersionRecord(*key, bundle.digest, now())
        await asyncio.to_thread(self._store.keep, upload, bundle.digest)
        self._on_step("stored")
        await self._admit_and_commit(record, bundle, new=known is None, activate=activate)
        return Registered(record, created=known is None)

    async def _admit_and_commit(
        self, record: VersionRecord, bundle: Bundle, *, new: bool, activate: bool
    ) -> None:
        """Device first, registry second, memory last; undone in reverse if a step is refused."""
        try:
            resident = await self._residency.admit(record, bundle)
            self._on_step("admitted")
            try:
                desired = await self._committed(record, new=new, activate=activate)
            except BaseException:
                self._residency.discard(resident)
                raise
        except BaseException:
            if new:
                self._store.remove(record.digest)
            raise
        self._on_step("committed")
        self._residency.publish(desired, resident)
        self._on_step("published")

    async def _committed(self, record: VersionRecord, *, new: bool, activate: bool) -> Desired:
        if new:
            return await asyncio.to_thread(self._registry.register, record, activate=activate)
        if activate:
            return await asyncio.to_thread(
                self._registry.set_alias, record.task, LIVE, record.version
            )
        return self.live.snapshot.desired

    async def _activate(self, task: str, version: str) -> None:
        desired = await asyncio.to_thread(self._registry.set_alias, task, LIVE, version)
        self._residency.publish(desired)

    async def _drop(self, desired: Desired) -> None:
        """Serve no more what the registry has no more."""
        before = self.live.snapshot.desired.records
        self._residency.publish(desired)
        for key in before.keys() - desired.records.keys():
            await asyncio.to_thread(self._store.remove, before[key].digest)


def _check_names(bundle: Bundle, task: str, version: str) -> None:
    meant, given = f"{task}@{version}", f"{bundle.manifest.task}@{bundle.manifest.version}"
    if meant != given:
        raise RequestError(f"the bundle is {given}, not {meant}", code="name_mismatch")
    if task in RESERVED_NAMES:
        raise RequestError(f"no task can be called {task}", code="reserved_name")
