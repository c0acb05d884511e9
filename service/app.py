"""The only place where things are wired: settings in, an app out. Nothing happens at import."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import torch
from fastapi import FastAPI

from medley.backbone import Backbone, find_device, load_backbone
from medley.classifier import Classifier
from medley.extractor import Extractor, load_alexnet
from medley.images import ImageLimits
from medley.pool import Capacity
from medley.prompts import class_text_features
from medley.replay import ReplayedClassifier
from medley.routed import RoutedModel
from service import openapi, problems
from service.access import Gate
from service.bodies import Bodies
from service.classification import Classification
from service.decoding import Decoding
from service.engine import Engine
from service.fetch import Fetching
from service.inference import Inference
from service.labels import LabelCache
from service.lifecycle import Lifecycle
from service.loading import Loader
from service.metrics import Metrics, package_version
from service.middleware import RequestContext
from service.overlap import Overlap
from service.registry import LocalRegistry
from service.reservoir import Reservoir
from service.residency import Residency
from service.rollouts import Rollouts
from service.room import Room
from service.routes import (
    classify,
    embeddings,
    models,
    operations,
    probes,
    rollouts,
    route,
    tasks,
    unclaimed,
    usage,
    v2,
)
from service.settings import Settings
from service.signals import Signals
from service.sources import Sources
from service.state import Service
from service.store import BundleStore
from service.tasks import Tasks
from service.tracing import Tracing, make_tracing

__all__ = ["create_app", "load_backbone_of"]

OnStep = Callable[[str], None]


def create_app(
    settings: Settings,
    *,
    backbone: Backbone | None = None,
    on_step: OnStep = lambda step: None,
    in_background: bool = False,
    tracing: Tracing | None = None,
) -> FastAPI:
    """Build the app; the model is loaded and the registry restored when it starts.

    `app.state.lifecycle` says how far it is.

    Args:
        settings: all of them.
        backbone: instead of the one that the settings name.
        on_step: hears where a registration is (see `service/tasks.py`).
        in_background: start while requests are answered `starting` already, as a server wants it;
            otherwise the app's lifespan begins when it is ready, or raises why it is not.
        tracing: where spans go, instead of where the settings say.

    Raises:
        ServiceError: the settings want tracing, which is not installed.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async def start() -> None:
            app.state.service = await _start(
                settings, metrics, backbone, on_step, lifecycle.at, stack
            )

        async with AsyncExitStack() as stack:
            stack.callback(spans.close)
            starting = asyncio.create_task(lifecycle.follow(start()))
            try:
                if not in_background:
                    await lifecycle.settled()
                yield
            finally:
                starting.cancel()
                await asyncio.wait([starting])

    def generation() -> int:
        service: Service | None = app.state.service
        return service.tasks.live.snapshot.desired.generation if service else 0

    metrics, lifecycle = Metrics(task_series=settings.task_series), Lifecycle()
    spans = tracing or make_tracing(settings.tracing)
    app = FastAPI(
        title="Medley",
        version=package_version(),
        lifespan=lifespan,
        generate_unique_id_function=lambda route: route.name,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    app.state.lifecycle, app.state.metrics, app.state.service = lifecycle, metrics, None
    problems.install(app)
    for module in (
        classify,
        route,
        embeddings,
        models,
        v2,
        tasks,
        rollouts,
        operations,
        unclaimed,
        usage,
        probes,
    ):
        app.include_router(module.routes)
    app.add_middleware(Gate, settings=settings, openapi=lambda: app.openapi())
    app.add_middleware(
        RequestContext,
        metrics=metrics,
        generation=generation,
        tracing=spans,
        replica=settings.replica,
    )
    openapi.describe(app)
    return app


async def _start(
    settings: Settings,
    metrics: Metrics,
    backbone: Backbone | None,
    on_step: OnStep,
    at: OnStep,
    stack: AsyncExitStack,
) -> Service:
    """Build everything in the order in which it depends; `stack` closes it in reverse."""
    at("opening the store")
    store = BundleStore(settings.store)
    stack.callback(store.close)
    registry = LocalRegistry(settings.store / "registry.sqlite", on_step=on_step)
    stack.callback(registry.close)
    metrics.registry_up.set_function(lambda: registry.up)
    at("loading the model")
    extractors = await asyncio.to_thread(_extractors, settings)
    if backbone is None:
        backbone = await asyncio.to_thread(load_backbone_of, settings)
    metrics.describe(backbone.name, backbone.fingerprint)
    classifier = await asyncio.to_thread(_classifier, settings, backbone, extractors)
    engine = _engine(settings, metrics, classifier)
    engine.start()
    stack.callback(engine.stop)
    loader = Loader(engine, classifier, metrics, max_bundle_bytes=settings.max_bundle_bytes)
    residency = Residency(
        store=store,
        loader=loader,
        metrics=metrics,
        max_host_bytes=settings.host_bytes,
        unload_s=settings.unload_s,
    )
    reservoir = await asyncio.to_thread(_reservoir, settings, metrics)
    stack.callback(reservoir.close)
    signals = Signals(live=residency.live, metrics=metrics, reservoir=reservoir)
    service_tasks = Tasks(
        registry=registry,
        store=store,
        sources=Sources(settings.bundle_sources, timeout_s=settings.upload_timeout_s),
        residency=residency,
        overlap=Overlap(engine=engine, live=residency.live, bundle=store.path, metrics=metrics),
        signals=signals,
        max_bundle_bytes=settings.max_bundle_bytes,
        on_step=on_step,
    )
    stack.push_async_callback(service_tasks.close)
    at("restoring tasks")
    await service_tasks.restore()
    at("warming up")
    await asyncio.wrap_future(engine.run(classifier.prepare))
    await asyncio.wrap_future(engine.prove())  # not ready before a forward has succeeded
    decoding = Decoding(
        backbone,
        threads=settings.decode_threads,
        timeout_s=settings.decode_timeout_s,
        limits=ImageLimits(
            max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels
        ),
        metrics=metrics,
    )
    stack.callback(decoding.close)
    candidates = Rollouts(residency.live, metrics, stop=service_tasks.stop_rollout)
    stack.push_async_callback(candidates.close)
    held_bytes = Room(settings.max_inflight_bytes, "bytes")
    held_images = Room(settings.max_inflight_images, "images")
    metrics.inflight_bytes.set_function(lambda: held_bytes.used)
    metrics.inflight_images.set_function(lambda: held_images.used)
    metrics.decode_backlog_images.set_function(lambda: decoding.waiting)
    fetching = _fetching(settings, held_bytes)
    if fetching is not None:
        stack.push_async_callback(fetching.close)
    inference = Inference(
        engine=engine,
        residency=residency,
        decoding=decoding,
        fetching=fetching,
        room=held_images,
        rollouts=candidates,
        signals=signals,
    )
    bodies = Bodies(
        held_bytes, max_bytes=settings.max_request_bytes, timeout_s=settings.body_timeout_s
    )
    labels = _label_cache(settings, classifier.model, engine)
    classification = Classification(inference, labels, logit_scale=backbone.logit_scale)
    return Service(
        settings=settings,
        backbone=backbone,
        engine=engine,
        tasks=service_tasks,
        residency=residency,
        labels=labels,
        bodies=bodies,
        inference=inference,
        rollouts=candidates,
        classification=classification,
        signals=signals,
        reservoir=reservoir,
        metrics=metrics,
    )


def load_backbone_of(settings: Settings) -> Backbone:
    """The backbone that the settings name."""
    return load_backbone(settings.backbone, weights=settings.weights, device=settings.device)


def _extractors(settings: Settings) -> list[Extractor]:
    if settings.alexnet_weights is None:
        return []
    device = find_device(settings.device)
    return [load_alexnet(settings.alexnet_weights, device=device)]


def _classifier(
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


def _engine(settings: Settings, metrics: Metrics, classifier: Classifier) -> Engine:
    height, width = classifier.model.backbone.image_size
    return Engine(
        classifier.launch,
        blank_CHW=torch.zeros(3, height, width, dtype=torch.uint8),
        metrics=metrics,
        max_batch=classifier.max_batch,
        max_wait_s=settings.max_wait_s,
        queue_limit=settings.queue_limit,
        heartbeat_s=settings.heartbeat_s,
    )


def _fetching(settings: Settings, room: Room) -> Fetching | None:
    if not settings.image_urls:
        return None
    return Fetching(
        room,
        max_bytes=settings.max_image_bytes,
        timeout_s=settings.image_url_timeout_s,
        networks=settings.image_url_networks,
    )


def _reservoir(settings: Settings, metrics: Metrics) -> Reservoir:
    return Reservoir(
        settings.store / "unclaimed",
        images=settings.reservoir,
        max_bytes=settings.reservoir_bytes,
        metrics=metrics,
    )


def _label_cache(settings: Settings, model: RoutedModel, engine: Engine) -> LabelCache:
    return LabelCache(
        lambda names, templates, path: class_text_features(model, names, templates, path),
        engine,
        max_sets=settings.label_cache,
        max_bytes=settings.label_cache_bytes,
    )
