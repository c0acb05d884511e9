"""The experiment's page: Markdown, the numbers as JSON, and a picture.

It computes nothing but means over tasks and seeds; what follows from the numbers is in the ADR.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainer.ddas import DEFAULT_ALPHA, DEFAULT_CODE_SIZE, DEFAULT_FEATURES
from trainer.experiments.routing.bench import Row
from trainer.experiments.routing.features import CANARY
from trainer.experiments.routing.markdown import (
    HEADINGS,
    accepted,
    by_task,
    cells,
    percent,
    rounded,
    table,
)
from trainer.experiments.routing.tables import Experiment
from trainer.suite import TASKS

__all__ = ["write_report"]

NAME = "2026-11_routing-features"


def write_report(experiment: Experiment, folder: Path) -> list[Path]:
    """Write the three files and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    page, numbers, picture = (folder / f"{NAME}.{end}" for end in ("md", "json", "png"))
    page.write_text(_page(experiment), encoding="utf-8")
    numbers.write_text(json.dumps(rounded(asdict(experiment))) + "\n", encoding="utf-8")
    _picture(experiment).savefig(picture)
    return [page, numbers, picture]


def _page(experiment: Experiment) -> str:
    images = ", ".join(f"{t} {a}/{b}/{c}" for t, (a, b, c) in experiment.images.items())
    ms = ", ".join(f"{name} {value} ms" for name, value in experiment.about.milliseconds.items())
    default = f"{_features(DEFAULT_FEATURES)}, code {DEFAULT_CODE_SIZE}, alpha {DEFAULT_ALPHA}"
    parts = [
        "# Which frozen features should DDAS look at?",
        f"Command: `python -m trainer.experiments.routing` (one thread, {platform.machine()} CPU, "
        f"torch {torch.__version__}).\n"
        f"Backbone: {experiment.about.fingerprint}, the small suite's nine tasks, "
        f"{len(experiment.shipped.outcomes)} seeds "
        "(each draws other images to fit and to calibrate and initialises the autoencoders anew; "
        "test images are the same).\n"
        f"Images fitted/calibrated/tested, disjoint: {images}.",
        "All numbers are percentages **per image**, means over tasks and seeds; in brackets how "
        "far the seeds' means lie apart. *Accuracy*: test images that reach their own task, all "
        "nine being there. *False reject*: refused by their own task. *False accept*: accepted by "
        "some other task when their own is absent (leave one out); *without clipart*: clipart, "
        "whose pictures are of anything, is absent too. "
        f"*{CANARY} accepted*: emoji of a vendor that neither the base nor a task has seen, "
        "accepted by any of the nine. *AUROC*: the best score, tasks that are there against the "
        "absent one.",
        "Test images of flags, chess, letters and counting come from vendors, piece sets, font "
        "families and objects that training has not seen: for them the calibration images are "
        "not exchangeable with the test images, and the conformal promise does not apply.",
        f"![bars and histograms]({NAME}.png)",
        f"## Features (code {DEFAULT_CODE_SIZE}, alpha {DEFAULT_ALPHA})",
        table(experiment.features, "features", lambda row: _features(row.features)),
        f"Cost: {ms} an image in a batch of 32. Features up to `first_expert_block` are free; "
        "deeper ones need the rest of the tower without experts, after which an image that a task "
        "claims goes through that rest again.",
        "## Code size",
        table(
            experiment.code_sizes,
            "features, code size",
            lambda row: f"{_features(row.features)}, {row.code_size}",
        ),
        "## Rules",
        "*feature units*: sum of log errors, each times the task's own scale (shipped). *plain "
        "errors*: in units of the task's own deviation. *summed errors*: of the levels, not their "
        "logarithms. *standardised*: by the mean and deviation of a third of the calibration "
        "images. *worst level*: the largest of the standardised. *p-value*: the rank among the "
        "calibration images. *shared threshold*: plain errors, one threshold on all tasks' "
        "calibration images pooled (the paper's rule without its hand-set number).",
        table(
            experiment.rules, "features, rule", lambda row: f"{_features(row.features)}, {row.rule}"
        ),
        f"## Alpha ({_features(DEFAULT_FEATURES)})",
        table(experiment.alphas, "alpha", lambda row: str(row.alpha)),
        "False rejects by task:",
        _alphas(experiment.alphas),
        f"## The default by task ({default}; through the shipped code)",
        by_task(experiment.shipped),
        f"Mean: {cells(experiment.shipped)} ({', '.join(HEADINGS.values())}).",
        "Accepted by (columns) of the images of (rows):",
        accepted(experiment.shipped),
        "## With the request's label list",
        _label_list(experiment),
    ]
    return "\n\n".join(parts) + "\n"


def _alphas(rows: Sequence[Row]) -> str:
    lines = [f"| alpha | mean | {' | '.join(TASKS)} |", "|---" * (len(TASKS) + 2) + "|"]
    for row in rows:
        rates = [row.mean("false_reject"), *row.by_task("false_reject")]
        lines.append(f"| {row.alpha} | {' | '.join(map(percent, rates))} |")
    return "\n".join(lines)


def _label_list(experiment: Experiment) -> str:
    pairs = experiment.about.shared_class_names
    shared = "; ".join(f"{a} and {b}" for a, b in pairs) if pairs else "no two of the nine tasks"
    kept = percent(1 - experiment.shipped.mean("false_reject"))
    return (
        "A request that brings its labels may only go to a task whose classes contain them all. "
        f"Class names in common: {shared}. Where a task has none of another's labels it is not "
        "eligible for that other's requests, whatever its autoencoder says: false accepts are "
        "then 0 by arithmetic, not by measurement, and accuracy is 100 minus false rejects, "
        f"{kept} for the default. This needs labels that are spelt as the task spells them."
    )


def _picture(experiment: Experiment) -> Figure:
    figure = Figure(figsize=(11, 9), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[1.6, 1])
    bars = figure.add_subplot(grid[0, :])
    rows = experiment.features
    places = range(len(rows))
    for shift, column, colour in (
        (-0.3, "accuracy", "tab:blue"),
        (-0.1, "false_accept", "tab:red"),
        (0.1, "narrow_false_accept", "tab:pink"),
        (0.3, "canary", "tab:orange"),
    ):
        values = [100 * row.mean(column) for row in rows]
        bars.bar([x + shift for x in places], values, 0.19, color=colour, label=HEADINGS[column])
    bars.set_xticks(places, [" +\n".join(row.features) for row in rows])
    bars.tick_params("x", rotation=55, labelsize=8)
    for tick in bars.get_xticklabels():
        tick.set(horizontalalignment="right", rotation_mode="anchor")
    bars.set(ylabel="% of images", ylim=(0, 112), title=f"Features, alpha {DEFAULT_ALPHA}")
    bars.legend(loc="upper center", ncols=4, frameon=False)
    for place, (task, scores) in enumerate(experiment.histograms.items()):
        axes = figure.add_subplot(grid[1, place])
        _density(axes, scores.own, f"{task}, test", "tab:blue")
        _density(axes, scores.others, "other tasks", "tab:red")
        _density(axes, scores.canary, CANARY, "tab:orange")
        axes.axvline(scores.threshold, color="black", linestyle="--", label="threshold")
        axes.set(xlabel=f"score under {task}", title=_features(DEFAULT_FEATURES))
        axes.legend(fontsize=8)
    return figure


def _density(axes: Axes, values: Sequence[float], label: str, colour: str) -> None:
    axes.hist(
        values, bins=60, histtype="stepfilled", alpha=0.5, density=True, label=label, color=colour
    )


def _features(features: Sequence[str]) -> str:
    return " + ".join(features)
