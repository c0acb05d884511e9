"""Which versions are on the device: how they get there, who makes room for them, how they leave.

Versions that DDAS may choose, or that an operator holds on to, stay (`protected`). The others are
there while there is room: the least recently used leave first, to memory and then to the disk, and
come back when they are asked for (docs/adr/0019). What should be served is the registry's to say,
and how that changes is for `tasks.py`. Belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, nullcontext
from pathlib import Path

from medley.bundle import Bundle
from medley.errors import BundleError, CapacityError, MedleyError
from medley.routed import PackedTask
from service.bundles.store import BundleStore
from service.errors import ConflictError, NotFoundError, StorageError, UnavailableError
from service.registry.desired import Desired, VersionRecord
from service.signals.metrics import OTHER, Metrics
from service.versions.host_tier import HostTier, Prepared
from service.versions.live import Key, LabelSet, Leaving, Live, Resident, Snapshot
from service.versions.loading import Loader
from service.versions.unified import UnifiedModels
from service.wire.rollout_schemas import candidates

__all__ = ["Residency", "protected"]

log = logging.getLogger(__name__)
FETCHES = 2  # at once: a store that hangs must not take all threads


class Residency:
    """Brings versions to the device and publishes the snapshot that requests answer from.

    Args:
        store: where the bundles are.
        unified: reads what several of them are loaded from.
        loader: what loads and unloads them.
        metrics: told what is where.
        max_host_bytes: for versions that are kept ready in memory.
        unload_s: how long a version that leaves may be waited for, and after which it is reported.
    """

    def __init__(
        self,
        *,
        store: BundleStore,
        unified: UnifiedModels,
        loader: Loader,
        metrics: Metrics,
        max_host_bytes: int,
        unload_s: float,
    ) -> None:
        self._store = store
        self._unified = unified
        self._loader = loader
        self._metrics = metrics
        self._unload_s = unload_s
        self._host = HostTier(max_host_bytes)
        self._used_s: dict[Key, float] = {}  # when each resident was last asked for
        self._coming: frozenset[Key] = frozenset()  # protected by the state that is being followed
        self._ahead: dict[str, Resident] = {}  # loaded for it, by digest; nobody sees them yet
        self._refused: dict[str, str] = {}  # what it will have as failed: why, by digest
        self._attempts: Counter[Key] = Counter()  # loads that failed since one did not
        self._squeezed: set[Key] = set()  # failed, as there was no room: another state may have it
        self.lacking: dict[Key, str] = {}  # what could not be had for it at the last try: why
        self._held: Counter[Key] = Counter()  # not to be evicted: somebody is about to use it
        self._bringing: dict[Key, asyncio.Task[None]] = {}
        self._fetching = asyncio.Semaphore(FETCHES)
        self._reading = asyncio.Lock()  # one bundle at a time is in memory
        self._room = asyncio.Lock()  # what is freed for one version is not taken by another
        self._moved = asyncio.Event()  # a path has been freed, or is not held any more
        self.live = Live(unload=self._unload)
        metrics.before_scrape.append(self._measure)

    async def fill(self) -> None:
        """Load versions that need not be here, while there is room for them."""
        for record in self.live.snapshot.desired.versions:
            if len(self.live.snapshot.residents) == self._loader.paths:
                return  # where slots are short, a smaller one may still find room
            try:
                if not (self._has(record) or self._has_failed(record)):
                    await self._load(record, evict=False)
            except (CapacityError, StorageError) as error:
                log.debug("%s@%s is not loaded yet: %s", record.task, record.version, error)
            except MedleyError as error:
                self._fail(record, error)

    async def follow(self, desired: Desired, *admitted: Resident) -> None:
        """Serve by `desired` as a whole: load what it protects and is not here, and flip then.

        Until the flip everything is answered as before. A version that is refused, or for which
        there is no room, is marked in the new state. Only where the device has no room for what
        leaves and what comes at once, what comes is loaded after the flip.

        Args:
            desired: what the registry says.
            admitted: what has been loaded for it already.

        Raises:
            StorageError, UnavailableError: something cannot be had now. What was served still is,
                and what has been loaded is kept for the next call; `lacking` says what is missing.
        """
        self._ahead |= {one.record.digest: one for one in admitted}
        self._coming, self.lacking = protected(desired), {}
        try:
            self._let_go(desired)
            missing = self._missing(desired, again=self._squeezed)
            late = [one for one in missing if not await self._had(one)]
            self._flip_ahead(desired)
            for record in late:
                await self._bring_late(record)
        finally:
            self._coming = frozenset()
            self._squeezed &= self.live.snapshot.failed.keys()

    @property
    def complete(self) -> bool:
        """Whether everything is here that has to be, or is known not to work."""
        return not self.loading

    @property
    def loading(self) -> frozenset[Key]:
        """What the state that is served protects and is yet to come: there was no room before."""
        missing = self._missing(self.live.snapshot.desired)
        return frozenset((record.task, record.version) for record in missing)

    def attempts(self, key: Key) -> int:
        """How often loading a version has failed since it last did not."""
        return self._attempts[key]

    async def bring(self, key: Key, *, again: bool = False) -> None:
        """Have a version on the device; counts as a use. However many ask, it is loaded once.

        Whoever waits here must have no lease: room may have to be made, which waits for leases.

        Args:
            key: task and version.
            again: try once more if the version has failed before.

        Raises:
            NotFoundError: no such version.
            UnavailableError: it cannot be loaded (code `version_failed`), or what has to leave for
                it is in use for longer than `unload_s` (`device_busy`).
            CapacityError: nothing that could leave would make room for it.
        """
        snapshot = self.live.snapshot
        record = snapshot.desired.records.get(key)
        if record is None:
            raise NotFoundError(f"no version {key[1]} of {key[0]}", code="unknown_version")
        if key in snapshot.residents:
            self._used_s[key] = time.monotonic()
            return
        if key in snapshot.failed and not again:
            raise _failure(record)
        await asyncio.shield(self._bringing.get(key) or self._start(record))

    @asynccontextmanager
    async def holding(self, key: Key, *, again: bool = False) -> AsyncIterator[None]:
        """Bring a version, and let nobody evict it until the block ends.

        Args, Raises: as for `bring`.
        """
        self._held[key] += 1
        try:
            await self.bring(key, again=again)
            yield
        finally:
            self._held -= Counter([key])  # and forgets it at 0
            self._moved.set()

    @asynccontextmanager
    async def lease(self, key: Key | None, *, holder: str = "") -> AsyncIterator[Snapshot]:
        """Lease the snapshot of now, in which a version is on the device; see `Live.lease`.

        Args:
            key: the version; None asks for none.
            holder: who takes the lease, for the log.

        Raises: as for `bring`.
        """
        with ExitStack() as lease:
            async with self.holding(key) if key else nullcontext():
                snapshot = lease.enter_context(self.live.lease(holder))
            yield snapshot

    async def admit(self, record: VersionRecord, bundle: Bundle) -> Resident:
        """Put a version on the device and prove it; nobody sees it before it is published.

        Raises:
            BundleError: it is not what it says, or its unified model is not here; nothing has
                changed.
            CapacityError: nothing that could leave would make room for it; nothing has changed.
            UnavailableError: what has to leave for it is in use for too long.
        """
        with self._counted(record):
            prepared = await self._loader.prepare(bundle, await self._unified.of(record))
            resident = await self._admit(record, prepared, evict=True)
        self._keep(record, prepared)
        return resident

    def unload(self, key: Key) -> None:
        """Take a version off the device, if it is there; a request for it brings it back.

        Raises:
            NotFoundError: no such version.
            ConflictError: it has to stay, or somebody is about to use it (code `version_in_use`).
        """
        snapshot = self.live.snapshot
        if key not in snapshot.desired.records:
            raise NotFoundError(f"no version {key[1]} of {key[0]}", code="unknown_version")
        if key in protected(snapshot.desired) | self._coming or key in self._held:
            raise ConflictError(f"{'@'.join(key)} has to stay", code="version_in_use")
        self._take_off([key])

    def discard(self, resident: Resident) -> None:
        """Unload what was admitted and will not be published."""
        self._host.drop(resident.record.digest)
        self._unload(resident.path)

    def publish(self, desired: Desired, *admitted: Resident) -> None:
        """Serve by `desired` from now on, with what was just admitted; what it lacks is let go."""
        self._switch(desired, admitted, {})

    def read(self, path: Path) -> Bundle:
        """Read and verify a bundle file, on this thread; BundleError if it is none."""
        return self._loader.read(path)

    def _let_go(self, desired: Desired) -> None:
        """Forget what was loaded or refused for a state that never came."""
        wanted = {record.digest for record in desired.versions}
        for digest in self._ahead.keys() - wanted:
            self.discard(self._ahead.pop(digest))
        self._refused = {d: reason for d, reason in self._refused.items() if d in wanted}
        known = desired.records
        self._attempts = Counter({key: n for key, n in self._attempts.items() if key in known})

    def _missing(self, desired: Desired, *, again: Collection[Key] = ()) -> list[VersionRecord]:
        """What a state protects and is neither here nor known not to work; live ones first."""
        before, live = protected(self.live.snapshot.desired), set(desired.live.items())
        keys = sorted(protected(desired) & desired.records.keys(), key=lambda k: (k not in live, k))
        records = (desired.records[key] for key in keys)
        return [
            record
            for record in records
            if not self._has(record)
            and record.digest not in self._ahead.keys() | self._refused.keys()
            and not (
                self._has_failed(record)
                and (record.task, record.version) in before.difference(again)
            )
        ]

    def _has(self, record: VersionRecord) -> bool:
        """Whether this very version is on the device."""
        resident = self.live.snapshot.residents.get((record.task, record.version))
        return resident is not None and resident.record.digest == record.digest

    def _knows(self, record: VersionRecord) -> bool:
        """Whether what is served now has this very version."""
        key = (record.task, record.version)
        return _digest(self.live.snapshot.desired, key) == record.digest

    def _has_failed(self, record: VersionRecord) -> bool:
        key = (record.task, record.version)
        return key in self.live.snapshot.failed and self._knows(record)

    async def _had(self, record: VersionRecord) -> bool:
        """Have a version on the device before the flip, or know that it is refused.

        Returns:
            False: there is no room for it while the state before is served.
        """
        key = (record.task, record.version)
        try:
            if self._knows(record):
                await self.bring(key, again=True)
            else:
                self._ahead[record.digest] = await self._loaded(record, evict=True)
        except CapacityError:
            return False
        except MedleyError as error:
            self._fails(record, error)
        return True

    def _fails(self, record: VersionRecord, error: MedleyError) -> None:
        """Refuse a version for the state to come, or raise `error` if it may work the next time."""
        key = (record.task, record.version)
        if isinstance(error, UnavailableError) and error.code == "version_failed":
            self._refused[record.digest] = self.live.snapshot.failed[key]
        elif isinstance(error, StorageError | UnavailableError):
            self.lacking[key] = str(error)
            raise error
        else:
            log.error("%s@%s cannot be served: %s", *key, error)
            self._host.drop(record.digest)
            self._refused[record.digest] = str(error)

    def _flip_ahead(self, desired: Desired) -> None:
        """Flip to a state with what was loaded and refused for it."""
        ahead, refused = tuple(self._ahead.values()), self._refused
        self._ahead, self._refused, self.lacking = {}, {}, {}
        failed = ((one, refused.get(one.digest)) for one in desired.versions)
        why = {(one.task, one.version): reason for one, reason in failed if reason is not None}
        self._switch(desired, ahead, why)

    def _switch(
        self, desired: Desired, admitted: Sequence[Resident], refused: dict[Key, str]
    ) -> None:
        before, new = self.live.snapshot, {one.key: one for one in admitted}
        for record in set(before.desired.versions) - set(desired.versions):
            self._host.drop(record.digest)
        no_more_protected = protected(before.desired) - protected(desired)
        self._used_s |= dict.fromkeys(new.keys() | no_more_protected, time.monotonic())
        failed = {
            key: reason
            for key, reason in before.failed.items()
            if key not in new and _digest(desired, key) == _digest(before.desired, key)
        }
        self._flip(desired, before.residents | new, failed | refused)

    async def _bring_late(self, record: VersionRecord) -> None:
        """Bring a version for which there was no room before what was served left."""
        try:
            await self.bring((record.task, record.version), again=True)
        except CapacityError as error:
            self._fail(record, error)
            self._squeezed.add((record.task, record.version))
        except UnavailableError as error:
            if error.code != "version_failed":
                raise

    def _start(self, record: VersionRecord) -> asyncio.Task[None]:
        """Begin to bring a version; goes on whoever of those that wait for it gives up."""
        key = (record.task, record.version)

        def ended(task: asyncio.Task[None]) -> None:
            del self._bringing[key]
            if not task.cancelled():
                task.exception()  # seen, even if nobody waits any more

        task = self._bringing[key] = asyncio.create_task(self._bring(record))
        task.add_done_callback(ended)
        return task

    async def _bring(self, record: VersionRecord) -> None:
        try:
            await self._load(record, evict=True)
        except BundleError as error:
            self._fail(record, error)
            raise _failure(record) from error
        except StorageError as error:
            at = f"{record.task}@{record.version}"
            raise UnavailableError(f"{at} cannot be had now", code="version_unloaded") from error

    async def _load(self, record: VersionRecord, *, evict: bool) -> None:
        """Bring a registered version to the device and publish it."""
        resident = await self._loaded(record, evict=evict)
        desired = self.live.snapshot.desired
        if not _wanted(resident, desired):
            self.discard(resident)
            gone = f"no version {record.version} of {record.task} any more"
            raise NotFoundError(gone, code="unknown_version")
        self.publish(desired, resident)

    async def _loaded(self, record: VersionRecord, *, evict: bool) -> Resident:
        """Bring a version to the device, where nobody sees it before it is published."""
        with self._counted(record):
            prepared = self._host.get(record.digest) or await self._from_disk(record)
            self._keep(record, prepared)  # room or not: to ask again must not cost a file each time
            return await self._admit(record, prepared, evict=evict)

    async def _from_disk(self, record: VersionRecord) -> Prepared:
        async with self._fetching:
            path = await asyncio.to_thread(self._store.fetch, record.digest)
        unified = await self._unified.of(record)
        async with self._reading:
            bundle = await asyncio.to_thread(self._loader.read, path)
            if bundle.digest != record.digest:
                raise BundleError(["the bundle in the store is another one"], code="damaged")
            return await self._loader.prepare(bundle, unified)

    def _fail(self, record: VersionRecord, error: MedleyError) -> None:
        """Remember that a version cannot be served, unless it is gone."""
        log.error("%s@%s cannot be served: %s", record.task, record.version, error)
        self._host.drop(record.digest)
        snapshot = self.live.snapshot
        failed = snapshot.failed | {(record.task, record.version): str(error)}
        self._flip(snapshot.desired, snapshot.residents, failed)

    async def _admit(self, record: VersionRecord, prepared: Prepared, *, evict: bool) -> Resident:
        """Load what is prepared, if need be in the place of others."""
        async with self._room:
            if evict:
                await self._make_room(prepared.packed.task)
            return _resident(record, await self._loader.load(prepared), prepared)

    def _keep(self, record: VersionRecord, prepared: Prepared) -> None:
        """Keep a version ready in memory."""
        here = {one.record.digest for one in self.live.snapshot.residents.values()}
        self._host.put(record.digest, prepared, on_device=here | {record.digest})

    async def _make_room(self, task: PackedTask) -> None:
        """Evict as few of the least recently used as make room, and wait until they are gone.

        If even all of them would not do, none is, and the model says what is missing.
        """
        try:
            async with asyncio.timeout(self._unload_s):
                victims = await self._choose(task)
            if victims is None or not (victims or self.live.leaving):
                return
            self._evict(victims)
            async with asyncio.timeout(self._unload_s):
                await self._until_room(task)
        except TimeoutError as error:
            raise UnavailableError(
                "room is being made, but requests still use what leaves", code="device_busy"
            ) from error

    async def _choose(self, task: PackedTask) -> list[Key] | None:
        """Whom to evict, such that nobody has asked for it by the time it is known."""
        while True:
            self._moved.clear()
            residents = self.live.snapshot.residents
            key_of = {residents[key].path: key for key in self._evictable()}
            held = self._held.keys() & residents.keys()
            leaving = [one.path for one in self.live.leaving]
            paths = await self._loader.victims(task, leaving, list(key_of))
            victims = [key_of[path] for path in paths or ()]
            if paths is not None and set(victims) <= set(self._evictable()):
                return victims
            if paths is None and not held:
                return None
            if paths is None:
                await self._moved.wait()  # who holds a version is about to lease it, and lets go

    async def _until_room(self, task: PackedTask) -> None:
        while True:
            self._moved.clear()
            if await self._loader.has_room(task):
                return
            await self._moved.wait()

    def _evictable(self) -> list[Key]:
        """What may leave, the least recently used first."""
        snapshot = self.live.snapshot
        stay = protected(snapshot.desired) | self._coming | self._held.keys()
        free = snapshot.residents.keys() - stay
        return sorted(free, key=lambda key: self._used_s[key])

    def _evict(self, keys: Sequence[Key]) -> None:
        now_s = time.monotonic()
        for key in keys:
            self._metrics.bundle_evictions.inc()
            self._metrics.bundle_age_at_eviction_s.observe(now_s - self._used_s[key])
        self._take_off(keys)

    def _take_off(self, keys: Sequence[Key]) -> None:
        snapshot = self.live.snapshot
        residents = {k: r for k, r in snapshot.residents.items() if k not in keys}
        if len(residents) < len(snapshot.residents):
            self._flip(snapshot.desired, residents, snapshot.failed)

    def _flip(
        self, desired: Desired, residents: dict[Key, Resident], failed: dict[Key, str]
    ) -> None:
        """Publish what of this is desired, and watch over what leaves."""
        residents = {key: one for key, one in residents.items() if _wanted(one, desired)}
        self._used_s = {key: used_s for key, used_s in self._used_s.items() if key in residents}
        leaving = self.live.publish(
            Snapshot(
                desired,
                residents,
                {key: reason for key, reason in failed.items() if key in desired.records},
                self._host.digests,
            )
        )
        for one in leaving:
            asyncio.get_running_loop().call_later(self._unload_s, self._report_late, one)

    def _report_late(self, leaving: Leaving) -> None:
        if leaving in self.live.leaving:
            self._metrics.unloads_late.inc()
            log.warning(
                "path %d has not been free to unload for %g s; requests that may use it: %s",
                leaving.path,
                self._unload_s,
                ", ".join(self.live.holders(leaving)),
            )

    def _unload(self, path: int) -> None:
        """Free a path that nobody uses; whoever waits for room looks again."""
        loop = asyncio.get_running_loop()

        def freed() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._moved.set)

        self._loader.unload(path, freed)

    def _measure(self) -> None:
        """Say what is where; before each scrape."""
        snapshot, metrics = self.live.snapshot, self._metrics
        metrics.bundle_resident.clear()
        for task, version in snapshot.desired.records:
            tier = snapshot.tier((task, version))
            if tier != "disk":
                pinned = "true" if (task, version) in snapshot.desired.pinned else "false"
                label = metrics.task_label(task)
                shown = version if label == task else OTHER  # versions beyond the cap are added up
                metrics.bundle_resident.labels(label, shown, tier, pinned).inc()
        on_device = sum(one.size_bytes for one in snapshot.residents.values())
        metrics.bundle_bytes.labels("device").set(on_device)
        metrics.bundle_bytes.labels("host").set(self._host.size_bytes)
        on_disk = {record.digest: record.size_bytes or 0 for record in snapshot.desired.versions}
        metrics.bundle_bytes.labels("disk").set(sum(on_disk.values()))

    @contextmanager
    def _counted(self, record: VersionRecord) -> Iterator[None]:
        try:
            yield
        except MedleyError as error:
            self._attempts[record.task, record.version] += 1
            self._metrics.bundle_loads.labels("refused").inc(not isinstance(error, StorageError))
            self._metrics.self_test_failures.inc(error.code == "self_test_failed")
            raise
        self._attempts.pop((record.task, record.version), None)
        self._metrics.bundle_loads.labels("ok").inc()


def protected(desired: Desired) -> frozenset[Key]:
    """Versions that are never evicted: named by an alias or a rollout, or pinned.

    Live versions are among them: DDAS may choose any of them for any image.
    """
    named = {(task, v) for task, names in desired.aliases.items() for v in names.values()}
    return desired.pinned | named | candidates(desired)


def _resident(record: VersionRecord, path: int, prepared: Prepared) -> Resident:
    packed = prepared.packed
    manifest = packed.bundle.manifest
    names = tuple(manifest.class_names)
    own_CE = packed.bundle.tensors["class_text_features"].float()
    return Resident(
        record=record,
        path=path,
        templates=tuple(manifest.templates),
        own=LabelSet("task", names, own_CE),
        zero_shot=LabelSet("task", names, prepared.zero_shot_CE),
        threshold=packed.selector.threshold,
        size_bytes=packed.size_bytes,
    )


def _digest(desired: Desired, key: Key) -> str | None:
    record = desired.records.get(key)
    return None if record is None else record.digest


def _wanted(resident: Resident, desired: Desired) -> bool:
    """Whether the registry still has this very version."""
    return _digest(desired, resident.key) == resident.record.digest


def _failure(record: VersionRecord) -> UnavailableError:
    at = f"{record.task}@{record.version}"
    return UnavailableError(f"{at} could not be loaded", code="version_failed")
