"""Medley as a Ray Serve application: each of Ray's replicas is the app that `medley serve` runs.

Ray starts, watches, scales and replaces the processes and speaks HTTP; which tasks there are, a
replica knows from the shared registry. How many and how large they are stands in Ray's own file,
`deploy/ray/medley.yaml`. Light to import: torch comes with the first replica.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from service.errors import ServiceError

if TYPE_CHECKING:  # they bring torch
    from medley.backbone import Backbone
    from service.settings import Settings

__all__ = ["app", "application", "make_app", "own_folder", "replica_settings"]


class Replica:
    """One process; `serve.ingress` gives it its app and runs the app's lifespan."""

    app: FastAPI

    async def check_health(self) -> None:
        """Let Ray replace a replica that only a new one can help: Ray knows no "not ready".

        Raises:
            UnavailableError: as for `/livez`.
        """
        from service.routes.probes import check_live

        check_live(self.app)


def application(make: Callable[[], FastAPI]) -> Application:
    """The application whose replicas run what `make` makes, once in each of their processes."""
    replica = serve.ingress(make)(Replica)
    return serve.deployment(name="medley")(replica).bind()


def make_app(backbone: Backbone | None = None) -> FastAPI:
    """Make this replica's app; Ray sends it requests when its lifespan has begun, so when ready.

    Args:
        backbone: instead of the one that the settings name.

    Raises:
        ServiceError: the replicas would share nothing, or tracing is not installed.
        ValidationError: a setting is wrong.
    """
    from service.app import create_app
    from service.signals import logs

    settings = replica_settings()
    logs.configure(settings.log_format, level=settings.log_level)
    return create_app(settings, backbone=backbone)


def replica_settings() -> Settings:
    """The settings of this process: those of all replicas, a folder and a name of its own.

    Raises:
        ServiceError: the replicas would share nothing.
        ValidationError: a setting is wrong.
    """
    from service.settings import Settings

    shared = Settings()
    if shared.registry is None:
        raise ServiceError(
            "Ray's replicas need a registry that they share: set MEDLEY_REGISTRY and "
            "MEDLEY_BUNDLE_STORE"
        )
    own = {
        "host": "0.0.0.0",  # Ray listens, maybe for everybody: changes need a key
        "store": own_folder(shared.store),
        "replica": serve.get_replica_context().replica_id.unique_id,
    }
    return Settings.model_validate(own)


def own_folder(store: Path) -> Path:
    """The first folder in `store` that no other process of this machine has, until this one ends.

    A replica's name is new each time; so the bundles that an earlier one left are found again, and
    there are never more folders than there were replicas at once.
    """
    store.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        lock = os.open(store / f"replica-{number}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel ends it with the process
        except BlockingIOError:
            os.close(lock)
        else:
            return store / f"replica-{number}"
    raise AssertionError("unreachable")


app = application(make_app)
