"""What a server counted between two looks at its /metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

from service.bench.load import LoadError
from service.bench.names import STAGES

__all__ = ["Sample", "Scrape", "between", "scrape"]

Sample = tuple[str, tuple[tuple[str, str], ...]]  # name, sorted labels


@dataclass(frozen=True)
class Scrape:
    """All samples by name and labels."""

    samples: Mapping[Sample, float]


def scrape(url: str) -> Scrape:
    """Look at a server's metrics.

    Raises:
        LoadError: it does not show them.
    """
    try:
        text = httpx.get(f"{url}/metrics", timeout=30).raise_for_status().text
    except httpx.HTTPError as error:
        raise LoadError(f"the server shows no metrics: {error}") from error
    return Scrape(
        {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
    )


def between(before: Scrape, after: Scrape) -> dict[str, float]:
    """Means of what was observed in between: `<stage>_s` of one image, and `batch_images`."""

    def mean(name: str, **labels: str) -> float | None:
        total, count = (
            _rise(before, after, f"{name}_{part}", tuple(labels.items()))
            for part in ("sum", "count")
        )
        return total / count if count else None

    stages = {f"{s}_s": mean("medley_stage_duration_seconds", stage=s) for s in STAGES}
    found = stages | {"batch_images": mean("medley_batch_images")}
    return {name: value for name, value in found.items() if value is not None}


def _rise(before: Scrape, after: Scrape, name: str, labels: tuple[tuple[str, str], ...]) -> float:
    key = (name, labels)
    return after.samples.get(key, 0.0) - before.samples.get(key, 0.0)
