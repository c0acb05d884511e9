"""Which versions are on the device: how a verified bundle gets there, and leaves.

Knows what is on the device and publishes it; what should be served is the registry's to say, and
how that changes is for `service/tasks.py`. Belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

from medley.admission import PackedBundle, admit, pack, retire
from medley.bundle import Bundle, read_bundle
from medley.classifier import Classifier
from medley.errors import MedleyError
from medley.prompts import class_text_features
from service.engine import Engine
from service.errors import ConflictError
from service.live import Key, LabelSet, Live, Resident, Snapshot
from service.metrics import Metrics
from service.registry import Desired, VersionRecord
from service.store import BundleStore

__all__ = ["Residency"]

log = logging.getLogger(__name__)


class Residency:
    """Loads and unloads versions, and publishes the snapshot that requests answer from."""

    def __init__(
        self,
        *,
        store: BundleStore,
        engine: Engine,
        classifier: Classifier,
        metrics: Metrics,
        max_bundle_bytes: int,
    ) -> None:
        self._store = store
        self._engine = engine
        self._classifier = classifier
        self._metrics = metrics
        self._max_bundle_bytes = max_bundle_bytes
        self.live = Live(unload=self._unload_later)

    async def restore(self, desired: Desired) -> None:
        """Load what the registry wants; a version that cannot be loaded is marked, not fatal."""
        residents: dict[Key, Resident] = {}
        failed: dict[Key, str] = {}
        live_first = sorted(desired.versions, key=lambda r: desired.live.get(r.task) != r.version)
        for record in live_first:
            key = (record.task, record.version)
            try:
                residents[key] = await self._restored(record)
            except MedleyError as error:
                log.error("%s@%s cannot be served: %s", record.task, record.version, error)
                failed[key] = str(error)
        self._flip(Snapshot(desired, residents, failed))

    async def admit(self, record: VersionRecord, bundle: Bundle) -> Resident:
        """Put a version on the device and prove it; nobody sees it before it is published.

        Raises:
            BundleError, CapacityError: it does not fit; nothing has changed.
        """
        start_s = time.monotonic()
        try:
            packed = await asyncio.to_thread(pack, bundle, self._classifier)
            resident = await asyncio.wrap_future(
                self._engine.run(lambda: self._admit(record, packed))
            )
        except MedleyError:
            self._metrics.bundle_loads.labels("refused").inc()
            raise
        self._metrics.bundle_loads.labels("ok").inc()
        self._metrics.bundle_load_s.observe(time.monotonic() - start_s)
        return resident

    def discard(self, resident: Resident) -> None:
        """Unload what was admitted and will not be published."""
        self._unload_later(resident.path)

    def publish(self, desired: Desired, admitted: Resident | None = None) -> None:
        """Serve by `desired` from now on, with what was just admitted; what it lacks is let go."""
        snapshot = self.live.snapshot
        residents, failed = dict(snapshot.residents), dict(snapshot.failed)
        if admitted is not None:
            key = (admitted.record.task, admitted.record.version)
            residents[key] = admitted
            failed.pop(key, None)
        known = desired.records
        self._flip(
            Snapshot(
                desired,
                {key: resident for key, resident in residents.items() if key in known},
                {key: reason for key, reason in failed.items() if key in known},
            )
        )

    def read(self, path: Path) -> Bundle:
        """Read and verify a bundle file; BundleError if it is none."""
        return read_bundle(path, max_bytes=self._max_bundle_bytes)

    async def _restored(self, record: VersionRecord) -> Resident:
        bundle = await asyncio.to_thread(self.read, self._store.path(record.digest))
        if bundle.digest != record.digest:
            raise ConflictError("the bundle in the store is another one", code="version_exists")
        return await self.admit(record, bundle)

    def _admit(self, record: VersionRecord, packed: PackedBundle) -> Resident:
        """Runs on the engine's thread."""
        bundle, model = packed.bundle, self._classifier.model
        manifest = bundle.manifest
        names = tuple(manifest.class_names)
        path = admit(packed, self._classifier)
        try:
            zero_shot = class_text_features(model, names, manifest.templates)
        except BaseException:
            retire(path, self._classifier)
            raise
        return Resident(
            record=record,
            path=path,
            templates=tuple(manifest.templates),
            own=LabelSet("task", names, bundle.tensors["class_text_features"].float()),
            zero_shot=LabelSet("task", names, zero_shot.cpu()),
            threshold=packed.selector.threshold,
        )

    def _unload_later(self, path: int) -> None:
        self._engine.run(lambda: retire(path, self._classifier))

    def _flip(self, snapshot: Snapshot) -> None:
        before, after = self.live.snapshot.residents, snapshot.residents
        for task, version in before.keys() - after.keys():
            self._metrics.bundle_resident.remove(task, version)
        for task, version in after:
            self._metrics.bundle_resident.labels(task, version).set(1)
        self._metrics.generation.labels("desired").set(snapshot.desired.generation)
        self._metrics.generation.labels("observed").set(snapshot.desired.generation)
        self.live.publish(snapshot)
