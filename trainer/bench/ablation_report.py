"""The report of an ablation: a row an arm, mean +- spread over the seeds, and the same as bars."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from medley.markdown import table
from trainer.bench.ablations import Ablation
from trainer.bench.metrics import OverSeeds, over_seeds
from trainer.bench.pictures import bars_png
from trainer.bench.tables import cell, cells
from trainer.redundancy import MEASURES

__all__ = ["Cell", "markdown", "picture"]

COSTS = {"stored parameters": ",.0f", "active parameters": ",.0f", "CPU seconds": ".1f"}
READING = {
    "learning": (
        "Accuracy in per cent on the test images, the task told: as trained, on each task; mean "
        "over the tasks, as trained and with the experts that a bundle keeps. Parameters and "
        "seconds of training are means over the tasks."
    ),
    "against": (
        "Against {against}: the difference to that arm with the same seed on the same task, mean "
        "over the tasks, and on how many tasks and seeds it is better : worse. The last columns: "
        "how redundant image experts are after training, by each measure (docs/redundancy.md). "
    ),
    "routing": (
        "All tasks learnt, every image on its own, in per cent but for AUROC. Accuracy: images "
        "that went to their own task. AUROC: images of known tasks against those of one that is "
        "absent. False reject: refused by their own task. False accept: taken by any while their "
        "own was absent. Means over the tasks."
    ),
}


@dataclass(frozen=True)
class Cell:
    """What one trial came to."""

    arm: str
    task: str
    seed: int
    metrics: dict[str, float]


def markdown(ablation: Ablation, trials: Sequence[Cell], *, command: str, machine: str) -> str:
    """The report of some trials, all arms with the same tasks."""
    seeds = sorted({trial.seed for trial in trials})
    settings = ablation.settings({}, 0).as_dict()
    about = {
        "command": f"`{command}`",
        "tasks": ", ".join(ablation.tasks),
        "seeds": ", ".join(map(str, seeds)),
        "settings": ", ".join(f"{k} {v}" for k, v in settings.items() if k != "seed"),
        "machine": machine,
    }
    if ablation.kind == "routing":
        del about["settings"]  # nothing is trained
    rows = _learning if ablation.kind == "learning" else _routing
    head, lines = rows(ablation, trials, len(seeds))
    return (
        f"# {ablation.name}: {ablation.question}\n\n{table(('', ''), about.items())}\n\n"
        f"{READING[ablation.kind]} {_comparison(ablation)}+- is the sample standard deviation over "
        f"the seeds, left out where they agree exactly.\n\n{table(head, lines)}\n\n"
        "![the same as bars](bars.png)\n"
    )


def picture(ablation: Ablation, trials: Sequence[Cell]) -> bytes:
    """Bars of every share, arm by arm."""
    arms = _by_arm(trials)
    if ablation.kind == "routing":
        names = ("accuracy", "AUROC", "false reject", "false accept")
        bars = {arm: {name: _mean(found, name) for name in names} for arm, found in arms.items()}
    else:
        bars = {
            arm: {
                "mean": _mean(found, "trained"),
                **{task: _mean(_of(found, task), "trained") for task in ablation.tasks},
            }
            for arm, found in arms.items()
        }
    return bars_png(bars, title=ablation.question)


Rows = tuple[tuple[str, ...], list[tuple[str, ...]]]


def _learning(ablation: Ablation, trials: Sequence[Cell], seeds: int) -> Rows:
    by_arm = _by_arm(trials)
    base = by_arm.get(ablation.against or "", [])
    numbers = COSTS | (dict.fromkeys(MEASURES, ".3f") if base else {})
    lines = [
        (
            arm,
            *cells((_mean(_of(found, task), "trained") for task in ablation.tasks), seeds),
            *cells((_mean(found, name) for name in ("trained", "kept")), seeds),
            *(_against(base, found, seeds) if base else ()),
            *(cell(_mean(found, n), seeds, scale=1, form=form) for n, form in numbers.items()),
        )
        for arm, found in by_arm.items()
    ]
    paired = (f"against {ablation.against}", "better : worse") if base else ()
    return ("arm", *ablation.tasks, "mean", "mean, kept", *paired, *numbers), lines


def _against(base: Sequence[Cell], found: Sequence[Cell], seeds: int) -> tuple[str, str]:
    """Compare an arm with another where both have the same seed and task."""
    there = {(c.task, c.seed): c.metrics["trained"] for c in base}
    gains = [
        replace(c, metrics={"gain": c.metrics["trained"] - there[c.task, c.seed]})
        for c in found
        if (c.task, c.seed) in there
    ]
    better, worse = (sum(sign * c.metrics["gain"] > 0 for c in gains) for sign in (1, -1))
    return cell(_mean(gains, "gain"), seeds, form="+.1f"), f"{better} : {worse}"


def _comparison(ablation: Ablation) -> str:
    if ablation.against is None:
        return ""
    return READING["against"].format(against=ablation.against)


def _routing(_: Ablation, trials: Sequence[Cell], seeds: int) -> Rows:
    lines = [
        (
            arm,
            cell(_mean(found, "accuracy"), seeds),
            cell(_mean(found, "AUROC"), seeds, scale=1, form=".3f"),
            *cells((_mean(found, name) for name in ("false reject", "false accept")), seeds),
        )
        for arm, found in _by_arm(trials).items()
    ]
    return ("arm", "accuracy", "AUROC", "false reject", "false accept"), lines


def _by_arm(trials: Iterable[Cell]) -> dict[str, list[Cell]]:
    arms: dict[str, list[Cell]] = {}
    for trial in trials:
        arms.setdefault(trial.arm, []).append(trial)
    return arms


def _of(trials: Iterable[Cell], task: str) -> list[Cell]:
    return [trial for trial in trials if trial.task == task]


def _mean(trials: Sequence[Cell], name: str) -> OverSeeds | None:
    """Over the tasks first, then over the seeds."""
    by_seed: dict[int, list[float]] = {}
    for trial in trials:
        if name in trial.metrics:
            by_seed.setdefault(trial.seed, []).append(trial.metrics[name])
    return over_seeds(map(statistics.fmean, by_seed.values())) if by_seed else None
