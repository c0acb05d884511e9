"""Lines as a run would write them, from numbers made up."""

from pathlib import Path

from medley.journal import Conditions, Journal, Run
from service.bench.names import AGREEMENT, BATCHED, INFINITY, RIVAL, RIVAL_LOAD

RUN = Run(
    command="medley bench serve", machine="a desk", device="cpu", versions="1", started="2026-11-22"
)
SITE: Conditions = {"images": "jpeg", "tasks": 16, "mix": "uniform"}
QUIET: Conditions = {**SITE, "swaps": "none", "load": 80}
SWAPPED: Conditions = {**SITE, "swaps": "every second", "load": 80}
PAIR: Conditions = {"backbone": "ViT-S-32", "images": "jpeg"}


def values(**given: float) -> dict[str, float]:
    usual = {"visits": 200.0, "errors": 0.0, "throughput_hz": 40.0, "rate_hz": 41.0}
    usual |= {"p50_s": 0.02, "p95_s": 0.03, "p99_s": 0.04, "rss_bytes": 1e9}
    usual |= {"server_cpu_s": 0.02, "visitor_cpu_s": 0.001, "batch_images": 1.0, "queue_s": 0.01}
    return usual | given


def lines(folder: Path, *, http_s: float = 1.1, errors: float = 0.0, apart: float = 1e-7) -> None:
    """A line of each kind; HTTP takes so long where the bare loop takes 1."""
    journal = Journal(folder, RUN)
    journal.add("served", {"backbone": "medley-mini", "buckets": "1"}, "medley")
    journal.add("saturation", SITE, "medley", times_s=[0.02] * 200, values=values())
    journal.add("load", QUIET, "medley", times_s=[0.02] * 200, values=values(errors=errors))
    swaps = {"swap_s": (0.05, 0.07, 0.06)}
    journal.add("load", SWAPPED, "medley", times_s=[0.02] * 99, values=values(), series=swaps)
    for bench in ("beside bare, saturated", "beside bare, alone"):
        columns = {"medley": http_s, "bare loop": 1.0, "bare loop, decoded before": 0.8}
        for name, time_s in columns.items():
            cpu = {"cpu_s": time_s / 100} if bench.endswith("saturated") else {}
            journal.add(bench, SITE, name, times_s=[time_s, 2 * time_s], values=cpu)
    for name in ("medley", BATCHED):
        journal.add(AGREEMENT, PAIR, name, values={"apart": apart})
    for name, time_s in (("medley", 0.02), (BATCHED, 0.01), (INFINITY, 0.015)):
        journal.add(RIVAL, PAIR, name, times_s=[time_s] * 3, values=values())
        journal.add(RIVAL_LOAD, PAIR, name, times_s=[time_s] * 200, values=values())
