"""What is measured: a backbone with the settings that matter to speed, and random tasks for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch

from medley.backbone import Backbone
from medley.classifier import Classifier
from medley.journal import Conditions
from medley.pool import Capacity
from medley.precision import Precision
from medley.routed import RoutedModel
from service.bench.bundles import EXPERTS, write_task
from service.bench.load import LoadError
from service.bench.servers import Server

__all__ = ["FIRST", "SECOND", "Served", "name_of", "register", "write_tasks"]

FIRST, SECOND = "1", "2"  # versions; only the first task has both
SPARE = 8  # paths for a version that comes and those that still leave


@dataclass(frozen=True, kw_only=True)
class Served:
    """Settings, the same for a server process and for a classifier in this one."""

    backbone: str = "medley-mini"
    weights: Path | None = None
    buckets: tuple[int, ...] = (1,)
    precision: Precision = "exact"
    threads: int = 0

    @property
    def conditions(self) -> Conditions:
        """Of a line."""
        return {
            "backbone": self.backbone,
            "precision": self.precision,
            "buckets": ",".join(map(str, self.buckets)),
            "threads": self.threads or "torch's choice",
        }

    def settings(self, tasks: int) -> dict[str, str | int | float]:
        """Of a server with room for so many tasks."""
        capacity = _capacity(tasks)
        found: dict[str, str | int | float] = {
            "backbone": self.backbone,
            "buckets": ",".join(map(str, self.buckets)),
            "precision": self.precision,
            "threads": self.threads,
            "paths": capacity.paths,
            "slots": capacity.slots,
        }
        return found if self.weights is None else found | {"weights": str(self.weights)}

    def classifier(self, backbone: Backbone, tasks: int) -> Classifier:
        """What such a server computes with."""
        if self.threads:
            torch.set_num_threads(self.threads)
        model = RoutedModel(backbone, precision=self.precision, capacity=_capacity(tasks))
        return Classifier(model, buckets=self.buckets)


def name_of(task: int) -> str:
    """A task's name by its number."""
    return f"task-{task}"


def write_tasks(classifier: Classifier, folder: Path, count: int) -> list[dict[str, Path]]:
    """Write the bundles of so many tasks into a new folder: by number, by version."""
    folder.mkdir(parents=True)
    tasks: list[dict[str, Path]] = []
    for number in range(count):
        versions = (FIRST, SECOND) if number == 0 else (FIRST,)
        files = {version: folder / f"{number}-{version}.safetensors" for version in versions}
        for seed, (version, path) in enumerate(files.items()):
            random = number + seed * count
            write_task(classifier, path, task=name_of(number), version=version, seed=random)
        tasks.append(files)
    return tasks


def register(server: Server, tasks: Mapping[int, Path]) -> None:
    """Make bundles live, by the number of their task.

    Raises:
        LoadError: the server refuses one.
    """
    with httpx.Client(base_url=server.url, timeout=120) as client:
        for number, path in tasks.items():
            url = f"/v1/tasks/{name_of(number)}/versions/{FIRST}"
            answer = client.put(url, content=path.read_bytes())
            if not answer.is_success:
                raise LoadError(f"{name_of(number)} was refused: {answer.text}")


def _capacity(tasks: int) -> Capacity:
    paths = tasks + SPARE
    return Capacity(paths=paths, slots=EXPERTS * paths)
