"""An ablation in its folder: every trial once, wherever it was interrupted, then table and picture.

What each trial came to is written down at once, so a run that was killed repeats no more than the
trial it was in, and that from its checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from medley.backbone import Backbone
from medley.errors import DataError
from medley.machine import machine
from trainer.bench.ablation_report import Cell, markdown, picture
from trainer.bench.ablations import Ablation, Arms
from trainer.bench.course import Course, Plan, open_course, tap_names
from trainer.bench.trials import learning_trial, routing_trial
from trainer.checkpoint import make_folder, write_whole
from trainer.progress import Bars
from trainer.suites import Suite

__all__ = ["run_ablation"]

ALL = "all"  # the task of a trial that needs every task at once

_CELLS = TypeAdapter(tuple[Cell, ...])


def run_ablation(
    ablation: Ablation,
    suite: Suite,
    backbone: Backbone,
    folder: Path,
    *,
    seeds: Sequence[int],
    cache: Path,
    command: str,
    bars: Bars,
) -> str:
    """Run what is not there yet and write ``cells.json``, ``report.md`` and ``bars.png``.

    Args:
        ablation: of the table.
        suite: where its tasks are.
        backbone: frozen.
        folder: the ablation gets a folder in it; learners lie beside, shared with other ablations.
        seeds: each arm has all of them.
        cache: where frozen features are kept.
        command: how a person would say it.
        bars: show how far it is.

    Returns:
        the report.

    Raises:
        DataError: the folder holds another ablation of that name, or cannot be written; a data set
        is missing.
    """
    arms = ablation.arms(backbone)
    ledger = _Ledger(folder / ablation.name / "cells.json", _about(ablation, arms, backbone))
    courses = _Courses(ablation, suite, backbone, folder, cache, bars)
    for label, seed, task in _trials(ablation, arms, seeds):
        if not ledger.has(label, seed, task):
            course = courses.of(arms[label], seed)
            metrics = (
                routing_trial(course, arms[label])
                if ablation.kind == "routing"
                else learning_trial(course, task, folder / "trained")
            )
            ledger.add(Cell(label, task, seed, metrics))
    cells = [cell for cell in ledger.cells if cell.seed in seeds and cell.arm in arms]
    text = markdown(ablation, cells, command=command, machine=machine(backbone.device))
    write_whole(folder / ablation.name / "bars.png", picture(ablation, cells))
    write_whole(folder / ablation.name / "report.md", text.encode())
    return text


def _trials(ablation: Ablation, arms: Arms, seeds: Sequence[int]) -> Iterator[tuple[str, int, str]]:
    """Arm, seed and task of every trial; seed by seed, so that a cut run compares all arms."""
    for seed in seeds:
        for label in arms:
            for task in (ALL,) if ablation.kind == "routing" else ablation.tasks:
                yield label, seed, task


def _about(ablation: Ablation, arms: Arms, backbone: Backbone) -> dict[str, Any]:
    """What decides the numbers, as JSON has it."""
    about = {
        "ablation": ablation.name,
        "tasks": ablation.tasks,
        "backbone": backbone.fingerprint,
        "settings": {} if ablation.kind == "routing" else _settings(ablation),
        "arms": {label: dict(arm) for label, arm in arms.items()},
    }
    parsed: dict[str, Any] = json.loads(json.dumps(about))
    return parsed


def _settings(ablation: Ablation) -> dict[str, Any]:
    return {k: v for k, v in ablation.settings({}, 0).as_dict().items() if k != "seed"}


class _Ledger:
    """The trials that are done, in one file."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self._path, self._about = path, about
        make_folder(path.parent)
        self.cells = self._read() if path.exists() else ()

    def has(self, arm: str, seed: int, task: str) -> bool:
        """Whether this trial is done."""
        return any((c.arm, c.seed, c.task) == (arm, seed, task) for c in self.cells)

    def add(self, cell: Cell) -> None:
        """Write down one more trial."""
        self.cells = (*self.cells, cell)
        content = {**self._about, "cells": [asdict(cell) for cell in self.cells]}
        write_whole(self._path, json.dumps(content, indent=1, allow_nan=False).encode())

    def _read(self) -> tuple[Cell, ...]:
        try:
            content = json.loads(self._path.read_bytes())
            cells = _CELLS.validate_python(content.pop("cells"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{self._path} is damaged; remove it to begin again") from error
        differing = [name for name, value in self._about.items() if content.get(name) != value]
        if differing:
            raise DataError(
                f"{self._path} is of another ablation: {', '.join(differing)} differ; "
                "choose another folder with --out"
            )
        return cells


@dataclass
class _Courses:
    """Opens the data sets once for each depth at which experts begin: all else is settings."""

    ablation: Ablation
    suite: Suite
    backbone: Backbone
    folder: Path
    cache: Path
    bars: Bars

    def __post_init__(self) -> None:
        self._opened: dict[int, Course] = {}

    def of(self, arm: Mapping[str, Any], seed: int) -> Course:
        """The course of a trial."""
        settings = self.ablation.settings(arm, seed)
        plan = Plan(suite=self.suite, order=self.ablation.tasks, settings=settings)
        first = settings.first_image_block(self.backbone)
        if first not in self._opened:
            self._opened[first] = open_course(
                plan,
                self.backbone,
                self.folder,
                cache=self.cache,
                bars=self.bars,
                taps=tap_names(self.backbone),
            )
        return replace(self._opened[first], plan=plan)
