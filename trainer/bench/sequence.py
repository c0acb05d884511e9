"""A benchmark run: a plan learnt and measured for some seeds, in a folder where it can go on.

What is finished lies in the folder and is not done again: a seed's record, a task's bundle, a
baseline's weights; a task half learnt goes on from its checkpoint. So a run that was killed ends in
the numbers that it would have had.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import JsonValue

from medley.backbone import Backbone
from medley.errors import DataError
from medley.machine import machine
from trainer.bench import adapters, baselines, condu
from trainer.bench.course import Course, Plan, open_course, tap_names
from trainer.bench.record import Cost, Record, Routing, Row, Scores, load, save
from trainer.bench.report import write_report
from trainer.bench.rivals import rivals
from trainer.checkpoint import make_folder, write_whole
from trainer.progress import Bars

__all__ = ["METHODS", "run"]

METHODS = ("zero-shot", "linear-probe", "finetune", "lora", "moe_adapter", *condu.METHODS)


def run(
    plan: Plan,
    backbone: Backbone,
    folder: Path,
    *,
    seeds: Sequence[int],
    methods: Sequence[str],
    cache: Path,
    command: str,
    bars: Bars,
) -> list[Record]:
    """Run a plan for all seeds and write records, report and pictures.

    Args:
        plan: what is learnt; its own seed does not matter.
        backbone: frozen.
        folder: of the run; an interrupted run of the same plan goes on.
        seeds: one record each.
        methods: of `METHODS`.
        cache: where frozen features are kept.
        command: how a person would say it, for the report.
        bars: show how far it is.

    Raises:
        DataError: a data set is missing, the folder holds another plan or cannot be written.
    """
    _claim(folder, plan, backbone, methods)
    records = []
    for seed in seeds:
        file = folder / f"seed{seed}" / "record.json"
        if not file.exists():
            seeded = replace(plan, settings=replace(plan.settings, seed=seed))
            course = open_course(
                seeded, backbone, file.parent, cache=cache, bars=bars, taps=tap_names(backbone)
            )
            make_folder(file.parent)
            save(_measured(course, methods, command), file)
        records.append(load(file))
    # Several processes may have made them, a seed each; this call is what makes them all.
    write_report(folder, [replace(record, command=command) for record in records])
    return records


def _measured(course: Course, methods: Sequence[str], command: str) -> Record:
    rows: list[Row] = []
    costs: list[Cost] = []
    routings: list[Routing] = []
    scores: list[Scores] = []
    mixed: dict[str, dict[str, int]] = {}
    if "zero-shot" in methods:
        rows += baselines.zero_shot(course)
    if "linear-probe" in methods:
        rows += baselines.linear_probes(course)
    for name, learn in (("finetune", baselines.finetune), ("lora", baselines.lora)):
        if name in methods:
            more_rows, more_costs = learn(course)
            rows, costs = [*rows, *more_rows], [*costs, *more_costs]
    if "moe_adapter" in methods:
        learnt = adapters.learn_bundles(course)
        others = rivals(course) if course.plan.rivals else {}
        found, routings, scores, sent = adapters.measure(course, learnt, others)
        mixed["moe_adapter"] = sent
        rows, costs = [*rows, *found], [*costs, *learnt.costs]
    for name in condu.METHODS:
        if name in methods:
            fused = condu.learn_fusions(course, name)
            found, mixed[name] = condu.measure(course, name, fused)
            rows, costs = [*rows, *found], [*costs, *fused.costs]
    plan = course.plan
    return Record(
        suite=plan.suite.name,
        order=plan.order,
        backbone=course.backbone.fingerprint,
        seed=course.settings.seed,
        shots=course.settings.shots,
        rows=tuple(rows),
        routings=tuple(routings),
        scores=tuple(scores),
        costs=tuple(costs),
        settings={
            **_about(plan),
            "mixed_batches": {name: {**sent} for name, sent in mixed.items()},
        },
        machine=machine(course.backbone.device),
        images={task: (len(course.train[task]), len(course.test[task])) for task in plan.order},
        command=command,
    )


def _about(plan: Plan) -> dict[str, JsonValue]:
    settings: dict[str, JsonValue] = {**plan.settings.as_dict()}
    del settings["seed"]
    return {
        **settings,
        "limit": plan.limit,
        "share": plan.share,
        "baseline_iterations": plan.baseline_iterations,
        "rivals": plan.rivals,
    }


def _claim(folder: Path, plan: Plan, backbone: Backbone, methods: Sequence[str]) -> None:
    """Write down what this folder is for, or see that it is for the same."""
    wanted = {
        "suite": plan.suite.name,
        "order": list(plan.order),
        "backbone": backbone.fingerprint,
        "methods": list(methods),
        "settings": _about(plan),
    }
    file = folder / "plan.json"
    make_folder(folder)
    if not file.exists():
        write_whole(file, json.dumps(wanted, indent=1).encode())
        return
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file} is damaged; choose another folder") from error
    differing = [name for name, value in wanted.items() if found.get(name) != value]
    if differing:
        raise DataError(
            f"{folder} holds another benchmark: {', '.join(differing)} differ; "
            "choose another folder with --out"
        )
