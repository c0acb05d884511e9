"""A real Redis for tests: started on a free port, killed, frozen, started again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import redis

__all__ = [
    "RedisServer",
    "find_program",
    "free_port",
    "redis_sentinel",
    "redis_server",
    "wait_until",
]

SOON_S = 20.0


class RedisServer:
    """One redis-server with a folder of its own, which stays when it is killed.

    Args:
        folder: for its data; made if it is not there.
        options: its own, as in "--appendonly", "yes".
        program: redis-sentinel takes a file of settings first.
    """

    def __init__(
        self, folder: Path, *options: str, program: str = "redis-server", tls: Path | None = None
    ) -> None:
        self.folder, self.options, self.program, self.tls = folder, options, program, tls
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        """Its address; without the password that it may ask for."""
        if self.tls is None:
            return f"redis://127.0.0.1:{self.port}/0"
        return f"rediss://127.0.0.1:{self.port}/0?ssl_ca_certs={self.tls / 'ca.pem'}"

    def start(self) -> None:
        """Start it, with the data of its folder; returns when it answers."""
        assert self.process is None
        command = [find_program(self.program), *self._settings(), *self.options]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log)
        wait_until(self._answers_or_died)
        assert self.process.poll() is None, (self.folder / "log").read_text()

    def kill(self) -> None:
        """End it at once, as kill -9 does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def restart(self, *, empty: bool = False) -> None:
        """Kill it and start it again on the same port, with what it had written or with nothing."""
        self.kill()
        if empty:
            shutil.rmtree(self.folder)
            self.folder.mkdir()
        self.start()

    def freeze(self) -> None:
        """Let it answer nobody, with its connections open."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def client(self, **options: object) -> redis.Redis:
        """A plain client of its own, to look behind a registry's back."""
        return redis.Redis.from_url(self.url, decode_responses=True, **options)

    def _settings(self) -> list[str]:
        if self.program == "redis-sentinel":
            return [f"{self.folder}/sentinel.conf", "--port", str(self.port)]
        port = ["--port", str(self.port)]
        if self.tls is not None:
            port = ["--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "no"]
            for name in ("ca", "cert", "key"):
                option = {"ca": "--tls-ca-cert-file"}.get(name, f"--tls-{name}-file")
                port += [option, str(self.tls / f"{name}.pem")]
        return [*port, "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", ""]

    def _answers_or_died(self) -> bool:
        assert self.process is not None
        return self.process.poll() is not None or self._answers()

    def _answers(self) -> bool:
        try:
            with self.client(socket_timeout=1) as client:
                client.ping()
        except redis.AuthenticationError:
            return True
        except redis.RedisError:
            return False
        return True


@contextmanager
def redis_server(folder: Path, *options: str, tls: Path | None = None) -> Iterator[RedisServer]:
    """A redis-server that ends with the block."""
    server = RedisServer(folder, *options, tls=tls)
    try:
        server.start()
        yield server
    finally:
        _end(server)


@contextmanager
def redis_sentinel(folder: Path, master: RedisServer, *, service: str) -> Iterator[RedisServer]:
    """A redis-sentinel, alone its quorum, that watches `master` and notices within a second."""
    server = RedisServer(folder, program="redis-sentinel")
    (folder / "sentinel.conf").write_text(
        f"dir {folder}\nbind 127.0.0.1\n"
        f"sentinel monitor {service} 127.0.0.1 {master.port} 1\n"
        f"sentinel down-after-milliseconds {service} 500\n"
        f"sentinel failover-timeout {service} 3000\n"
    )
    try:
        server.start()
        yield server
    finally:
        _end(server)


def wait_until(so: Callable[[], object], *, within_s: float = SOON_S) -> None:
    """Look until something is so; fails if it does not come to be."""
    limit_s = time.monotonic() + within_s
    while not so():
        assert time.monotonic() < limit_s, "it did not come to be"
        time.sleep(0.01)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def find_program(program: str) -> str:
    """Where a program is; without it the test is skipped, or fails where CI=true."""
    path = shutil.which(program)
    if path is None:
        said = f"no {program}: install the package {program}"
        if os.environ.get("CI") == "true":
            pytest.fail(said)
        pytest.skip(said)
    return path


def _end(server: RedisServer) -> None:
    with suppress(ProcessLookupError):
        if server.process is not None:
            server.thaw()
    server.kill()
