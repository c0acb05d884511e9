"""Makes the pictures of docs/dashboards.md: `python -m tests.deploy.shown --out docs/dashboards`.

Three replicas with the tiny backbone, their Redis and a real Prometheus, loaded for some minutes;
meanwhile versions come and go, Redis is frozen, one replica loses it for a while, and in the end it
is emptied. So each curve has something to show. Nothing here is a measurement.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from deploy.grafana.boards import BOARDS
from deploy.grafana.pictures import png
from deploy.grafana.source import Source, Span
from medley.bundle import Bundle
from tests.deploy.traffic import SETTINGS, asking, register, stir
from tests.deploy.watched import Pace, watching
from tests.models import tiny_backbone
from tests.redis_server import redis_server
from tests.replicas.cluster import Cluster, clustered, pause
from tests.service.made import make_bundle

PACE = Pace(windows={"5m": "20s", "1h": "60s", "2m": "10s", "15m": "60s", "10m": "60s", "1m": "5s"})
NAMES = ("replica-1", "replica-2", "replica-3")
STIR_EVERY_S = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5.0)
    words = parser.parse_args()
    words.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        show(Path(folder), words.out, 60 * words.minutes)


def show(folder: Path, out: Path, lasts_s: float) -> None:
    """Run the cluster for so long, and draw what Prometheus has seen."""
    with ExitStack() as stack:
        redis = stack.enter_context(redis_server(folder / "redis", "--appendonly", "yes"))
        cluster = stack.enter_context(clustered(redis, "medley", folder))
        for name in NAMES:
            cluster.start(name, wired=True, **SETTINGS)
        for replica in cluster.all:
            replica.await_ready()
        targets = {replica.name: urlsplit(replica.url).netloc for replica in cluster.all}
        watched = watching(folder / "prometheus", targets, pace=PACE)
        prometheus = stack.enter_context(watched)
        register(cluster.replicas["replica-1"], _maker(folder))
        begin_s = time.time()
        live_through(cluster, folder, lasts_s)
        span = Span(begin_s, time.time())
        source = Source(prometheus.http, span, rate="15s", job="medley")
        for board in BOARDS:
            (out / f"{board.uid}.png").write_bytes(png(board, source))


def live_through(cluster: Cluster, folder: Path, lasts_s: float) -> None:
    """Load the cluster, more in the middle; something happens in each sixth of the time."""
    part_s = lasts_s / 6
    with asking(cluster, per_s=6), _stirred(cluster, folder):
        pause(part_s)
        with asking(cluster, per_s=12, clients=12):
            pause(part_s)
        cluster.redis.freeze()
        pause(part_s / 2)
        cluster.redis.thaw()
        pause(part_s / 2)
        wire = cluster.replicas["replica-2"].wire
        assert wire is not None
        wire.cut()
        pause(part_s)
        wire.mend()
        cluster.redis.restart(empty=True)
        pause(2 * part_s)


@contextmanager
def _stirred(cluster: Cluster, folder: Path) -> Iterator[None]:
    """Register and remove versions while the block runs, whatever happens to Redis."""
    stop, make = threading.Event(), _maker(folder)

    def stirring() -> None:
        turn = 0
        while not stop.wait(STIR_EVERY_S):
            try:
                stir(cluster.replicas["replica-1"], make, turn=turn)
            except httpx.HTTPError:
                continue  # refused while Redis is away
            turn += 1

    thread = threading.Thread(target=stirring)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _maker(folder: Path) -> Callable[..., tuple[Bundle, bytes]]:
    path, backbone = folder / "made.safetensors", tiny_backbone()

    def made(**fields: Any) -> tuple[Bundle, bytes]:
        return make_bundle(path, backbone=backbone, **fields), path.read_bytes()

    return made


if __name__ == "__main__":
    main()
