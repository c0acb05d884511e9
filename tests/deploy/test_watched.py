"""A real Prometheus looks at real servers: every panel has data, the right alerts fire."""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from deploy.grafana.boards import BOARDS
from deploy.grafana.panels import Query
from deploy.grafana.pictures import png
from deploy.grafana.source import Series, Source, Span
from tests.deploy.traffic import SETTINGS, asking, register, stir
from tests.deploy.watched import Pace, Prometheus, watching
from tests.replicas.cluster import Cluster, eventually, pause
from tests.replicas.conftest import backbone, cluster, fragile, image, make, redis_server
from tests.service.conftest import MakeBundle
from tests.service.versions.test_tasks import put

__all__ = ["backbone", "cluster", "fragile", "image", "make", "redis_server"]
KEY = "for-reading"
QUICK = Pace(windows={"5m": "8s", "1h": "10s", "2m": "4s", "15m": "15s", "10m": "15s", "1m": "4s"})
HASTY = replace(QUICK, waits="2s")
QUIET_S = 6.0  # longer than any alert waits


@contextmanager
def watched(cluster: Cluster, folder: Path, pace: Pace) -> Iterator[Prometheus]:
    targets = {replica.name: urlsplit(replica.url).netloc for replica in cluster.all}
    with watching(folder, targets, pace=pace, key=KEY) as prometheus:
        yield prometheus


def empty(source: Source) -> list[str]:
    """Queries of panels that have no number to show."""
    return [
        f"{board.uid}, {panel.title}: {source.expr(query)}"
        for board in BOARDS
        for panel in board.panels
        if not panel.gpu_only
        for query in panel.queries
        if not any(has_number(one) for one in source.curves(query))
    ]


def has_number(series: Series) -> bool:
    return any(value == value for value in series.values)


@pytest.mark.parametrize(
    ("load_s", "pace", "rate"),
    [
        pytest.param(9, QUICK, "8s", id="soon"),
        pytest.param(75, Pace(), "20s", id="in a minute", marks=pytest.mark.slow),
    ],
)
def test_every_query_of_every_dashboard_has_data(
    cluster: Cluster, make: MakeBundle, tmp_path: Path, load_s: int, pace: Pace, rate: str
) -> None:
    cluster.start_all("a", "b", **SETTINGS)
    with watched(cluster, tmp_path / "prometheus", pace) as prometheus:
        register(cluster.replicas["a"], make)
        with asking(cluster, per_s=8):
            eventually(lambda: prometheus.value("count(up == 1)") == 2)
            begin_s = time.time()
            for turn in itertools.count():
                stir(cluster.replicas["a"], make, turn=turn)
                if time.time() > begin_s + load_s:
                    break
                pause(0.3)
            eventually(lambda: prometheus.value("medley_store_bundles") is not None)  # the last one
        span = Span(begin_s, time.time())
        source = Source(prometheus.http, span, rate=rate, job="medley")

        assert empty(source) == []


def test_a_server_is_read_with_its_key_and_not_with_another(
    cluster: Cluster, tmp_path: Path
) -> None:
    for name, key in {"right": KEY, "wrong": "another"}.items():
        cluster.start(name, read_key=key)
    for replica in cluster.all:
        replica.await_ready()
    with watched(cluster, tmp_path / "prometheus", QUICK) as prometheus:
        seen = {name: f'up{{job="medley", instance="{name}"}}' for name in cluster.replicas}
        eventually(lambda: None not in map(prometheus.value, seen.values()))

        assert {name: prometheus.value(up) for name, up in seen.items()} == {"right": 1, "wrong": 0}


def test_a_curve_has_every_point_of_its_span(tmp_path: Path) -> None:
    with watching(tmp_path / "prometheus", {}, pace=QUICK) as prometheus:
        for long_s in (17.3, 240.0, 251.7, 3600.5):
            span = Span(1.8e9 + 0.123, 1.8e9 + 0.123 + long_s)
            (curve,) = Source(prometheus.http, span).curves(Query("time()"))

            assert curve.values == pytest.approx(span.times_s)
            assert span.end_s - span.times_s[-1] < span.step_s


