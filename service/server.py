"""One uvicorn process around an app. It listens before it starts and says so when it is ready."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.settings import Settings

__all__ = ["serve"]


def serve(app: FastAPI, settings: Settings, *, on_ready: Callable[[str], None]) -> bool:
    """Serve until SIGTERM or SIGINT, then answer what is in flight and return.

    Args:
        app: from `create_app`.
        settings: where to listen and how long to drain.
        on_ready: hears the server's URL once it answers.

    Returns:
        Whether it ever got ready; if not, uvicorn has logged why.
    """
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        timeout_graceful_shutdown=settings.drain_s,
        access_log=False,
        log_level="warning",
        server_header=False,
    )
    with config.bind_socket() as bound:
        server = _Server(config, lambda: on_ready(_url(settings.host, bound)))
        server.run(sockets=[bound])
    return server.started


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop in order; only an impatient second Ctrl-C cuts requests off.

        uvicorn would also send itself the signal again at the end, so that the process dies of it;
        a server that stopped as it was told ends with status 0.
        """
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()


def _url(host: str, bound: socket.socket) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{bound.getsockname()[1]}"
