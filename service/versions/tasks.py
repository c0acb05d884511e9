"""The life of a task version on this server: taken in, live, rolled back, gone, restored at start.

Order of every change: catch up with the registry, which replicas may share; bytes to the store,
admission on the device (`residency.py`), one registry transaction, flip of the pointer in memory.
So a crash leaves the registry before or after, and nothing is reported live that is not. One change
at a time; requests go on meanwhile. A change that has begun is made whole, whoever has given up
waiting for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from medley.bundle import Bundle
from medley.errors import MedleyError
from service.bundles.sources import Sources
from service.bundles.store import BundleStore, Upload
from service.errors import (
    ConflictError,
    PreconditionError,
    RequestError,
    StorageError,
    UnavailableError,
)
from service.registry.desired import LIVE, Desired, IfMatch, VersionRecord, now
from service.registry.registry import Registry
from service.replicas.quorum import Reached
from service.replicas.reconciler import Reconciler
from service.signals.metrics import NOBODY, OTHER, ZERO_SHOT_LABEL
from service.versions.live import Key, Live, Resident, Snapshot
from service.versions.operations import Operations, Started
from service.versions.overlap import Overlap
from service.versions.residency import Residency
from service.versions.unified import UnifiedModels
from service.wire.rollout_schemas import RolloutRecord, candidates, read_record

__all__ = ["RESERVED_NAMES", "Registered", "Tasks", "Then", "Wanted"]

log = logging.getLogger(__name__)
RESERVED_NAMES = frozenset({"auto", "base", ZERO_SHOT_LABEL, NOBODY, OTHER})  # models, metrics
T = TypeVar("T")


@dataclass(frozen=True)
class Wanted:
    """A registration as it is asked for."""

    task: str
    version: str
    activate: bool = True
    if_match: IfMatch | None = None
    only_new: bool = False  # not even the very same bundle may be there

    @property
    def key(self) -> Key:
        """Task and version."""
        return self.task, self.version

    def check(self, desired: Desired) -> None:
        """Tell before the first byte what can be told.

        Raises:
            RequestError: no task can be called so.
            PreconditionError: a condition does not hold.
        """
        if self.task in RESERVED_NAMES:
            raise RequestError(f"no task can be called {self.task}", code="reserved_name")
        if self.if_match is not None:
            self.if_match.check(self.task, desired.changed.get(self.task))
        if self.only_new and (self.task, self.version) in desired.records:
            raise PreconditionError(f"version {self.version} of {self.task} is there already")


@dataclass(frozen=True)
class Registered:
    """What became of a registration; `created` is False if that very bundle was there."""

    record: VersionRecord
    created: bool
    snapshot: Snapshot  # what is served since
    warnings: tuple[str, ...] = ()
    reached: Reached | None = None  # how many replicas have it, if that was asked

    @property
    def replicas(self) -> dict[str, Any] | None:
        """The same as plain data."""
        return None if self.reached is None else asdict(self.reached)


Then = Callable[[Registered], Awaitable[Registered]]  # what is left to do before it is done


async def _as_it_is(registered: Registered) -> Registered:
    return registered


class Tasks:
    """All changes of what is served. Belongs to the event loop's thread.

    Every change but a registration returns what is served since. `on_step` hears where a
    registration is; tests die there.
    """

    def __init__(
        self,
        *,
        registry: Registry,
        store: BundleStore,
        sources: Sources,
        unified: UnifiedModels,
        residency: Residency,
        reconciler: Reconciler,
        overlap: Overlap,
        max_bundle_bytes: int,
        on_step: Callable[[str], None] = lambda step: None,
    ) -> None:
        self._registry = registry
        self._store = store
        self._sources = sources
        self._unified = unified
        self._residency = residency
        self._reconciler = reconciler
        self._overlap = overlap
        self._max_bundle_bytes = max_bundle_bytes
        self._on_step = on_step
        self._verifying = asyncio.Lock()  # one bundle at a time is in memory
        self._changes = asyncio.Lock()
        self.operations = Operations()

    @property
    def live(self) -> Live:
        """What is served now."""
        return self._residency.live

    async def restore(self) -> None:
        """Load what the registry wants; a version that is refused is marked, not fatal.

        Raises:
            UnavailableError, StorageError: the registry, or a bundle, cannot be had now.
        """
        desired = await asyncio.to_thread(self._registry.read)
        await asyncio.to_thread(self._store.clean, desired.files)
        await self._reconciler.follow(desired)
        await self._residency.fill()

    async def catch_up(self) -> None:
        """Serve by what the registry says now, once it is this one's turn; see `Reconciler`."""
        await self._change(_nothing())

    async def retry(self, key: Key) -> None:
        """Try a version once more that was refused; it stays as it is if it still is.

        Raises: as for `Residency.bring`.
        """
        await self._change(self._residency.bring(key, again=True))

    async def retry_from(self, unified: str) -> None:
        """Try once more all that failed and is loaded from this unified model."""
        snapshot = self.live.snapshot
        for key in sorted(snapshot.failed):
            if snapshot.desired.records[key].unified == unified:
                with suppress(MedleyError):  # it is marked, and says why
                    await self.retry(key)

    async def close(self) -> None:
        """Give up registrations that wait, make whole what has begun, and return then."""
        await self.operations.close()

    async def receive(
        self, wanted: Wanted, chunks: AsyncIterator[bytes], *, then: Then = _as_it_is
    ) -> Started[Registered]:
        """Take the bytes of a bundle in; what follows is an operation that nobody need wait for.

        A version that is there with the same digest is not loaded again. `then` is the end of the
        operation, when all that concerns this server is done. It may end with
            BundleError, CapacityError: it does not fit; nothing has changed.
            RequestError: the bundle is for another task or version.
            ConflictError: that version exists with another digest.

        Raises:
            RequestError, PreconditionError: see `Wanted.check`.
            UnavailableError: the registry is away.
            PayloadError, StorageError: too large, or the disk does not take it.
        """
        await self._check(wanted)
        upload = self._store.upload(self._max_bundle_bytes)
        try:
            async for chunk in chunks:
                await asyncio.to_thread(upload.write, chunk)
            await asyncio.to_thread(upload.finish)
            self._on_step("received")
            return self._start(wanted, self._register(wanted, upload, then))
        except BaseException:
            upload.discard()
            raise

    async def fetch(
        self, wanted: Wanted, source: str, *, then: Then = _as_it_is
    ) -> Started[Registered]:
        """Get a bundle from one of the sources; as `receive`, and the fetch is in the operation.

        If it names a unified model that is not here, that is got from beside it.

        Raises:
            AccessError, RequestError: this source may not be fetched.
            RequestError, PreconditionError: see `Wanted.check`.
            UnavailableError: the registry is away.
        """
        self._sources.check(source)
        await self._check(wanted)
        return self._start(wanted, self._fetch(wanted, source, then))

    async def set_alias(
        self, task: str, alias: str, version: str, *, if_match: IfMatch | None = None
    ) -> Snapshot:
        """Let an alias name a version, which must work here; `live` makes it live.

        Raises:
            RequestError: no alias can be called so.
            NotFoundError, ConflictError, PreconditionError: as `Registry.set_alias`.
            UnavailableError, CapacityError: the version cannot be brought to the device.
        """
        if alias in RESERVED_NAMES:
            raise RequestError(f"no alias can be called {alias}", code="reserved_name")
        return await self._change(self._set_alias((task, version), alias, if_match))

    async def delete_alias(
        self, task: str, alias: str, *, if_match: IfMatch | None = None
    ) -> Snapshot:
        """Forget an alias; see `Registry.delete_alias`."""
        return await self._change(
            self._apply(lambda: self._registry.delete_alias(task, alias, if_match=if_match))
        )

    async def rollback(self, task: str, *, if_match: IfMatch | None = None) -> Snapshot:
        """Make the version live that was live before, which must work here."""
        return await self._change(self._rollback(task, if_match))

    async def set_pinned(
        self, task: str, version: str, pinned: bool, *, if_match: IfMatch | None = None
    ) -> Snapshot:
        """Keep a version on the device, or let it be evicted again."""

        def change() -> Desired:
            return self._registry.set_pinned(task, version, pinned, if_match=if_match)

        needed = self._promise((task, version), if_match, change) if pinned else self._apply(change)
        return await self._change(needed)

    async def set_rollout(
        self,
        task: str,
        text: str | None,
        *,
        version: str | None = None,
        if_match: IfMatch | None = None,
    ) -> Snapshot:
        """Keep a task's rollout; `version` is the candidate, which must work here."""

        def change() -> Desired:
            return self._registry.set_rollout(task, text, if_match=if_match)

        return await self._change(self._promise((task, version or ""), if_match, change))

    async def stop_rollout(self, task: str, record: RolloutRecord) -> None:
        """Keep why a rollout was stopped, unless it has become another one meanwhile."""
        desired = self.live.snapshot.desired
        text = desired.rollouts.get(task)
        if text is not None and read_record(text).id == record.id:
            unchanged = IfMatch(frozenset({desired.changed[task]}))
            await self.set_rollout(task, record.model_dump_json(), if_match=unchanged)

    async def delete_version(
        self, task: str, version: str, *, if_match: IfMatch | None = None
    ) -> Snapshot:
        """Remove a version that no alias names and no rollout tries."""

        def delete() -> Desired:
            if (task, version) in candidates(self.live.snapshot.desired):
                raise ConflictError(f"{task}@{version} is being tried", code="version_in_use")
            return self._registry.delete_version(task, version, if_match=if_match)

        return await self._change(self._apply(delete))

    async def delete_task(self, task: str, *, if_match: IfMatch | None = None) -> Snapshot:
        """Remove a task; requests in flight still get its answers."""
        return await self._change(
            self._apply(lambda: self._registry.delete_task(task, if_match=if_match))
        )

    async def _check(self, wanted: Wanted) -> None:
        """See that it is worth a bundle's bytes, by what is served, or else by the registry."""
        served = self.live.snapshot.desired
        with suppress(PreconditionError):
            wanted.check(served)
            if self._registry.up:
                return
        wanted.check(await asyncio.to_thread(self._registry.read, served))

    def _start(self, wanted: Wanted, work: Coroutine[Any, Any, Registered]) -> Started[Registered]:
        return self.operations.start("register", wanted.task, wanted.version, work)

    async def _fetch(self, wanted: Wanted, source: str, then: Then) -> Registered:
        with self._store.upload(self._max_bundle_bytes) as upload:
            await self._sources.fetch(source, upload)
            self._on_step("received")
            await self._fetch_unified(upload, source)
            return await self._register(wanted, upload, then)

    async def _fetch_unified(self, upload: Upload, source: str) -> None:
        """Have the unified model that a bundle names which was fetched, if it names one."""
        async with self._verifying:
            fusion = (await asyncio.to_thread(self._residency.read, upload.path)).manifest.fusion
        if fusion is not None:  # no other registration waits while a source takes its time
            await self._unified.fetch(fusion.unified, source, self._sources)

    async def _register(self, wanted: Wanted, upload: Upload, then: Then) -> Registered:
        with upload:
            async with self._verifying:
                bundle = await asyncio.to_thread(self._residency.read, upload.path)
                _check_names(bundle, wanted)
                self._on_step("verified")
                registered = await self._change(self._take_in(wanted, upload, bundle))
        if not registered.created:
            return await then(registered)
        pixels_NCHW = bundle.tensors["self_test.pixels"]
        del bundle  # the next may be verified, and is in memory then
        warnings = await self._overlap.warnings((wanted.task, wanted.version), pixels_NCHW)
        return await then(replace(registered, warnings=warnings))

    async def _change(self, change: Coroutine[Any, Any, T]) -> T:
        """Make one change, alone and whole: stopped half way it would leave memory behind."""
        try:
            await self._changes.acquire()
        except BaseException:
            change.close()
            raise
        making = asyncio.create_task(self._caught_up(change))
        making.add_done_callback(lambda _: self._changes.release())
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            await asyncio.wait([making])
            raise

    async def _caught_up(self, change: Coroutine[Any, Any, T]) -> T:
        """Make a change by one who knows the changes that others have made."""
        try:
            await self._reconciler.catch_up()
        except BaseException:
            change.close()
            raise
        return await change

    async def _apply(self, change: Callable[[], Desired]) -> Snapshot:
        """Let the registry change, then serve by it."""
        return await self._serve(await asyncio.to_thread(change))

    async def _serve(self, desired: Desired, *admitted: Resident) -> Snapshot:
        """Serve by what a change has come to, which others may have changed as well.

        Raises:
            UnavailableError: the change is made, and something of theirs cannot be had now.
        """
        try:
            await self._reconciler.follow(desired, *admitted)
        except (StorageError, UnavailableError) as error:
            raise UnavailableError(
                f"it is generation {desired.generation}, which this server cannot serve yet: "
                f"{error}",
                code="behind",
            ) from error
        return self.live.snapshot

    async def _take_in(self, wanted: Wanted, upload: Upload, bundle: Bundle) -> Registered:
        found = await self._found(wanted, bundle.digest)
        if found is not None:
            return found
        key = (wanted.task, wanted.version)
        known = self.live.snapshot.desired.records.get(key)
        record = known or _record(key, bundle, size_bytes=upload.size_bytes)
        if record.unified:
            await asyncio.to_thread(self._store.spare, record.unified)
        await asyncio.to_thread(self._store.keep, upload, bundle.digest)
        self._on_step("stored")
        try:
            await self._admit_and_commit(record, bundle, wanted, new=known is None)
        except ConflictError:  # another replica may have been faster, with the very same bundle
            await self._reconciler.catch_up()
            found = await self._found(wanted, bundle.digest)
            if found is None:
                raise
            return found
        return Registered(record, created=known is None, snapshot=self.live.snapshot)

    async def _found(self, wanted: Wanted, digest: str) -> Registered | None:
        """The answer where that very bundle is there and works; live now, if it is to be.

        Raises:
            ConflictError: that version exists with another digest.
            RequestError, PreconditionError: see `Wanted.check`.
        """
        wanted.check(self.live.snapshot.desired)
        snapshot, key = self.live.snapshot, (wanted.task, wanted.version)
        known = snapshot.desired.records.get(key)
        if known is not None and known.digest != digest:
            raise ConflictError(
                f"version {wanted.version} of {wanted.task} exists with another digest",
                code="version_exists",
            )
        if known is None or key in snapshot.failed:
            return None
        if wanted.activate:
            snapshot = await self._set_alias(key, LIVE, wanted.if_match)
        return Registered(known, created=False, snapshot=snapshot)

    async def _admit_and_commit(
        self, record: VersionRecord, bundle: Bundle, wanted: Wanted, *, new: bool
    ) -> None:
        """Device first, registry second, memory last; undone in reverse if a step is refused."""
        try:
            resident = await self._residency.admit(record, bundle)
            self._on_step("admitted")
            try:
                desired = await asyncio.to_thread(self._committed, record, wanted, new=new)
            except BaseException:
                self._residency.discard(resident)
                raise
        except BaseException:
            if new:
                await self._reconciler.remove(record.digest)
            raise
        self._on_step("committed")
        await self._serve(desired, resident)
        for digest in record.files:
            await self._confirm(digest)
        self._on_step("published")

    async def _confirm(self, digest: str) -> None:
        """See that the other replicas can have what the registry names by now."""
        try:
            await asyncio.to_thread(self._store.confirm, digest)
        except (StorageError, UnavailableError) as error:
            log.warning("whether the shared store has %s is not known: %s", digest, error)

    def _committed(self, record: VersionRecord, wanted: Wanted, *, new: bool) -> Desired:
        task, version, if_match = record.task, record.version, wanted.if_match
        if new:
            return self._registry.register(record, activate=wanted.activate, if_match=if_match)
        if wanted.activate:
            return self._registry.set_alias(task, LIVE, version, if_match=if_match)
        return self._registry.read()

    async def _set_alias(self, key: Key, alias: str, if_match: IfMatch | None) -> Snapshot:
        task, version = key
        return await self._promise(
            key,
            if_match,
            lambda: self._registry.set_alias(task, alias, version, if_match=if_match),
        )

    async def _rollback(self, task: str, if_match: IfMatch | None) -> Snapshot:
        previous = self.live.snapshot.desired.previous.get(task, "")
        return await self._promise(
            (task, previous), if_match, lambda: self._registry.rollback(task, if_match=if_match)
        )

    async def _promise(
        self, key: Key, if_match: IfMatch | None, change: Callable[[], Desired]
    ) -> Snapshot:
        """Have a version on the device before the registry promises it, and until it has."""
        desired = self.live.snapshot.desired
        if key not in desired.records:  # the registry says what is missing
            return await self._apply(change)
        if if_match is not None:
            if_match.check(key[0], desired.changed.get(key[0]))
        async with self._residency.holding(key, again=True):
            desired = await asyncio.to_thread(change)
        return await self._serve(desired)  # holds it from here on, if it is still wanted


async def _nothing() -> None:
    """A change of nothing, for the sake of what goes before every change."""


def _record(key: Key, bundle: Bundle, *, size_bytes: int) -> VersionRecord:
    manifest = bundle.manifest
    return VersionRecord(
        *key,
        bundle.digest,
        now(),
        size_bytes,
        method=manifest.method,
        unified=manifest.fusion.unified if manifest.fusion else "",
    )


def _check_names(bundle: Bundle, wanted: Wanted) -> None:
    meant = f"{wanted.task}@{wanted.version}"
    given = f"{bundle.manifest.task}@{bundle.manifest.version}"
    if meant != given:
        raise RequestError(f"the bundle is {given}, not {meant}", code="name_mismatch")
