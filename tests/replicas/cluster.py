"""Replicas that share a real Redis and a bundle store, and what a test may do to each of them."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, TypeVar

import httpx

from tests.redis_server import RedisServer, free_port
from tests.replicas.proxy import Proxy, proxied
from tests.replicas.replica import Orders, run_command, run_replica

__all__ = ["Cluster", "Ended", "Replica", "clustered", "command", "eventually", "pause", "until"]

T = TypeVar("T")
START_S = 30.0
SOON_S = 20.0  # in which a cluster has to be whole again
LOOK_EVERY_S = 0.02
# Times that make a test short: what takes seconds in operation takes tenths here.
QUICK: dict[str, object] = {
    "poll_s": 0.3,
    "bundle_store_timeout_s": 0.5,
    "registry_timeout_s": 1.0,
    "replica_ttl_s": 1.5,
    "generation_wait_s": 10.0,
    "drain_s": 2,
}
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tests.replicas.replica"])


@dataclass
class Replica:
    """One server process."""

    name: str
    process: ForkServerProcess
    ready: Connection
    log: Path
    store: Path
    port: int
    wire: Proxy | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @cached_property
    def http(self) -> httpx.Client:
        """A client that waits for a server which does not listen yet."""
        retrying = httpx.HTTPTransport(retries=8)
        return httpx.Client(base_url=self.url, timeout=30, transport=retrying)

    def await_ready(self, within_s: float = START_S) -> None:
        """Return when it says that it is ready."""
        assert self.ready.poll(within_s), f"{self.name} is not ready; {self.said()}"
        try:
            assert self.ready.recv() == self.url
        except EOFError:
            raise AssertionError(f"{self.name} has ended; {self.said()}") from None

    def is_ready(self) -> bool:
        return self.http.get("/readyz").status_code == 200

    def generation(self) -> int:
        """Of what it serves."""
        return int(self.http.get("/livez").headers["x-registry-generation"])

    def metric(self, name: str, **labels: str) -> float:
        """The value of one series on its /metrics; fails if it is not there."""
        wanted = set(labels.items())
        for found, inside, value in SAMPLE.findall(self.http.get("/metrics").text):
            if found == name and wanted == set(LABEL.findall(inside)):
                return float(value)
        raise AssertionError(f"no {name} {labels} on {self.name}")

    def classify(self, image: bytes, model: str, generation: str = "") -> httpx.Response:
        """The answer to a PNG, with the least generation if one is given."""
        headers = {"content-type": "image/png"}
        headers |= {"x-min-generation": generation} if generation else {}
        path = f"/v1/classify?model={model}"
        return self.http.post(path, content=image, headers=headers)

    def live(self) -> dict[str, str | None]:
        """The live version of each task."""
        tasks = self.http.get("/v1/tasks").json()["tasks"]
        return {task["task"]: task.get("live") for task in tasks}

    def states(self, task: str) -> dict[str, str]:
        """The state of each version of a task, on this replica."""
        versions = self.http.get(f"/v1/tasks/{task}").json()["versions"]
        return {one["version"]: one["state"] for one in versions}

    def kill(self) -> None:
        """As the kernel does when memory is short."""
        self.process.kill()
        self.process.join(10)

    def freeze(self) -> None:
        os.kill(self.process.pid or 0, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.process.pid or 0, signal.SIGCONT)

    def said(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-3000:]


SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass
class Cluster:
    """Replicas by name, their Redis and their bundle store."""

    redis: RedisServer
    prefix: str
    folder: Path
    replicas: dict[str, Replica] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)

    @property
    def bundles(self) -> Path:
        """The folder of the shared bundle store."""
        return self.folder / "bundles"

    @property
    def all(self) -> list[Replica]:
        return list(self.replicas.values())

    def start(
        self,
        name: str,
        *,
        wired: bool = False,
        deadly: str = "",
        backbone: int = 0,
        port: int = 0,
        **settings: object,
    ) -> Replica:
        """Begin a replica; `wired` puts a wire of its own between it and Redis."""
        wire = self._stack.enter_context(proxied(self.redis.port)) if wired else None
        port = port or free_port()
        fields = QUICK | {
            "store": self.folder / name,
            "bundle_store": str(self.bundles),
            "registry": f"redis://127.0.0.1:{wire.port if wire else self.redis.port}/0",
            "registry_prefix": self.prefix,
            "replica": name,
            "port": port,
        }
        orders = Orders(
            settings=fields | settings,
            log=self.folder / f"{name}.log",
            deadly=deadly,
            backbone=backbone,
        )
        ready, theirs = _forks.Pipe(duplex=False)
        process = _forks.Process(target=run_replica, args=(orders, theirs), daemon=True)
        process.start()
        theirs.close()
        replica = Replica(name, process, ready, orders.log, self.folder / name, port, wire)
        self.replicas[name] = replica
        self._stack.callback(_end, replica)
        return replica

    def start_all(self, *names: str, **settings: Any) -> list[Replica]:
        """Start replicas at once, and return when each is ready."""
        started = [self.start(name, **settings) for name in names]
        for replica in started:
            replica.await_ready()
        return started

    def restart(self, replica: Replica, **settings: Any) -> Replica:
        """The same replica as a new process, on the same port, with the same folder."""
        return self.start(replica.name, port=replica.port, **settings)

    def view(self, name: str) -> Path:
        """A copy of the bundle store, for one replica to look at."""
        copy = self.folder / f"{name}-bundles"
        # What is being written there is gone before it can be copied.
        shutil.copytree(self.bundles, copy, ignore=shutil.ignore_patterns("incoming"))
        return copy

    def bring(self, view: Path) -> None:
        """Let a view have all that the store has."""
        for path in self.bundles.rglob("*.safetensors"):
            there = view / path.relative_to(self.bundles)
            there.unlink(missing_ok=True)
            shutil.copy(path, there)

    def files(self, digest: str, *, under: Path | None = None) -> list[Path]:
        """Where the store has a bundle."""
        name = digest.rpartition(":")[2]
        return [path for path in (under or self.bundles).rglob("*") if name in path.name]

    def lose(self, digest: str) -> None:
        """Take a bundle away from the store."""
        (path,) = self.files(digest)
        path.unlink()

    def until_level(self, *, of: Sequence[Replica] = (), within_s: float = SOON_S) -> int:
        """Wait until all serve the same generation and none knows of a later one; returns it."""

        def level() -> int | None:
            seen = {replica.generation() for replica in of or self.all}
            behind = any(r.metric("medley_registry_lag_seconds") for r in of or self.all)
            return None if len(seen) > 1 or behind else seen.pop()

        return until(level, within_s=within_s, what="the replicas are level")

    def close(self) -> None:
        self._stack.close()


@dataclass(frozen=True)
class Ended:
    """A command that has run."""

    status: int
    said: list[str]


def command(words: list[str], environment: dict[str, str], folder: Path) -> Ended:
    """Run `medley ...` to its end; `said` are its lines."""
    log = folder / f"command-{next(_numbers)}.log"
    process = _forks.Process(target=run_command, args=(words, environment, log), daemon=True)
    process.start()
    process.join(60)
    if process.exitcode is None:
        process.kill()
        process.join()
    return Ended(process.exitcode or 0, log.read_text().splitlines())


_numbers = itertools.count()


def until(found: Callable[[], T | None], *, within_s: float = SOON_S, what: str = "it is so") -> T:
    """Ask again and again until there is an answer other than None."""
    deadline_s = time.monotonic() + within_s
    while (answer := found()) is None:
        assert time.monotonic() < deadline_s, f"not within {within_s} s: {what}"
        pause(LOOK_EVERY_S)
    return answer


def eventually(holds: Callable[[], bool], *, within_s: float = SOON_S, what: str = "") -> None:
    """Wait until something holds."""
    until(lambda: holds() or None, within_s=within_s, what=what)


def pause(seconds: float) -> None:
    """Let time pass: here it is what is tested."""
    threading.Event().wait(max(0.0, seconds))


@contextmanager
def clustered(redis: RedisServer, prefix: str, folder: Path) -> Iterator[Cluster]:
    """A cluster that has no replica yet."""
    folder.mkdir(exist_ok=True)
    cluster = Cluster(redis, prefix, folder)
    try:
        yield cluster
    finally:
        cluster.close()


def _end(replica: Replica) -> None:
    replica.http.close()
    replica.process.kill()  # a frozen one too
    replica.process.join()
    replica.process.close()
    replica.ready.close()
