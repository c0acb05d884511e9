"""What a server tells Prometheus. One registry per app: two apps in one process do not mix.

Labels come from small closed sets. The one open set, task names, is capped: beyond
`MAX_TASK_LABELS` names the rest is counted as `other`, and a deleted task's series go.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

__all__ = ["MAX_TASK_LABELS", "Metrics", "package_version"]

MAX_TASK_LABELS = 200
ZERO_SHOT_LABEL = "zero_shot"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """All metrics of one app, by name."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._task_labels: set[str] = set()
        self.requests = Counter(
            "medley_requests",
            "HTTP requests by operation and status",
            ["operation", "status"],
            registry=registry,
        )
        self.request_duration_s = Histogram(
            "medley_request_duration_seconds",
            "HTTP requests, from first byte in to last byte out",
            buckets=_SECONDS,
            registry=registry,
        )
        self.stage_duration_s = Histogram(
            "medley_stage_duration_seconds",
            "Time of one image in one stage",
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
        self.inflight = Gauge(
            "medley_inflight_requests", "HTTP requests being answered", registry=registry
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
        self.batch_failures = Counter(
            "medley_batch_failures", "Batches and jobs that failed", registry=registry
        )
        self.bundle_resident = Gauge(
            "medley_bundle_resident",
            "1 for each version on the device",
            ["task", "version"],
            registry=registry,
        )
        self.bundle_loads = Counter(
            "medley_bundle_loads", "Admissions by result", ["result"], registry=registry
        )
        self.bundle_load_s = Histogram(
            "medley_bundle_load_seconds",
            "Time of one admission, self-test included",
            buckets=_SECONDS,
            registry=registry,
        )
        self.generation = Gauge(
            "medley_registry_generation",
            "Generation of the registry, desired and observed",
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

    def count_image(self, task: str | None, route: str, outcome: str) -> None:
        """Count one image; `task` is None for zero-shot."""
        self.images.labels(self._task_label(task), route, outcome).inc()

    def forget_task(self, task: str) -> None:
        """Drop the series of a task that is gone, so that churn does not pile them up."""
        self._task_labels.discard(task)
        self.images.remove_by_labels({"task": task})

    def _task_label(self, task: str | None) -> str:
        if task is None:
            return ZERO_SHOT_LABEL
        if task not in self._task_labels and len(self._task_labels) >= MAX_TASK_LABELS:
            return "other"
        self._task_labels.add(task)
        return task


def package_version() -> str:
    """Version of the installed package, `unknown` when run from a bare checkout."""
    try:
        return version("medley-clip")
    except PackageNotFoundError:
        return "unknown"