def test_a_dashboard_is_drawn_and_one_without_numbers_too(tmp_path: Path) -> None:
    with watching(tmp_path / "prometheus", {}, pace=QUICK) as prometheus:
        now_s = time.time()
        source = Source(prometheus.http, Span(now_s - 60, now_s))
        drawn = [png(board, source) for board in BOARDS]

    for picture in drawn:
        with Image.open(io.BytesIO(picture)) as image:
            assert image.width > 1000


@pytest.mark.slow
class TestTheRightAlertFires:
    """In real time but for the waits, which are two seconds; and it is silent when all is well."""

    @pytest.fixture
    def three(self, fragile: Cluster, make: MakeBundle) -> Cluster:
        for name in ("a", "b", "c"):
            fragile.start(name, wired=True)
        for replica in fragile.all:
            replica.await_ready()
        put(fragile.replicas["a"].http, make(task="pets")[1]).raise_for_status()
        return fragile

    @pytest.fixture
    def prometheus(self, three: Cluster, tmp_path: Path) -> Iterator[Prometheus]:
        with watched(three, tmp_path / "prometheus", HASTY) as prometheus:
            eventually(lambda: prometheus.value("count(up == 1)") == 3)
            pause(QUIET_S)
            assert prometheus.firing() == set()
            yield prometheus

    def test_when_redis_is_frozen(self, three: Cluster, prometheus: Prometheus) -> None:
        three.redis.freeze()
        fires(prometheus, "MedleyRegistryDown")
        three.redis.thaw()
        falls_silent(prometheus)

    def test_when_redis_comes_back_empty(self, three: Cluster, prometheus: Prometheus) -> None:
        three.redis.restart(empty=True)
        fires(prometheus, "MedleyRegistryRecovered")
        falls_silent(prometheus)

    def test_when_one_replica_loses_redis_and_the_others_go_on(
        self, three: Cluster, prometheus: Prometheus, make: MakeBundle
    ) -> None:
        wire = three.replicas["b"].wire
        assert wire is not None
        wire.cut()
        put(three.replicas["a"].http, make(task="guest")[1], "guest").raise_for_status()
        fires(prometheus, "MedleyReplicasDisagree", "MedleyRegistryDown")
        wire.mend()
        falls_silent(prometheus)

    def test_when_a_replica_is_killed(self, three: Cluster, prometheus: Prometheus) -> None:
        three.replicas["c"].kill()
        fires(prometheus, "MedleyDown")
        three.restart(three.replicas["c"]).await_ready()
        falls_silent(prometheus)

    def test_when_a_bundle_does_not_do_what_it_says(
        self, three: Cluster, prometheus: Prometheus, make: MakeBundle
    ) -> None:
        bad = make(task="bad", self_test_error=1.0)[1]
        assert put(three.replicas["a"].http, bad, "bad").status_code == 422
        fires(prometheus, "MedleySelfTestFailed")
        falls_silent(prometheus)

    def test_when_the_store_is_away(self, three: Cluster, prometheus: Prometheus) -> None:
        """Though nobody asks it for anything."""
        aside = three.bundles.rename(three.folder / "aside")
        fires(prometheus, "MedleyStoreDown")
        aside.rename(three.bundles)
        falls_silent(prometheus)


def fires(prometheus: Prometheus, *alerts: str) -> None:
    """Wait until these fire."""
    told = f"{alerts} fire"
    eventually(lambda: set(alerts) <= prometheus.firing(), within_s=40, what=told)


def falls_silent(prometheus: Prometheus) -> None:
    """Wait until nothing fires, once what went wrong has been mended."""
    eventually(lambda: not prometheus.firing(), within_s=60, what="nothing fires")
