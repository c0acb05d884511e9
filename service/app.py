"""Settings in, an app out: routes, middleware, and a life around them. Nothing happens at import.

What the routes work with is built by `startup.py` when the app starts.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI

from medley.backbone import Backbone
from service import problems
from service.access import Gate
from service.generations import MinGeneration
from service.lifecycle import Lifecycle
from service.middleware import RequestContext
from service.routes import (
    classify,
    embeddings,
    models,
    operations,
    probes,
    replicas,
    rollouts,
    route,
    tasks,
    unclaimed,
    unified,
    usage,
    v2,
)
from service.settings import Settings
from service.signals.metrics import Metrics, package_version
from service.signals.tracing import Tracing, make_tracing
from service.startup import OnStep, Startup
from service.state import Service
from service.wire import openapi

__all__ = ["create_app"]


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
        on_step: hears where a registration is (see `tasks.py`).
        in_background: start while requests are answered `starting` already, as a server wants it;
            otherwise the app's lifespan begins when it is ready, or raises why it is not.
        tracing: where spans go, instead of where the settings say.

    Raises:
        ServiceError: the settings want tracing, which is not installed.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async def start() -> None:
            startup = Startup(
                settings,
                metrics,
                stack,
                at=lifecycle.at,
                phase=lambda: probes.phase_of(app),
                on_step=on_step,
            )
            service = app.state.service = await startup.run(backbone)
            service.heartbeat.look()

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

    async def reached(generation: int) -> bool:
        service: Service | None = app.state.service
        if service is None:  # the route says that it is starting
            return True
        return await service.follower.reached(generation, settings.generation_wait_s)

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
    metrics.ready.set_function(lambda: probes.phase_of(app) == "ready")
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
        unified,
        replicas,
        unclaimed,
        usage,
        probes,
    ):
        app.include_router(module.routes)
    app.add_middleware(MinGeneration, reached=reached)
    app.add_middleware(Gate, settings=settings, openapi=lambda: app.openapi())
    app.add_middleware(
        RequestContext,
        metrics=metrics,
        generation=generation,
        tracing=spans,
        replica=settings.replica_name,
    )
    openapi.describe(app)
    return app
