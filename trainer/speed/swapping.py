"""`medley bench swap`: tasks that come and go between the batches of others.

Three questions: how long the parts of a swap take, what swaps take away from throughput, and
whether anything leaks: other tasks' answers bit by bit, and memory.

Legend: B images, T tasks.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch
from torch import Tensor

from medley.backbone import Backbone
from medley.classifier import Ask
from medley.experts import TaskExperts
from medley.journal import Journal
from medley.pool import Capacity
from medley.precision import Precision
from medley.routed import PackedTask, RoutedModel
from medley.selector import TaskSelector
from trainer.bench.memory import reset_peak_memory
from trainer.speed.block import BOTTLENECK, TOP_K
from trainer.speed.tasks import random_selector, random_task
from trainer.speed.towers import open_classifier

__all__ = ["EVERY_S", "LEAK", "PARTS", "THROUGHPUT", "SwapPlan", "measure_swap"]

PARTS, THROUGHPUT, LEAK = "parts", "throughput", "leak"  # the rows, by "what"
EVERY_S = {"no swaps": math.inf, "a swap every second": 1.0, "a swap every 100 ms": 0.1}
VERSIONS = 8  # different bundles that take turns

Version = tuple[TaskExperts, TaskSelector]
PackedVersion = tuple[PackedTask, TaskSelector]


@dataclass(frozen=True, kw_only=True)
class SwapPlan:
    """What is swapped beside what, and how often."""

    device: torch.device
    backbone: Backbone
    batch: int
    repeats: int
    precision: Precision = "fp32"
    tasks: int = 10  # that stay
    swaps: int = 1000
    checks: int = 40  # how often the others' answers are compared meanwhile
    segment_s: float = 3.0  # of throughput with one rhythm

    @property
    def rows(self) -> int:
        """What is counted on the way: swaps and segments."""
        return self.swaps + self.repeats * len(EVERY_S)


def measure_swap(
    journal: Journal, plan: SwapPlan, *, on_row: Callable[[int], object] = lambda _: None
) -> None:
    """Write the lines of all three questions."""
    stage = _Stage(plan)
    conditions: dict[str, str | int] = {
        "backbone": plan.backbone.name,
        "precision": plan.precision,
        "batch": plan.batch,
        "tasks": plan.tasks,
    }
    _measure_leak(journal, plan, stage, conditions, on_row)
    _measure_throughput(journal, plan, stage, conditions, on_row)


class _Stage:
    """A classifier with tasks that stay and one that is swapped, and how long its parts took."""

    def __init__(self, plan: SwapPlan) -> None:
        capacity = Capacity(
            paths=plan.tasks + 1,
            slots=TOP_K * (plan.tasks + 1),
            experts=TOP_K,
            bottleneck=BOTTLENECK,
            max_top_k=TOP_K,
        )
        model = RoutedModel(plan.backbone, precision=plan.precision, capacity=capacity)
        self.classifier = open_classifier(model, plan.batch)
        self.parts_s: dict[str, list[float]] = {}
        self.waiting = plan.device.type == "cuda"  # for each part, so that it is timed whole
        stay = [
            self._enter(self._packed(_version(plan.backbone, 100 + i))) for i in range(plan.tasks)
        ]
        self._versions = cycle([_version(plan.backbone, i) for i in range(VERSIONS)])
        self.load(self.pack())
        shape = (plan.batch, 3, *plan.backbone.image_size)
        generator = torch.Generator().manual_seed(0)
        self._pixels_BCHW = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        self._asks = [Ask(stay[i % len(stay)]) for i in range(plan.batch)]
        self.answers()  # what is slow the first time is slow here
        self.parts_s.clear()

    def pack(self) -> PackedVersion:
        """Do the host's part of loading the next version; any thread may."""
        return self._packed(next(self._versions))

    def load(self, packed: PackedVersion) -> None:
        """Let a version come."""
        self._path = self._enter(packed)

    def unload(self) -> None:
        """Let the one that is there go."""
        with self._part("selector leaves"):
            self.classifier.selectors.remove(self._path)
        with self._part("experts leave"):
            self.classifier.model.unload(self._path)

    def answers(self) -> Tensor:
        """Features of a batch for the tasks that stay, (B, E)."""
        return self.classifier.route(self._pixels_BCHW, self._asks).features_BE.clone()

    def _packed(self, version: Version) -> PackedVersion:
        experts, selector = version
        with self._part("packing, off the thread that serves"):
            return self.classifier.model.pack(experts), selector

    def _enter(self, packed: PackedVersion) -> int:
        task, selector = packed
        with self._part("experts enter"):
            path = self.classifier.model.load(task)
        with self._part("selector enters"):
            self.classifier.selectors.add(path, selector)
        with self._part("graphs made ready"):
            self.classifier.prepare()
        return path

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        started_s = time.perf_counter()
        yield
        if self.waiting:
            torch.cuda.synchronize()
        self.parts_s.setdefault(name, []).append(time.perf_counter() - started_s)


