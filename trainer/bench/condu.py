"""ConDU on a course: tasks fine-tuned apart and fused after each one, every rule on each fusion.

Each session's row of a matrix is answered by the fusion that session made, as in the paper: the new
task's delta fused with what is left of the earlier ones. Beside it stand the same tasks fused once
from their own deltas (`-once`), and each task by itself, never fused (`-alone`).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medley.bundle import read_bundle
from medley.unified import unified_of
from trainer.bench.adapters import MIXED_IMAGES, aggregation, class_names, learn_task
from trainer.bench.aggregates import NEIGHBOURS
from trainer.bench.answers import Answers
from trainer.bench.course import Course
from trainer.bench.record import Cost, Row
from trainer.bench.routers import LabelRouter, Told, score_router
from trainer.bench.stages import AlongPaths, Rule, Stage, matrices
from trainer.checkpoint import write_whole
from trainer.evaluation import served
from trainer.fuse import Member, fuse
from trainer.settings import Method

__all__ = ["METHODS", "Learnt", "learn_fusions", "measure"]

METHODS: Mapping[str, Method] = {"condu-lora": "lora", "condu-finetune": "finetune"}

Files = tuple[Path, ...]  # trigger bundles of the tasks so far, each beside its unified model
Rules = dict[tuple[str, str], Rule]  # by router and protocol


@dataclass(frozen=True)
class Learnt:
    """What a course left in its folder, and what each task cost.

    Attributes:
        sessions: for each task, those learnt so far as that session's fusion left them.
        once: the same, fused in one go from their own deltas.
        alone: of all tasks, each with a unified model of its own.
        costs: a task each.
    """

    sessions: tuple[Files, ...]
    once: tuple[Files, ...]
    alone: Files
    costs: tuple[Cost, ...]


def learn_fusions(course: Course, method: str) -> Learnt:
    """Learn each task from the untouched backbone and fuse; what is there already is read.

    Args:
        course: its tasks.
        method: of `METHODS`.
    """
    folder, settings = course.folder / method, course.settings_of(METHODS[method])
    alone: list[Path] = []
    sessions: list[Files] = []
    once: list[Files] = []
    costs: list[Cost] = []
    for task in course.order:
        cost = learn_task(course, method, settings, task)
        alone.append(folder / f"{task}-1.safetensors")
        before = sessions[-1] if sessions else ()
        session, seconds = _fused(course, [*before, alone[-1]], folder / f"session-{len(alone)}")
        sessions.append(session)
        once.append(_fused(course, alone, folder / f"once-{len(alone)}")[0])
        costs.append(replace(cost, fuse_cpu_seconds=seconds))
    return Learnt(tuple(sessions), tuple(once), tuple(alone), tuple(costs))


def measure(course: Course, method: str, learnt: Learnt) -> tuple[list[Row], dict[str, int]]:
    """Rows of all rules, and how the mixed batches came out with all tasks loaded.

    Args:
        course: its test images.
        method: name of the rows.
        learnt: all tasks of the course.
    """
    bundles = [read_bundle(path) for path in learnt.alone]
    own = {bundle.manifest.task: bundle.selector() for bundle in bundles}
    ddas = score_router(own, course.classifier(), course.test)
    told: Rules = {("told", "told"): AlongPaths(Told(course.order, course.test))}
    decided: Rules = {
        **told,
        ("ddas", "agnostic"): AlongPaths(ddas),
        ("ddas", "union"): AlongPaths(ddas, union=True),
        ("labels", "agnostic"): AlongPaths(LabelRouter(ddas, class_names(course), naming=True)),
    }
    rules = decided | aggregation(course, bundles, ddas)
    server = _Server(course, method)
    (unfused,) = server.stages([learnt.alone])
    order = course.order
    alone = [replace(unfused, loaded=order[: stage + 1]) for stage in range(len(order))]
    rows = [
        *_rows(method, server.stages(learnt.sessions), rules, order),
        *_rows(f"{method}-once", server.stages(learnt.once), decided, order),
        *_rows(f"{method}-alone", alone, told, order),
    ]
    (last,) = server.stages(learnt.sessions[-1:])
    seed = course.settings.seed
    return rows, last.answers.mixed_batches(MIXED_IMAGES, seed, nearest=NEIGHBOURS)


class _Server:
    """Serves the fusions of a course one after another; zero-shot is asked once."""

    def __init__(self, course: Course, name: str) -> None:
        self._course = course
        counted = course.bars.counting(f"{name}: images along the paths they take")
        self._zero_shot = Answers(course.classifier(), {}, course.test, on_images=counted)

    def stages(self, fusions: Sequence[Files]) -> Iterator[Stage]:
        """A stage of each, with all tasks of the fusion loaded."""
        course = self._course
        for files in fusions:
            members = _members(files)
            classifier, paths = served(
                [member.bundle for member in members],
                course.backbone,
                bucket=course.classifier().max_batch,
                unified=[member.unified for member in members],
            )
            answers = self._zero_shot.again(classifier, paths)
            yield Stage(course.order, tuple(paths), answers, paths)
            self._zero_shot = answers.again(course.classifier(), {})


def _rows(name: str, stages: Iterable[Stage], rules: Rules, order: Sequence[str]) -> list[Row]:
    return [
        Row(method=name, router=router, protocol=protocol, accuracy_TT=accuracy_TT)
        for (router, protocol), accuracy_TT in matrices(stages, rules, order).items()
    ]


def _fused(course: Course, files: Sequence[Path], folder: Path) -> tuple[Files, float]:
    """Fuse some tasks, unless an earlier run has; their new bundles, and processor seconds.

    One task by itself is fused already.
    """
    if len(files) == 1:
        return tuple(files), 0.0
    finished = folder.with_suffix(".json")  # written last
    if not finished.exists():
        shutil.rmtree(folder, ignore_errors=True)
        started_s = time.process_time()
        fused = fuse(_members(files), course.backbone, folder)
        seconds = round(time.process_time() - started_s, 2)
        noted = {"bundles": [path.name for path in fused.paths], "seconds": seconds}
        write_whole(finished, json.dumps(noted).encode())
    found = json.loads(finished.read_bytes())
    return tuple(folder / name for name in found["bundles"]), found["seconds"]


def _members(files: Sequence[Path]) -> list[Member]:
    bundles = [(read_bundle(path), path.parent) for path in files]
    return [Member(bundle, unified_of(bundle.manifest, at)) for bundle, at in bundles]
