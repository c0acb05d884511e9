"""Replicas on this machine: a Redis, a folder for bundles, and servers that share both."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import redis

from service.bench.load import LoadError
from service.bench.servers import Server, free_port, medley_server

__all__ = ["replicas"]

START_S, POLL_S = 20.0, 0.05
PERSISTENT = ("--appendonly", "yes", "--appendfsync", "everysec")
DEAF = ("--rename-command", "SUBSCRIBE", "")  # nobody can listen, so no hint arrives


@contextmanager
def replicas(
    count: int, folder: Path, settings: Mapping[str, str | int | float], *, hints: bool
) -> Iterator[list[Server]]:
    """Serve with `medley serve`, so many times, while the block runs.

    Args:
        count: how many.
        folder: of everything that they write; new.
        settings: of each; see `medley_server`.
        hints: whether the Redis lets them hear of changes, or they have to look.

    Raises:
        LoadError: there is no redis-server, or something does not start.
    """
    folder.mkdir(parents=True)
    with ExitStack() as stack:
        url = stack.enter_context(_redis(folder, () if hints else DEAF))
        shared = {"registry": url, "bundle_store": str(folder / "bundles")}
        names = [f"replica-{number}" for number in range(count)]
        yield [
            stack.enter_context(
                medley_server(
                    folder / name,
                    folder / f"{name}.log",
                    {**settings, **shared, "replica": name, "log_level": "warning"},
                )
            )
            for name in names
        ]


@contextmanager
def _redis(folder: Path, options: tuple[str, ...]) -> Iterator[str]:
    program = shutil.which("redis-server")
    if program is None:
        raise LoadError("redis-server not found: install the package redis-server")
    port, data = free_port(), folder / "redis"
    data.mkdir()
    where = ("--port", str(port), "--bind", "127.0.0.1", "--dir", str(data), "--save", "")
    with (
        (folder / "redis.log").open("w") as log,
        subprocess.Popen([program, *where, *PERSISTENT, *options], stdout=log) as process,
    ):
        try:
            _wait(port)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.terminate()


def _wait(port: int) -> None:
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        try:
            with redis.Redis(port=port, socket_timeout=1) as client:
                client.ping()
                return
        except redis.RedisError:
            time.sleep(POLL_S)
    raise LoadError("redis-server does not answer")
