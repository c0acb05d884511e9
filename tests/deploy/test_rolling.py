"""Replicas are replaced one by one behind the proxy, under load."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import pytest

from tests.deploy.haproxy import haproxy_before
from tests.replicas.cluster import Cluster, eventually
from tests.replicas.conftest import backbone, cluster, image, make, redis_server
from tests.service.conftest import MakeBundle
from tests.service.load import loading
from tests.service.raw import post

__all__ = ["backbone", "cluster", "image", "make", "redis_server"]
NAMES = {"replica-1", "replica-2"}
DRAIN_DELAY_S = 5.0  # as in docker-compose.yml
LEAVES_WITHIN_S = 30.0


@pytest.mark.slow
def test_replacing_each_replica_in_turn_fails_no_request(
    cluster: Cluster, make: MakeBundle, image: bytes, tmp_path: Path
) -> None:
    replicas = cluster.start_all(*NAMES, drain_delay_s=DRAIN_DELAY_S)
    ports = {replica.name: replica.port for replica in replicas}
    request = post("/v1/classify?model=pets", image, content_type="image/png")
    with haproxy_before(ports, tmp_path) as url, httpx.Client(base_url=url) as http:
        eventually(lambda: _answering(http) == NAMES)
        registered = http.put("/v1/tasks/pets/versions/1", content=make()[1], timeout=60)
        registered.raise_for_status()
        cluster.until_level()
        with loading(url, [("pets", request)], clients=4) as tally:
            for replica in replicas:
                os.kill(replica.process.pid or 0, signal.SIGTERM)
                replica.process.join(LEAVES_WITHIN_S)
                assert replica.process.exitcode == 0
                cluster.restart(replica, drain_delay_s=DRAIN_DELAY_S).await_ready()
                eventually(lambda: _answering(http) == NAMES)

    assert set(tally.statuses) == {200}
    assert len(tally.answers) == 1, "an answer differs"
    assert (tally.torn, dict(tally.again)) == (0, {})


def _answering(http: httpx.Client) -> set[str]:
    """Who answers a few requests; nobody, if one of them is not answered."""
    try:
        asked = [http.get("/livez") for _ in range(8)]
    except httpx.TransportError:
        return set()
    return {answer.headers.get("x-replica", "") for answer in asked}
