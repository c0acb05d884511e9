"""What it takes to get a version to the device and off it: verify, pack, encode, load, prove.

The hands of `residency.py`, which decides what is to be there. Work of the host is done on
other threads, work of the model as jobs between two batches. Belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from medley.admission import admit, pack, prove, retire
from medley.bundle import Bundle, read_bundle
from medley.classifier import Classifier
from medley.prompts import class_text_features
from medley.routed import PackedTask, RoutedModel
from medley.unified import Unified
from service.answers.engine import Engine
from service.errors import UnavailableError
from service.signals.metrics import Metrics
from service.versions.host_tier import Prepared

__all__ = ["Loader"]

log = logging.getLogger(__name__)
T = TypeVar("T")
CHUNK = 16  # prompts per job, so that batches run in between; nobody waits for these


class Loader:
    """Loads versions into a classifier that an engine's thread owns."""

    def __init__(
        self, engine: Engine, classifier: Classifier, metrics: Metrics, *, max_bundle_bytes: int
    ) -> None:
        self._engine = engine
        self._classifier = classifier
        self._metrics = metrics
        self._max_bundle_bytes = max_bundle_bytes

    @property
    def paths(self) -> int:
        """Most versions that can be loaded at once."""
        return self._classifier.model.capacity.paths

    def read(self, path: Path) -> Bundle:
        """Read and verify a bundle file, on this thread; BundleError if it is none."""
        with self._metrics.bundle_load_s.labels("verify").time():
            return read_bundle(path, max_bytes=self._max_bundle_bytes)

    async def prepare(self, bundle: Bundle, unified: Unified | None = None) -> Prepared:
        """Do all for a version that can be done before it goes to the device.

        Args:
            bundle: the version.
            unified: the unified model that it names, if it names one.

        Raises:
            BundleError: it is for another backbone, or a part of another unified model.
            CapacityError: it is larger than the slots here.
        """
        with self._metrics.bundle_load_s.labels("pack").time():
            packed = await asyncio.to_thread(pack, bundle, self._classifier, unified)
        model, manifest = self._classifier.model, bundle.manifest
        names, templates = manifest.class_names, manifest.templates
        size = max(1, CHUNK // len(templates))
        with self._metrics.bundle_load_s.labels("encode").time():
            parts = [
                await self._run(partial(class_text_features, model, part, templates))
                for part in (names[i : i + size] for i in range(0, len(names), size))
            ]
        return Prepared(packed, torch.cat(parts).cpu())

    async def load(self, prepared: Prepared) -> int:
        """Put a version into its slots and run its self-test; undone if nobody waits any more.

        Returns:
            its path.

        Raises:
            BundleError: it does not answer as it did when it was made; nothing stays loaded.
            CapacityError: there is no room for it.
        """
        with self._metrics.bundle_load_s.labels("admit").time():
            loading = asyncio.ensure_future(self._load(prepared))
            try:
                return await asyncio.shield(loading)
            except asyncio.CancelledError:
                loading.add_done_callback(self._undo)
                raise

    def unload(self, path: int, then: Callable[[], object] = lambda: None) -> None:
        """Free a path soon; `then` is called on the engine's thread. A stopped engine keeps it."""
        try:
            self._engine.run(partial(self._retire, path)).add_done_callback(lambda _: then())
        except UnavailableError:
            log.debug("the engine has stopped, path %d stays", path)

    async def has_room(self, task: PackedTask) -> bool:
        """Whether a version could be loaded now."""
        return await self._run(partial(self._classifier.model.has_room, task))

    async def victims(
        self, task: PackedTask, leaving: Sequence[int], paths: Sequence[int]
    ) -> list[int] | None:
        """Which of `paths` have to go for a version, when `leaving` are gone.

        Returns:
            the fewest first ones that do, without those that do not help; None if even all do not.
        """
        return await self._run(partial(_victims, self._classifier.model, task, leaving, paths))

    async def _run(self, job: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._engine.run(job))

    async def _load(self, prepared: Prepared) -> int:
        """One forward of the self-test in each job, so that others wait no longer than for that.

        The first is part of the loading: no batch may run before it is known that one can.
        """
        packed, size = prepared.packed, self._classifier.max_batch
        path = await self._run(partial(self._admit, prepared))
        try:
            for start in range(size, packed.bundle.manifest.self_test.images, size):
                rest = slice(start, start + size)
                await self._run(partial(prove, packed, self._classifier, path, rest))
        except BaseException:
            self.unload(path)
            raise
        return path

    def _undo(self, loading: asyncio.Future[int]) -> None:
        if not loading.cancelled() and loading.exception() is None:
            self.unload(loading.result())

    def _admit(self, prepared: Prepared) -> int:
        """Runs on the engine's thread."""
        try:
            return admit(prepared.packed, self._classifier, images=self._classifier.max_batch)
        finally:
            self._measure_slots()

    def _retire(self, path: int) -> None:
        """Runs on the engine's thread."""
        retire(path, self._classifier)
        self._measure_slots()

    def _measure_slots(self) -> None:
        model, metrics = self._classifier.model, self._metrics
        capacity = model.capacity
        metrics.bundle_slots.labels("free").set(model.free_slots)
        metrics.bundle_slots.labels("used").set(capacity.slots - model.free_slots)
        for kind, free, slots in (
            ("low_rank", model.free_low_rank_slots, capacity.low_rank_slots),
            ("model", model.free_models, capacity.models),
        ):
            metrics.fused_slots.labels(kind, "free").set(free)
            metrics.fused_slots.labels(kind, "used").set(slots - free)


def _victims(
    model: RoutedModel, task: PackedTask, leaving: Sequence[int], paths: Sequence[int]
) -> list[int] | None:
    """Runs on the engine's thread."""

    def does(chosen: Sequence[int]) -> bool:
        return model.has_room(task, {*leaving, *chosen})

    if not does(paths):
        return None
    fewest = bisect_left(range(len(paths)), True, key=lambda n: does(paths[:n]))
    chosen = list(paths[:fewest])
    for path in chosen[:-1]:
        rest = [other for other in chosen if other != path]
        chosen = rest if does(rest) else chosen
    return chosen
