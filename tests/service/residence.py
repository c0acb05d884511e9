"""A device with little room and what decides who is on it, without HTTP and without a registry."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from medley.backbone import Backbone
from medley.bundle import Bundle, read_bundle
from medley.classifier import Ask, Classifier
from medley.pool import Capacity
from medley.routed import RoutedModel
from service.answers.engine import Engine
from service.bundles.blobs import Blobs
from service.bundles.shared_store import SharedStore
from service.bundles.store import BundleStore
from service.registry.desired import LIVE, Desired, VersionRecord
from service.signals.metrics import Metrics
from service.versions.live import Key
from service.versions.loading import Loader
from service.versions.residency import Residency
from service.versions.unified import UnifiedModels

__all__ = ["PIXELS", "Residence", "residence", "truth"]

PIXELS = torch.randint(
    0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
)


class Residence:
    """A residency with its engine; changes what is desired as a registry would."""

    def __init__(self, residency: Residency, engine: Engine, classifier: Classifier) -> None:
        self.residency = residency
        self.engine = engine
        self.model = classifier.model
        self.store: BundleStore = residency._store
        self.metrics: Metrics = residency._metrics
        self.desired = Desired()

    async def register(self, data: bytes, *, live: bool = False) -> Key:
        """Take a bundle in."""
        bundle = read_bundle(data)
        key = (bundle.manifest.task, bundle.manifest.version)
        record = VersionRecord(*key, bundle.digest, "2026", len(data))
        self.keep(bundle, data)
        resident = await self.residency.admit(record, bundle)
        self.want(replace(self.desired, versions=(*self.desired.versions, record)), publish=False)
        if live:
            self.alias(key, LIVE, publish=False)
        self.residency.publish(self.desired, resident)
        return key

    async def restore(self, desired: Desired) -> None:
        """Begin with a state, as a server does."""
        await self.residency.follow(desired)
        await self.residency.fill()

    def keep(self, bundle: Bundle, data: bytes) -> Path:
        """Put a bundle's file into the store."""
        path = self.store.path(bundle.digest)
        path.write_bytes(data)
        return path

    def want(self, desired: Desired, *, publish: bool = True) -> None:
        """Change what is desired."""
        self.desired = replace(desired, generation=self.desired.generation + 1)
        if publish:
            self.residency.publish(self.desired)

    def alias(self, key: Key, alias: str = LIVE, *, publish: bool = True) -> None:
        task, version = key
        names = self.desired.aliases.get(task, {}) | {alias: version}
        aliases = self.desired.aliases | {task: names}
        self.want(replace(self.desired, aliases=aliases), publish=publish)

    def pin(self, *keys: Key) -> None:
        """Pin these and no others."""
        self.want(replace(self.desired, pinned=frozenset(keys)))

    def delete(self, key: Key) -> None:
        """Forget a version, whoever names it."""
        desired = self.desired
        self.want(
            replace(
                desired,
                versions=tuple(r for r in desired.versions if (r.task, r.version) != key),
                aliases={
                    task: {a: v for a, v in names.items() if (task, v) != key}
                    for task, names in desired.aliases.items()
                },
                pinned=desired.pinned - {key},
            )
        )

    async def ask(self, key: Key) -> Tensor:
        """The features of PIXELS along a version's path."""
        async with self.residency.lease(key) as snapshot:
            path = snapshot.find(*key).path
            (future,) = self.engine.submit([PIXELS], Ask(path))
            return (await asyncio.wrap_future(future)).features_E

    async def settled(self) -> None:
        """Return when nobody waits for anything any more, and every job has been done."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.wrap_future(self.engine.run(lambda: None))

    @property
    def on_device(self) -> set[str]:
        """Tasks by name and version, as task@version."""
        return {"@".join(key) for key in self.residency.live.snapshot.residents}

    def tier(self, key: Key) -> str:
        return self.residency.live.snapshot.tier(key)

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@asynccontextmanager
async def residence(
    folder: Path,
    backbone: Backbone,
    *,
    paths: int = 2,
    slots: int = 64,
    max_host_bytes: int = 2**30,
    unload_s: float = 10.0,
    batch: int = 4,
    shared: Path | None = None,
    **room: int,
) -> AsyncIterator[Residence]:
    """A residency with room for `paths` versions, `slots` experts a block, `batch` images.

    With `shared`, the bundles are there, and its own folder is a cache. `room` is more of
    `Capacity`.
    """
    capacity = Capacity(paths=paths, slots=slots, **room)
    classifier = Classifier(RoutedModel(backbone, capacity=capacity), buckets=(batch,))
    bundles = None if shared is None else SharedStore(Blobs(str(shared), timeout_s=10))
    metrics, store = Metrics(), BundleStore(folder, bundles)
    engine = Engine(
        classifier.launch,
        blank_CHW=torch.zeros(3, *backbone.image_size, dtype=torch.uint8),
        metrics=metrics,
        max_batch=batch,
        max_wait_s=0.0,
        queue_limit=64,
        heartbeat_s=3600.0,
    )
    residency = Residency(
        store=store,
        unified=UnifiedModels(
            store, fingerprint=backbone.fingerprint, max_bytes=2**30, metrics=metrics
        ),
        loader=Loader(engine, classifier, metrics, max_bundle_bytes=2**30),
        metrics=metrics,
        max_host_bytes=max_host_bytes,
        unload_s=unload_s,
    )
    engine.start()
    try:
        yield Residence(residency, engine, classifier)
    finally:
        engine.stop()
        store.close()


def truth(backbone: Backbone, bundles: Sequence[Bundle]) -> dict[Key, Tensor]:
    """What each version makes of PIXELS, by a model that has it alone."""
    found = {}
    for bundle in bundles:
        model = RoutedModel(backbone, capacity=Capacity(paths=1))
        path = model.load(bundle.task_experts())
        routed = Classifier(model, buckets=(4,)).route(PIXELS[None], [Ask(path)])
        found[bundle.manifest.task, bundle.manifest.version] = routed.features_BE[0]
    return found
