"""Versions that share a unified model, on replicas that share a store which loses it."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from medley.backbone import Backbone
from tests.replicas.cluster import Cluster, Replica
from tests.service.conftest import MakeBundle
from tests.service.fused import Made, made_fusion
from tests.service.versions.test_tasks import put

ANSWERS = ("birds", "cars", "pets")


@pytest.fixture(scope="module")
def fusion(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> Made:
    """Two tasks with low-rank updates, `birds` and `cars`."""
    return made_fusion(tmp_path_factory.mktemp("fusion"), backbone)


def put_unified(at: Replica, fusion: Made) -> None:
    answer = at.http.put(f"/v1/unified/{fusion.digest}", content=fusion.path.read_bytes())
    answer.raise_for_status()


def register(at: Replica, fusion: Made, task: str) -> httpx.Response:
    return put(at.http, fusion.file(task).read_bytes(), task)


def answers(at: Replica, image: bytes) -> list[object]:
    said = [at.classify(image, task) for task in ANSWERS]
    return [one.raise_for_status().json()["results"][0]["top_k"] for one in said]


def test_what_one_replica_took_in_is_what_others_load_from_also_after_the_store_lost_it(
    cluster: Cluster, fusion: Made, make: MakeBundle, image: bytes
) -> None:
    a, b = cluster.start_all("a", "b", keep_unused_s=0)
    put(a.http, make(task="pets")[1]).raise_for_status()
    put_unified(a, fusion)
    register(b, fusion, "birds").raise_for_status()
    cluster.until_level()

    cluster.lose(fusion.digest)
    register(a, fusion, "cars").raise_for_status()  # who commits looks, and has a copy
    cluster.until_level()
    (c,) = cluster.start_all("c")

    assert answers(a, image) == answers(b, image) == answers(c, image)
    assert c.states("birds") == c.states("cars") == {"1": "live"}
    assert len({str(said) for said in answers(c, image)}) == len(ANSWERS)


def test_without_the_store_nothing_is_registered_and_a_kill_after_the_commit_changes_nothing(
    cluster: Cluster, fusion: Made, make: MakeBundle, image: bytes, tmp_path: Path
) -> None:
    (a,) = cluster.start_all("a")
    b = cluster.start("b", deadly="committed")
    b.await_ready()
    put(a.http, make(task="pets")[1]).raise_for_status()
    put_unified(b, fusion)
    cluster.bundles.rename(tmp_path / "away")
    cluster.bundles.write_text("not a folder")
    assert register(a, fusion, "birds").status_code in (503, 507)
    assert a.is_ready()
    cluster.bundles.unlink()
    (tmp_path / "away").rename(cluster.bundles)
    register(a, fusion, "birds").raise_for_status()

    with pytest.raises(httpx.HTTPError):
        register(b, fusion, "cars")
    b.process.join(10)
    (again,) = cluster.start_all("again")

    cluster.until_level(of=[a, again])
    assert answers(a, image) == answers(again, image)
