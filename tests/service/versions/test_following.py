"""Several servers on one Redis and one bundle store: what one takes in, all answer with."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.redis_server import RedisServer
from tests.service.conftest import MakeBundle, OpenApp
from tests.service.routes.test_classify import classify
from tests.service.versions.test_tasks import put


@dataclass
class Cluster:
    """Opens replicas that share what is under one folder and one prefix."""

    open_app: OpenApp
    folder: Path
    fields: dict[str, Any]

    def replica(self, name: str, **fields: object) -> AbstractContextManager[httpx.Client]:
        given = {"store": self.folder / name, "replica": name} | self.fields | fields
        return self.open_app(**given)


@pytest.fixture
def cluster(redis_server: RedisServer, open_app: OpenApp, tmp_path: Path) -> Cluster:
    """A cluster of its own on the Redis that tests share."""
    fields = {
        "registry": redis_server.url,
        "registry_prefix": uuid.uuid4().hex,
        "bundle_store": str(tmp_path / "shared"),
        "poll_s": 0.2,
        "replica_ttl_s": 2.0,
    }
    return Cluster(open_app, tmp_path, fields)


@pytest.fixture
def three(cluster: Cluster) -> Iterator[list[httpx.Client]]:
    """Three replicas."""
    with ExitStack() as stack:
        yield [stack.enter_context(cluster.replica(f"r{n}")) for n in range(3)]


def until(condition: Callable[[], bool], *, timeout_s: float = 20.0) -> None:
    """Ask again and again, each time with a round trip or more, until it is so."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it did not become so"


def generation(http: httpx.Client) -> int:
    return int(http.get("/v1/tasks").json()["generation"])


def until_at(http: httpx.Client, wanted: int) -> None:
    """Wait until a replica serves this generation."""
    until(lambda: generation(http) >= wanted)


def test_what_one_replica_registers_all_answer_with(
    three: list[httpx.Client], make: MakeBundle, image: bytes
) -> None:
    bundle, data = make()
    created = put(three[0], data)
    assert created.status_code == 201
    for other in three:
        until_at(other, created.json()["generation"])
        (result,) = classify(other, image, model="pets", labels=None).json()["results"]
        assert result["path"]["digest"] == bundle.digest