def _version(backbone: Backbone, seed: int) -> Version:
    selector = random_selector(backbone.image.width, seed=seed)
    return random_task(backbone, seed=seed), selector


def _measure_leak(
    journal: Journal,
    plan: SwapPlan,
    stage: _Stage,
    conditions: dict[str, str | int],
    on_row: Callable[[int], object],
) -> None:
    """Swap many times; compare the others' answers while a slot is empty and after it is filled."""
    before_BE = stage.answers()
    compared = different = 0
    memory_bytes, at_swap = [], []
    every = max(1, plan.swaps // plan.checks)
    for swap in range(plan.swaps):
        stage.unload()
        checked = swap % every == 0
        seen = [stage.answers()] if checked else []
        stage.load(stage.pack())
        if checked:
            seen.append(stage.answers())
            compared += sum(len(answers_BE) for answers_BE in seen)
            different += sum(int((a != before_BE).any(1).sum()) for a in seen)
            memory_bytes.append(float(reset_peak_memory(plan.device)))
            at_swap.append(float(swap))
        on_row(1)
    half = len(at_swap) // 2  # by then what is kept for reuse is there
    slope = float(np.polyfit(at_swap[half:], memory_bytes[half:], 1)[0]) if half > 1 else 0.0
    journal.add(
        "swap",
        conditions | {"what": LEAK},
        "other tasks",
        values={
            "swaps": float(plan.swaps),
            "answers_compared": float(compared),
            "answers_different": float(different),
            "memory_bytes_per_swap": slope,
        },
        series={"swap": tuple(at_swap), "memory_bytes": tuple(memory_bytes)},
    )
    for name, times_s in stage.parts_s.items():
        journal.add("swap", conditions | {"what": PARTS}, name, times_s=times_s)


def _measure_throughput(
    journal: Journal,
    plan: SwapPlan,
    stage: _Stage,
    conditions: dict[str, str | int],
    on_row: Callable[[int], object],
) -> None:
    """Serve batches for a while in each rhythm, in turns; a time is that of one image."""
    stage.waiting = False
    segments: dict[str, list[_Segment]] = {name: [] for name in EVERY_S}
    order, chance = list(EVERY_S), random.Random(0)
    for _ in range(plan.repeats):
        chance.shuffle(order)
        for name in order:
            segments[name].append(_serve(stage, EVERY_S[name], plan.segment_s))
            on_row(1)
    for name, served in segments.items():
        journal.add(
            "swap",
            conditions | {"what": THROUGHPUT},
            name,
            times_s=[s.batch_ends_s[-1] / (plan.batch * len(s.batch_ends_s)) for s in served],
            values={"swaps": float(sum(len(s.swaps_s) for s in served))},
            series={"batch_end_s": served[-1].batch_ends_s, "swap_s": served[-1].swaps_s},
        )


@dataclass(frozen=True)
class _Segment:
    batch_ends_s: tuple[float, ...]
    swaps_s: tuple[float, ...]


def _serve(stage: _Stage, every_s: float, for_s: float) -> _Segment:
    """Run batches for a while; what is due is packed beside them and swapped between two."""
    started_s, due_s = time.perf_counter(), every_s / 2
    ends, swaps = [0.0], []
    packing: Future[PackedVersion] | None = None
    with ThreadPoolExecutor(1) as aside:
        while ends[-1] < for_s:
            if packing is None and ends[-1] >= due_s:
                packing, due_s = aside.submit(stage.pack), due_s + every_s
            if packing is not None and packing.done():
                swaps.append(ends[-1])
                stage.unload()
                stage.load(packing.result())
                packing = None
            stage.answers()
            ends.append(time.perf_counter() - started_s)
    return _Segment(tuple(ends[1:]), tuple(swaps))
