"""One uvicorn process around an app: it listens first and starts then, and leaves in order.

A signal makes it not ready at once; it goes on taking requests for as long as balancers need to
notice, then stops listening, answers what it holds, and ends. Nothing of the app is known here but
its lifecycle.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.connection import Connection, ConnectionLimits, Connections
from service.errors import ServiceError
from service.lifecycle import Lifecycle
from service.settings import Settings

__all__ = ["serve"]

log = logging.getLogger(__name__)
GRACE_S = 10.0  # beyond what the settings allow for leaving: then something hangs
OTHER_FILES = 128  # descriptors beside those of connections


def serve(app: FastAPI, settings: Settings, *, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT, then answer what is in flight and return.

    Args:
        app: from `create_app`, to be started in the background.
        settings: where to listen, what connections may take, how to leave.
        on_ready: hears the server's URL once it is ready.

    Raises:
        ServiceError: the environment asks for several processes.
        Exception: whatever the app's start failed with.
    """
    lifecycle: Lifecycle = app.state.lifecycle
    limits = _limits(settings)
    shared = Connections(limits, lifecycle, app.state.metrics)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=functools.partial(Connection, shared=shared),  # type: ignore[arg-type]
        ws="none",
        timeout_graceful_shutdown=settings.drain_s,
        proxy_headers=False,
        server_header=False,
        access_log=False,
        log_config=None,
        log_level="error",  # its warnings are one line for each malformed request
    )
    if config.workers > 1:
        raise ServiceError(
            "WEB_CONCURRENCY asks for several processes, but one process serves one device and one "
            "store: start another server, with a store of its own, for each device"
        )
    _allow_files(limits.max_connections + OTHER_FILES)
    with config.bind_socket() as bound, _gone_in_time(settings) as begin_to_leave:
        server = _Server(
            config,
            lifecycle,
            drain_delay_s=settings.drain_delay_s,
            on_ready=lambda: on_ready(_url(settings.host, bound)),
            on_exit=begin_to_leave,
        )
        server.run(sockets=[bound])
    if lifecycle.error is not None:
        raise lifecycle.error


class _Server(uvicorn.Server):
    def __init__(
        self,
        config: uvicorn.Config,
        lifecycle: Lifecycle,
        *,
        drain_delay_s: float,
        on_ready: Callable[[], None],
        on_exit: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._lifecycle = lifecycle
        self._drain_delay_s = drain_delay_s
        self._on_ready = on_ready
        self._on_exit = on_exit
        self._follower: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to leave; a second signal ends the delay, a second Ctrl-C cuts requests off.

        uvicorn would also send itself the signal again at the end, so that the process dies of it;
        a server that stopped as it was told ends with status 0.
        """
        if self._lifecycle.draining:
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True
        else:
            self._lifecycle.drain()
            self._on_exit()

    async def on_tick(self, counter: int) -> bool:
        """Stop once it has been draining for long enough; uvicorn asks ten times a second."""
        if self._lifecycle.draining:
            self.should_exit |= self._lifecycle.drained_for_s() >= self._drain_delay_s
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen; the app starts meanwhile."""
        await super().startup(sockets)
        self._follower = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        try:
            await self._lifecycle.settled()
        except Exception:  # `serve` raises it once the server has ended
            self.should_exit = True
        else:
            self._on_ready()


def _limits(settings: Settings) -> ConnectionLimits:
    return ConnectionLimits(
        header_timeout_s=settings.header_timeout_s,
        keep_alive_s=settings.keep_alive_s,
        max_header_bytes=settings.max_header_bytes,
        max_headers=settings.max_headers,
        max_connections=settings.max_connections,
    )


@contextmanager
def _gone_in_time(settings: Settings) -> Iterator[Callable[[], None]]:
    """Give a function that sets a limit to leaving, for a device that never comes back.

    What is durable does not mind: the store is made for being killed at any moment.
    """
    longest_s = settings.drain_delay_s + settings.drain_s + GRACE_S

    def end() -> None:
        log.critical("the server has not ended within %.0f s and is cut off", longest_s)
        os._exit(1)

    timer = threading.Timer(longest_s, end)
    timer.daemon = True
    try:
        yield timer.start
    finally:
        timer.cancel()


def _allow_files(count: int) -> None:
    """Raise the soft limit of open files to `count`, as far as the hard one lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < count:
        log.warning("only %d files may be open, MEDLEY_MAX_CONNECTIONS needs %d", most, count)


def _url(host: str, bound: socket.socket) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{bound.getsockname()[1]}"
