"""From settings to a `Service`: everything is built here, in the order in which it depends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack

import torch
from torch import Tensor

from medley.backbone import Backbone, find_device, load_backbone
from medley.classifier import Classifier
from medley.extractor import Extractor, load_alexnet
from medley.images import ImageLimits
from medley.pool import Capacity
from medley.prompts import class_text_features
from medley.replay import ReplayedClassifier
from medley.routed import RoutedModel
from service.answers.classification import Classification
from service.answers.engine import Engine
from service.answers.inference import Inference
from service.answers.labels import LabelCache
from service.answers.planning import Policy
from service.answers.rollouts import Rollouts
from service.answers.unions import Unions
from service.bundles.collector import Collector
from service.bundles.sources import Sources
from service.bundles.store import BundleStore
from service.intake.bodies import Bodies
from service.intake.decoding import Decoding
from service.intake.fetch import Fetching
from service.intake.room import Room
from service.registry.backup import Backup
from service.registry.local_registry import LocalRegistry
from service.registry.redis_registry import RedisRegistry
from service.registry.registry import Registry
from service.replicas.board import Board, LocalBoard, Phase, RedisBoard
from service.replicas.follower import Follower
from service.replicas.heartbeat import Heartbeat
from service.replicas.quorum import Quorum
from service.replicas.reconciler import Reconciler
from service.replicas.shared import Shared, open_shared, watch
from service.replicas.told import ToldOperations
from service.settings import Settings
from service.signals import memory
from service.signals.metrics import Metrics
from service.signals.reservoir import Reservoir
from service.signals.signals import Signals
from service.state import Service
from service.versions.loading import Loader
from service.versions.overlap import Overlap
from service.versions.residency import Residency
from service.versions.tasks import Tasks
from service.versions.unified import UnifiedModels

__all__ = ["OnStep", "Startup"]

OnStep = Callable[[str], None]


class Startup:
    """One start of one server; `stack` closes what it has opened, in reverse.

    `at` hears what it is doing, `on_step` where a registration is; `phase` says where the server
    is between its start and its end.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        stack: AsyncExitStack,
        *,
        at: OnStep,
        phase: Callable[[], Phase],
        on_step: OnStep,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._stack = stack
        self._at = at
        self._phase = phase
        self._on_step = on_step

    async def run(self, backbone: Backbone | None) -> Service:
        """Start with this backbone, or the one that the settings name; ready when it returns.

        Raises:
            MedleyError: the store, the model or the registry cannot be had.
        """
        self._at("opening the store")
        store, shared = await self._open_store()
        self._at("loading the model")
        backbone, classifier = await self._load_model(backbone)
        registry = self._open_registry(shared, backbone)
        engine = self._start_engine(classifier)
        unified = self._make_unified(store, backbone)
        residency = self._make_residency(store, unified, engine, classifier)
        reservoir = await self._open_reservoir()
        signals = Signals(live=residency.live, metrics=self._metrics, reservoir=reservoir)
        tasks = self._make_tasks(registry, store, engine, unified, residency, signals)
        board = self._make_board(shared)
        heartbeat = self._start_heartbeat(board, residency, backbone)
        follower = self._make_follower(tasks, registry, board, heartbeat)
        self._at("restoring tasks")
        await follower.join(self._at)
        self._at("warming up")
        await asyncio.wrap_future(engine.run(classifier.prepare))
        await asyncio.wrap_future(engine.prove())  # not ready before a forward has succeeded
        rollouts = self._make_rollouts(residency, tasks)
        held_bytes, held_images = self._make_rooms()
        inference = Inference(
            engine=engine,
            residency=residency,
            decoding=self._make_decoding(backbone),
            fetching=self._make_fetching(held_bytes),
            room=held_images,
            rollouts=rollouts,
            signals=signals,
        )
        labels, unions = self._make_labels(classifier.model, engine)
        policy = self._make_policy()
        follower.start()
        self._look_after_store(shared, registry, store, board)
        return Service(
            settings=self._settings,
            backbone=backbone,
            engine=engine,
            tasks=tasks,
            unified=unified,
            residency=residency,
            follower=follower,
            board=board,
            heartbeat=heartbeat,
            quorum=Quorum(board, me=heartbeat.replica),
            told=self._make_told(tasks, board, heartbeat),
            labels=labels,
            policy=policy,
            bodies=self._make_bodies(held_bytes),
            inference=inference,
            rollouts=rollouts,
            classification=Classification(
                inference, labels, unions, policy=policy, logit_scale=backbone.logit_scale
            ),
            signals=signals,
            reservoir=reservoir,
            metrics=self._metrics,
        )

    async def _open_store(self) -> tuple[BundleStore, Shared | None]:
        shared = await open_shared(self._settings, at=self._at)
        if shared is not None:
            self._stack.callback(shared.client.close)
        up = None if shared is None else shared.blobs
        self._metrics.store_up.set_function(lambda: up is None or up.up)
        store = BundleStore(self._settings.store, None if shared is None else shared.store)
        self._stack.callback(store.close)
        return store, shared

    def _open_registry(self, shared: Shared | None, backbone: Backbone) -> Registry:
        registry: Registry
        if shared is None:
            path = self._settings.store / "registry.sqlite"
            registry = LocalRegistry(path, on_step=self._on_step)
        else:
            registry = self._share_registry(shared, backbone)
        self._stack.callback(registry.close)
        self._metrics.registry_up.set_function(lambda: registry.up)
        return registry

    def _share_registry(self, shared: Shared, backbone: Backbone) -> RedisRegistry:
        metrics = self._metrics
        registry = RedisRegistry(
            shared.client,
            prefix=self._settings.registry_prefix,
            backup=Backup(shared.blobs),
            backbone=backbone.fingerprint,
            on_step=self._on_step,
        )
        counted = 0

        def measure() -> None:
            nonlocal counted
            metrics.registry_recoveries.inc(registry.recoveries - counted)
            counted = registry.recoveries

        metrics.before_scrape.append(measure)
        metrics.registry_backup_generation.set_function(lambda: max(0, registry.backup_generation))
        return registry

    def _make_board(self, shared: Shared | None) -> Board:
        if shared is None:
            return LocalBoard()
        settings = self._settings
        return RedisBoard(
            shared.client, prefix=settings.registry_prefix, ttl_s=settings.replica_ttl_s
        )

    def _start_heartbeat(self, board: Board, residency: Residency, backbone: Backbone) -> Heartbeat:
        heartbeat = Heartbeat(
            board,
            residency,
            name=self._settings.replica_name,
            fingerprint=backbone.fingerprint,
            phase=self._phase,
            ttl_s=self._settings.replica_ttl_s,
            metrics=self._metrics,
        )
        heartbeat.start()
        self._stack.push_async_callback(heartbeat.close)
        return heartbeat

    def _make_follower(
        self, tasks: Tasks, registry: Registry, board: Board, heartbeat: Heartbeat
    ) -> Follower:
        alone = self._settings.registry is None
        follower = Follower(
            tasks,
            registry,
            board=board,
            me=heartbeat.id,
            poll_s=None if alone else self._settings.poll_s,
        )
        heartbeat.retry_s = follower.retry_s
        self._stack.push_async_callback(follower.close)
        return follower

    def _make_told(self, tasks: Tasks, board: Board, heartbeat: Heartbeat) -> ToldOperations:
        told = ToldOperations(tasks.operations, board, me=heartbeat.id)

        async def end() -> None:
            await tasks.close()  # what is cut off now is told, too
            await told.close()

        self._stack.push_async_callback(end)
        return told

    def _look_after_store(
        self, shared: Shared | None, registry: Registry, store: BundleStore, board: Board
    ) -> None:
        if shared is None:
            return
        collector = Collector(
            registry=registry,
            store=store,
            ledger=shared.ledger,
            in_use=board.files,
            keep_s=self._settings.keep_unused_s,
            metrics=self._metrics,
        )
        running = [
            asyncio.create_task(collector.run(), name="collector"),
            asyncio.create_task(
                watch(shared.blobs, every_s=self._settings.replica_ttl_s), name="store-watch"
            ),
        ]

        async def end() -> None:
            for task in running:
                task.cancel()
            await asyncio.wait(running)

        self._stack.push_async_callback(end)

    async def _load_model(self, backbone: Backbone | None) -> tuple[Backbone, Classifier]:
        settings = self._settings
        extractors = await asyncio.to_thread(_load_extractors, settings)
        if backbone is None:
            backbone = await asyncio.to_thread(_load_backbone, settings)
        self._metrics.describe(backbone.name, backbone.fingerprint)
        memory.watch(self._metrics, backbone.device)
        return backbone, await asyncio.to_thread(_make_classifier, settings, backbone, extractors)

    def _start_engine(self, classifier: Classifier) -> Engine:
        height, width = classifier.model.backbone.image_size
        engine = Engine(
            classifier.launch,
            blank_CHW=torch.zeros(3, height, width, dtype=torch.uint8),
            metrics=self._metrics,
            max_batch=classifier.max_batch,
            max_wait_s=self._settings.max_wait_s,
            queue_limit=self._settings.queue_limit,
            heartbeat_s=self._settings.heartbeat_s,
        )
        engine.start()
        self._stack.callback(engine.stop)
        return engine

    def _make_unified(self, store: BundleStore, backbone: Backbone) -> UnifiedModels:
        return UnifiedModels(
            store,
            fingerprint=backbone.fingerprint,
            max_bytes=self._settings.max_unified_bytes,
            metrics=self._metrics,
        )

    def _make_residency(
        self, store: BundleStore, unified: UnifiedModels, engine: Engine, classifier: Classifier
    ) -> Residency:
        settings, metrics = self._settings, self._metrics
        return Residency(
            store=store,
            unified=unified,
            loader=Loader(engine, classifier, metrics, max_bundle_bytes=settings.max_bundle_bytes),
            metrics=metrics,
            max_host_bytes=settings.host_bytes,
            unload_s=settings.unload_s,
        )

    async def _open_reservoir(self) -> Reservoir:
        reservoir = await asyncio.to_thread(
            Reservoir,
            self._settings.store / "unclaimed",
            images=self._settings.reservoir,
            max_bytes=self._settings.reservoir_bytes,
            metrics=self._metrics,
        )
        self._stack.callback(reservoir.close)
        return reservoir

    def _make_tasks(
        self,
        registry: Registry,
        store: BundleStore,
        engine: Engine,
        unified: UnifiedModels,
        residency: Residency,
        signals: Signals,
    ) -> Tasks:
        settings, metrics = self._settings, self._metrics
        reconciler = Reconciler(
            registry=registry, store=store, residency=residency, signals=signals, metrics=metrics
        )
        tasks = Tasks(
            registry=registry,
            store=store,
            sources=Sources(settings.bundle_sources, timeout_s=settings.upload_timeout_s),
            unified=unified,
            residency=residency,
            reconciler=reconciler,
            overlap=Overlap(engine=engine, live=residency.live, bundle=store.path, metrics=metrics),
            max_bundle_bytes=settings.max_bundle_bytes,
            on_step=self._on_step,
        )
        self._stack.push_async_callback(tasks.close)
        return tasks

    def _make_decoding(self, backbone: Backbone) -> Decoding:
        settings, metrics = self._settings, self._metrics
        decoding = Decoding(
            backbone,
            threads=settings.decode_threads,
            timeout_s=settings.decode_timeout_s,
            limits=ImageLimits(
                max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels
            ),
            metrics=metrics,
        )
        metrics.decode_backlog_images.set_function(lambda: decoding.waiting)
        self._stack.callback(decoding.close)
        return decoding

    def _make_rollouts(self, residency: Residency, tasks: Tasks) -> Rollouts:
        rollouts = Rollouts(residency.live, self._metrics, stop=tasks.stop_rollout)
        self._stack.push_async_callback(rollouts.close)
        return rollouts

    def _make_rooms(self) -> tuple[Room, Room]:
        held_bytes = Room(self._settings.max_inflight_bytes, "bytes")
        held_images = Room(self._settings.max_inflight_images, "images")
        self._metrics.inflight_bytes.set_function(lambda: held_bytes.used)
        self._metrics.inflight_images.set_function(lambda: held_images.used)
        return held_bytes, held_images

    def _make_fetching(self, held_bytes: Room) -> Fetching | None:
        settings = self._settings
        if not settings.image_urls:
            return None
        fetching = Fetching(
            held_bytes,
            max_bytes=settings.max_image_bytes,
            timeout_s=settings.image_url_timeout_s,
            networks=settings.image_url_networks,
        )
        self._stack.push_async_callback(fetching.close)
        return fetching

    def _make_bodies(self, held_bytes: Room) -> Bodies:
        settings = self._settings
        return Bodies(
            held_bytes, max_bytes=settings.max_request_bytes, timeout_s=settings.body_timeout_s
        )

    def _make_labels(self, model: RoutedModel, engine: Engine) -> tuple[LabelCache, Unions]:
        settings = self._settings

        def encode(names: tuple[str, ...], templates: tuple[str, ...], path: int) -> Tensor:
            return class_text_features(model, names, templates, path)

        def cache(max_sets: int, max_bytes: int) -> LabelCache:
            return LabelCache(encode, engine, max_sets=max_sets, max_bytes=max_bytes)

        parts = cache(settings.paths**2, settings.union_cache_bytes)
        return cache(settings.label_cache, settings.label_cache_bytes), Unions(parts)

    def _make_policy(self) -> Policy:
        settings = self._settings
        return Policy(settings.unclaimed, settings.neighbours, settings.aggregate_weights)


def _load_backbone(settings: Settings) -> Backbone:
    return load_backbone(settings.backbone, weights=settings.weights, device=settings.device)


def _load_extractors(settings: Settings) -> list[Extractor]:
    if settings.alexnet_weights is None:
        return []
    device = find_device(settings.device)
    return [load_alexnet(settings.alexnet_weights, device=device)]


def _make_classifier(
    settings: Settings, backbone: Backbone, extractors: Sequence[Extractor]
) -> Classifier:
    if settings.threads:
        torch.set_num_threads(settings.threads)
    capacity = Capacity(
        paths=settings.paths,
        slots=settings.slots,
        experts=settings.max_experts,
        bottleneck=settings.max_bottleneck,
        max_top_k=settings.max_top_k,
        low_rank_slots=settings.low_rank_slots,
        low_rank=settings.max_rank,
        models=settings.models,
    )
    model = RoutedModel(
        backbone,
        precision=settings.precision,
        first_expert_block=None,
        capacity=capacity,
        extractors=extractors,
    )
    if backbone.device.type == "cuda":
        return ReplayedClassifier(model, buckets=settings.buckets)
    return Classifier(model, buckets=settings.buckets)
