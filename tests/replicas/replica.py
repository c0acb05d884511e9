"""A replica as a process of its own: forked from one process that has torch imported, unused.

So it starts in a fraction of a second, and is killed, stopped and frozen as any other process.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from medley.cli import main
from medley.errors import MedleyError
from service.app import create_app
from service.server import serve
from service.settings import Settings
from service.signals import logs
from tests.models import tiny_backbone

__all__ = ["Orders", "run_command", "run_replica"]


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What a replica is told.

    Args:
        settings: by the names of docs/settings.md, lower case.
        log: file of what it says.
        deadly: the step of a change at which it kills itself.
        backbone: seed of its weights.
    """

    settings: dict[str, object]
    log: Path
    deadly: str = ""
    backbone: int = 0
    environment: dict[str, str] = field(default_factory=dict)


def run_replica(orders: Orders, ready: Connection) -> None:
    """Serve; says its URL once it is ready."""
    _say_into(orders.log)
    torch.set_num_threads(1)
    fields = {"port": 0, "buckets": (4,), "log_level": "info", "_env_file": None}
    settings = Settings.model_validate(fields | orders.settings)
    logs.configure(settings.log_format, level=settings.log_level)
    app = create_app(
        settings,
        backbone=tiny_backbone(orders.backbone),
        on_step=_dying_at(orders.deadly),
        in_background=True,
    )
    try:
        serve(app, settings, on_ready=ready.send)
    except MedleyError as error:
        sys.exit(f"medley: {error}")  # as the command ends


def run_command(words: list[str], environment: dict[str, str], log: Path) -> None:
    """`medley ...` as people type it."""
    _say_into(log)
    os.environ.update(environment)
    sys.argv = ["medley", *words]
    main()


def _dying_at(deadly: str) -> Callable[[str], None]:
    def on_step(step: str) -> None:
        if step == deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    return on_step


def _say_into(log: Path) -> None:
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
