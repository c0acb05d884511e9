"""A benchmark of three tiny tasks: two colours each, learnt in seconds."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from medley.backbone import Backbone
from tests.trainer.test_training import SETTINGS
from tests.trainer.tiny import pictures
from trainer.bench.course import Plan
from trainer.bench.record import Record
from trainer.bench.sequence import METHODS, run
from trainer.datasets import ImageSet, Split
from trainer.progress import bars
from trainer.suites import Suite

COLOURS = {"warm": ("red", "yellow"), "cold": ("green", "blue"), "grey": ("white", "black")}


def load(task: str, split: Split) -> ImageSet:
    """Thirty training and ten test images of each class."""
    per_class, seed = (30, 1) if split == "train" else (10, 2)
    return replace(pictures(COLOURS[task], per_class, seed=seed), name=task)


SUITE = Suite(name="tiny", tasks=tuple(COLOURS), orders={"I": tuple(COLOURS)}, loader=load)
PLAN = Plan(
    suite=SUITE,
    order=SUITE.tasks,
    settings=replace(SETTINGS, iterations=12, ddas_iterations=60, hold_out=0.4),
)


KILLED_METHODS = ("finetune", "moe_adapter", "condu-lora")  # of the runs that a test kills


def bench(
    backbone: Backbone,
    folder: Path,
    *,
    plan: Plan = PLAN,
    seeds: Sequence[int] = (0,),
    methods: Sequence[str] = METHODS,
) -> list[Record]:
    """Run the tiny benchmark."""
    with bars(Console(quiet=True)) as show:
        return run(
            plan,
            backbone,
            folder / "run",
            seeds=seeds,
            methods=methods,
            cache=folder / "cache",
            command="medley bench",
            bars=show,
        )
