"""What a server tells Prometheus. One registry per app: two apps in one process do not mix.

Labels come from small closed sets. The one open set, task names, is capped: beyond `task_series`
names the rest is counted as `other`, and the series of a task that is gone go. `docs/metrics.md`
has the same list for people; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version

import torch
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

__all__ = ["NOBODY", "OTHER", "ZERO_SHOT_LABEL", "Metrics", "package_version"]

ZERO_SHOT_LABEL = "zero_shot"
NOBODY = "none"  # of images that got no answer
OTHER = "other"  # tasks beyond the cap, and such as are gone when their last images are counted
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_AGES_S = (1, 10, 60, 600, 3600, 6 * 3600, 24 * 3600, 7 * 24 * 3600)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_MARGINS = (-10, -5, -2, -1, -0.5, 0, 0.5, 1, 2, 5, 10)  # of scores, which are about standard


class Metrics:
    """All metrics of one app, by name."""

    def __init__(self, *, task_series: int = 200) -> None:
        """Make them all.

        Args:
            task_series: task names that have series of their own.
        """
        # Process-wide: as many series again, which nobody asks for.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry()
        self.before_scrape: list[Callable[[], None]] = []
        registry.register(_Before(self.before_scrape))  # first, so that it is asked first
        self._task_series = task_series
        self._own: set[str] = set()  # tasks with series of their own
        self._folded: set[str] = set()  # tasks counted as `other`
        self.exists: Callable[[str], bool] = lambda task: True
        self.requests = Counter(
            "medley_requests",
            "HTTP requests by operation and status",
            ["operation", "status"],
            registry=registry,
        )
        self.request_duration_s = Histogram(
            "medley_request_duration_seconds",
            "HTTP requests, from their headers in to the last byte out",
            ["operation"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.stage_duration_s = Histogram(
            "medley_stage_duration_seconds",
            "Time of one stage, of an image, a batch or a request",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.images = Counter(
            "medley_images",
            "Images by the task that answered, how it was chosen and what became of them",
            ["task", "route", "outcome"],
            registry=registry,
        )
        self.router_decisions = Counter(
            "medley_router_decisions",
            "What DDAS decided for images asked as auto",
            ["decision"],
            registry=registry,
        )
        self.aggregated_images = Counter(
            "medley_aggregated_images",
            "Images that no task claims and that neighbours answered too",
            registry=registry,
        )
        self.router_margin = Histogram(
            "medley_router_margin",
            "Threshold minus score of the task that knew an auto image best; accepted from 0 up",
            ["task"],
            buckets=_MARGINS,
            registry=registry,
        )
        self.task_forward_s = Counter(
            "medley_task_forward_seconds",
            "A task's share of the forwards: each image its part of its batch",
            ["task"],
            registry=registry,
        )
        self.rollout_images = Counter(
            "medley_rollout_images",
            "Images that a candidate computed, by whether its label was the live version's",
            ["task", "result"],
            registry=registry,
        )
        self.rollout_acceptance = Counter(
            "medley_rollout_acceptance",
            "The same images by which version's selector accepted them",
            ["task", "accepted"],
            registry=registry,
        )
        self.rollout_stops = Counter(
            "medley_rollout_stops",
            "Candidates that were taken out by themselves",
            ["task"],
            registry=registry,
        )
        self.folded_tasks = Gauge(
            "medley_folded_tasks", "Tasks without series of their own", registry=registry
        )
        self.folded_tasks.set_function(lambda: len(self._folded))
        self.problems = Counter(
            "medley_problems",
            "Problems answered, of a request or of one image in it, by code",
            ["code"],
            registry=registry,
        )
        self.inflight = Gauge(
            "medley_inflight_requests", "HTTP requests being answered", registry=registry
        )
        self.connections_refused = Counter(
            "medley_connections_refused",
            "Connections closed by a limit, or as they did not speak HTTP/1.1",
            ["code"],
            registry=registry,
        )
        self.inflight_bytes = Gauge(
            "medley_inflight_bytes", "Bytes of bodies and fetched images", registry=registry
        )
        self.inflight_images = Gauge(
            "medley_inflight_images", "Images taken in and not yet answered", registry=registry
        )
        self.decode_backlog_images = Gauge(
            "medley_decode_backlog_images",
            "Images given to decode and not ready",
            registry=registry,
        )
        self.queue_depth = Gauge("medley_queue_depth", "Images that wait", registry=registry)
        self.queue_oldest_s = Gauge(
            "medley_queue_oldest_seconds", "How long the oldest image has waited", registry=registry
        )
        self.last_forward_age_s = Gauge(
            "medley_last_forward_age_seconds",
            "Time since the last forward that succeeded",
            registry=registry,
        )
        self.batch_images = Histogram(
            "medley_batch_images", "Images in a batch", buckets=_COUNTS, registry=registry
        )
        self.batch_distinct_tasks = Histogram(
            "medley_batch_distinct_tasks",
            "Paths that one batch took, zero-shot counted as one",
            buckets=_COUNTS,
            registry=registry,
        )
        self.neighbour_rows = Counter(
            "medley_neighbour_rows",
            "Rows of batches for neighbours of images that no task claims",
            registry=registry,
        )
        self.batch_failures = Counter(
            "medley_batch_failures", "Batches and jobs that failed", registry=registry
        )
        self.out_of_memory = Counter(
            "medley_out_of_memory", "Forwards and jobs that found no memory", registry=registry
        )
        self.bundle_resident = Gauge(
            "medley_bundle_resident",
            "1 for each version on the device, or ready in memory",
            ["task", "version", "tier", "pinned"],
            registry=registry,
        )
        self.bundle_bytes = Gauge(
            "medley_bundle_bytes", "What the versions there take", ["tier"], registry=registry
        )
        self.bundle_slots = Gauge(
            "medley_bundle_slots",
            "Expert slots of the fullest block of both towers",
            ["state"],
            registry=registry,
        )
        self.fused_slots = Gauge(
            "medley_fused_slots",
            "Room for versions from unified models: low-rank updates, models of their own",
            ["kind", "state"],
            registry=registry,
        )
        self.bundle_loads = Counter(
            "medley_bundle_loads", "Admissions by result", ["result"], registry=registry
        )
        self.self_test_failures = Counter(
            "medley_self_test_failures",
            "Versions that did not answer as they did when they were made",
            registry=registry,
        )
        self.bundle_load_s = Histogram(
            "medley_bundle_load_seconds",
            "Time of one phase of bringing a version to the device",
            ["phase"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.bundle_evictions = Counter(
            "medley_bundle_evictions", "Versions that left for others", registry=registry
        )
        self.bundle_age_at_eviction_s = Histogram(
            "medley_bundle_age_at_eviction_seconds",
            "How long an evicted version had not been asked for",
            buckets=_AGES_S,
            registry=registry,
        )
        self.unloads_late = Counter(
            "medley_unloads_late",
            "Versions that requests kept on the device for too long",
            registry=registry,
        )
        self.unclaimed_images = Gauge(
            "medley_unclaimed_images",
            "Images in the sample of those that no task claims",
            registry=registry,
        )
        self.overlap_warnings = Counter(
            "medley_overlap_warnings",
            "Tasks that a registered version was found to overlap with",
            registry=registry,
        )
        self.registry_up = Gauge(
            "medley_registry_up",
            "Whether the registry could be used when it last was",
            registry=registry,
        )
        self.generation = Gauge(
            "medley_registry_generation",
            "Generation of the registry, desired and observed",
            ["kind"],
            registry=registry,
        )
        self.registry_lag_s = Gauge(
            "medley_registry_lag_seconds",
            "Since when the registry is known to be ahead of what is served",
            registry=registry,
        )
        self.registry_recoveries = Counter(
            "medley_registry_recoveries",
            "Times that this server gave a Redis back what it had lost",
            registry=registry,
        )
        self.registry_backup_generation = Gauge(
            "medley_registry_backup_generation",
            "Generation of the last state that this server saw safe in the bundle store",
            registry=registry,
        )
        self.follows = Counter(
            "medley_follows",
            "Steps to the state of the registry, by result",
            ["result"],
            registry=registry,
        )
        for result in ("ok", "failed", "unavailable"):
            self.follows.labels(result)
        self.follow_s = Histogram(
            "medley_follow_seconds",
            "Time of one such step, loading included",
            buckets=_SECONDS,
            registry=registry,
        )
        self.versions = Gauge(
            "medley_versions", "Versions by their state here", ["state"], registry=registry
        )
        self.replicas = Gauge(
            "medley_replicas", "Replicas that this one knows to be alive", registry=registry
        )
        self.store_up = Gauge(
            "medley_store_up",
            "Whether the bundle store could be used when it last was",
            registry=registry,
        )
        self.store_bundles = Gauge(
            "medley_store_bundles",
            "Bundles in the shared store when this server last went through it; lost: named only",
            ["state"],
            registry=registry,
        )
        self.store_collected = Counter(
            "medley_store_collected",
            "Bundles that this server deleted from the shared store",
            registry=registry,
        )
        self.ready = Gauge(
            "medley_ready", "Whether traffic should come here, as /readyz says", registry=registry
        )
        ProcessCollector(registry=registry)
        self.memory_limit_bytes = Gauge(
            "medley_memory_limit_bytes",
            "Memory that this process may take",
            registry=registry,
        )
        self.device_memory_bytes = Gauge(
            "medley_device_memory_bytes",
            "Memory of the device, if it has its own",
            ["kind"],
            registry=registry,
        )
        self.build = Gauge(
            "medley_build_info",
            "Always 1; the labels say what runs here",
            ["version", "backbone", "fingerprint", "torch"],
            registry=registry,
        )

    def describe(self, backbone: str, fingerprint: str) -> None:
        """Say once what runs here."""
        self.build.labels(package_version(), backbone, fingerprint, torch.__version__).set(1)

    def count_image(self, task: str | None, route: str) -> None:
        """Count one image that was answered; `task` is None for zero-shot."""
        self.images.labels(self.task_label(task), route, "ok").inc()

    def count_failures(self, route: str, outcome: str, *, images: int = 1) -> None:
        """Count images that got no answer."""
        self.images.labels(NOBODY, route, outcome).inc(images)

    def task_label(self, task: str | None) -> str:
        """The label of a task; None is zero-shot.

        One that does not exist any more is `other`: no series comes back after `forget_task`.
        """
        if task is None:
            return ZERO_SHOT_LABEL
        if task in self._own:
            return task
        if not self.exists(task):
            return OTHER
        if len(self._own) >= self._task_series:
            self._folded.add(task)
            return OTHER
        self._folded.discard(task)
        self._own.add(task)
        return task

    def forget_task(self, task: str) -> None:
        """Drop the series of a task that is gone, so that churn does not pile them up."""
        self._own.discard(task)
        self._folded.discard(task)
        for metric in (
            self.images,
            self.router_margin,
            self.task_forward_s,
            self.rollout_images,
            self.rollout_acceptance,
            self.rollout_stops,
        ):
            metric.remove_by_labels({"task": task})


class _Before(Collector):
    """No metric: what is to be measured before a scrape."""

    def __init__(self, actions: Sequence[Callable[[], None]]) -> None:
        self._actions = actions

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        for action in self._actions:
            action()
        return ()


def package_version() -> str:
    """Version of the installed package, `unknown` when run from a bare checkout."""
    try:
        return version("medley-clip")
    except PackageNotFoundError:
        return "unknown"
