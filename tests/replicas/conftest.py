"""Clusters for the fault tests: each has a prefix of its own on a Redis, or a Redis of its own."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.redis_server import RedisServer
from tests.redis_server import redis_server as running_redis
from tests.replicas.cluster import Cluster, clustered
from tests.replicas.witness import Witness
from tests.service.conftest import backbone, image, make, redis_server

__all__ = ["backbone", "image", "make", "redis_server"]
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")


@pytest.fixture
def cluster(redis_server: RedisServer, tmp_path: Path) -> Iterator[Cluster]:
    """A cluster without a replica; the Redis is every test's, and stays as it is."""
    with clustered(redis_server, f"t-{uuid.uuid4().hex[:8]}", tmp_path) as made:
        yield made


@pytest.fixture
def fragile(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster without a replica, whose Redis is its own and writes down every change."""
    with (
        running_redis(tmp_path / "redis", *DURABLE) as redis,
        clustered(redis, "medley", tmp_path) as made,
    ):
        yield made


@pytest.fixture
def witness(image: bytes) -> Witness:
    """Who knows the right answers; `prepare` it with a replica."""
    return Witness(image)
