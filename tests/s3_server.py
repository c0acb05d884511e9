"""An S3 of its own for tests: moto's server, a process that speaks the protocol and keeps bytes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

import httpx

from tests.redis_server import free_port

__all__ = ["S3Server"]

START_S = 30.0


class S3Server:
    """A context manager that starts one and ends it; it has no buckets, and takes any key."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "log"
        self._port = free_port()

    def __enter__(self) -> Self:
        options = ["-H", "127.0.0.1", "-p", str(self._port)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "moto.server", *options],
                stdout=log,
                stderr=log,
                env={"PATH": os.environ["PATH"]},
            )
        limit_s = time.monotonic() + START_S
        while not self._answers():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < limit_s, "the S3 server does not answer"
            time.sleep(0.05)
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def url(self) -> str:
        """What AWS_ENDPOINT_URL is to be."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        """Of its process, to be frozen."""
        return self._process.pid

    def _answers(self) -> bool:
        try:
            return httpx.get(self.url).status_code == 200
        except httpx.TransportError:
            return False
