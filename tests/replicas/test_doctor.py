"""The doctor over several replicas: well together, and with one that cannot join."""

import json

import pytest
from typer.testing import CliRunner

from service.commands import commands
from service.doctor.findings import Finding
from service.doctor.replicas import check_replicas
from service.doctor.site import Site
from tests.replicas.cluster import Cluster, eventually
from tests.service.conftest import MakeBundle
from tests.service.versions.test_tasks import put

RUNNER = CliRunner()


def examined(*words: str) -> dict[str, dict[str, str]]:
    """What it says of each check, and status 1 if one failed."""
    shown = RUNNER.invoke(commands, ["doctor", *words, "--json"])
    rows = {row["check"]: row for row in map(json.loads, shown.stdout.splitlines())}
    assert shown.exit_code == any(row["outcome"] == "fail" for row in rows.values())
    return rows


@pytest.fixture
def pair(cluster: Cluster, make: MakeBundle) -> list[str]:
    """Two replicas with a task."""
    replicas = cluster.start_all("a", "b")
    put(replicas[0].http, make(task="pets")[1]).raise_for_status()
    eventually(lambda: all(replica.metric("medley_replicas") == 2 for replica in replicas))
    cluster.until_level()
    return [replica.url for replica in replicas]


def test_replicas_that_are_well_pass_everything(pair: list[str]) -> None:
    rows = examined(*pair)
    assert [row for row in rows.values() if row["outcome"] == "fail"] == []
    assert rows["replicas: each has every version"]["came"] == "2 have all"
    assert rows["generation: asked for"]["outcome"] == "pass"


def test_one_that_cannot_join_is_named_by_the_others(
    cluster: Cluster, pair: list[str], make: MakeBundle
) -> None:
    cluster.lose(make(task="pets")[0].digest)
    late = cluster.start("late")
    with Site(pair[0]) as site:

        def ready() -> Finding:
            return next(f for f in check_replicas([site]) if f.check == "replicas: ready")

        eventually(lambda: "late: starting" in ready().came)
        assert ready().outcome == "fail"
    assert not late.is_ready()
