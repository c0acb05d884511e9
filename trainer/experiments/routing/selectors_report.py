"""The page that compares selectors: Markdown, the numbers as JSON, and a picture.

What follows from the numbers is in `docs/adr/0012-selectors.md`.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.figure import Figure

from trainer.experiments.routing.features import CANARY
from trainer.experiments.routing.markdown import accepted, by_task, cells, percent, rounded, table
from trainer.experiments.routing.selectors import DEFAULT, Comparison, Named

__all__ = ["write_selectors_report"]

NAME = "2026-11_routing-selectors"


def write_selectors_report(comparison: Comparison, fingerprint: str, folder: Path) -> list[Path]:
    """Write the three files and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    page, numbers, picture = (folder / f"{NAME}.{end}" for end in ("md", "json", "png"))
    page.write_text(_page(comparison, fingerprint), encoding="utf-8")
    numbers.write_text(json.dumps(rounded(asdict(comparison))) + "\n", encoding="utf-8")
    _picture(comparison.selectors).savefig(picture)
    return [page, numbers, picture]


def _page(comparison: Comparison, fingerprint: str) -> str:
    images = ", ".join(f"{t} {a}/{b}/{c}" for t, (a, b, c) in comparison.images.items())
    (best,) = (row for row in comparison.selectors if row.name == DEFAULT)
    parts = [
        "# Which selector routes best, image by image?",
        "Command: `python -m trainer.experiments.routing --only selectors` (one thread, "
        f"{platform.machine()} CPU, torch {torch.__version__}).\n"
        f"Backbone: {fingerprint}, the small suite's nine tasks, {len(best.outcomes)} seeds.\n"
        f"Images fitted/calibrated/tested, disjoint: {images}.",
        "Percentages **per image** unless batches are named, means over tasks and seeds; in "
        "brackets how far the seeds' means lie apart. Columns as in "
        "[routing-features](2026-11_routing-features.md).",
        f"![selectors]({NAME}.png)",
        "## Selectors, on test images",
        "*ddas*: an autoencoder on block1:mean, conformal threshold at 2 %. *ddas+reference*: and "
        "its error at most that of an autoencoder of the base's own corpus. *prototype*: cosine "
        "with the nearest class mean of the embedding, 2 %. *class-gaussians*: classes that share "
        "a covariance, on the embedding, 2 %. *gaussian*: one Gaussian on stem:mean and one on "
        "block1:mean, 2 %. *gaussian+reference*: the same, their covariances mixed with the "
        "corpus's as if that were 30 images; accepted where at least as likely as under the "
        "corpus's own Gaussians, no threshold. *paper-1*: plain errors on one scale, code 100, "
        "300 steps at 0.01, one threshold that refuses 2 % of all tasks' held-out images "
        "together: no bundle that is made alone can have it. *reference*: and closer than the "
        "corpus's autoencoder.",
        table(comparison.selectors, "selector", lambda row: row.name),
        "Seconds to fit clipart, one thread: "
        + ", ".join(f"{name} {value:.2f}" for name, value in comparison.seconds.items())
        + ".",
        "### In batches of 128 of one data set, as the paper decides",
        _batches(comparison),
        f"## {DEFAULT} by task",
        by_task(best),
        f"Mean: {cells(best)}.",
        "Accepted by (columns) of the images of (rows):",
        accepted(best),
        "## With the request's label list",
        f"*wrong*: own images, with the own list, that do not reach their task. *absent*: images "
        f"accepted while their own task is not there. *strange*: {CANARY} sent with the list of a "
        "task that is there. No two of the nine tasks share a class name, so no image of an "
        "absent task finds one that may have it.",
        _labels(comparison),
        "## Few images",
        "The first so many of the images to fit; thresholds from as many held-out images as above.",
        table(comparison.few, "selector, images", lambda row: row.name),
        "## What was chosen, and on what",
        "On training images that had no part in the fit or in a threshold; the tasks are the same "
        "nine, so leave-one-out numbers are a choice's own and the test table above confirms "
        "them on other images, not on other tasks.",
        table(comparison.choices, "Gaussians against a reference", lambda row: row.name),
    ]
    return "\n\n".join(parts) + "\n"


def _batches(comparison: Comparison) -> str:
    lines = ["| rule | accuracy | false reject | false accept |", "|---|---|---|---|"]
    for row in comparison.batches:
        shares = (row.accuracy, row.false_reject, row.false_accept)
        lines.append(f"| {row.name} | {' | '.join(map(percent, shares))} |")
    return "\n".join(lines)


def _labels(comparison: Comparison) -> str:
    lines = ["| policy | wrong | absent | strange |", "|---|---|---|---|"]
    for row in comparison.labels:
        shares = (row.wrong, row.absent, row.strange)
        lines.append(f"| {row.name} | {' | '.join(map(percent, shares))} |")
    return "\n".join(lines)


def _picture(rows: list[Named]) -> Figure:
    """False accepts against accuracy: up and left is better."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        x, y = 100 * row.mean("false_accept"), 100 * row.mean("accuracy")
        axes.plot(x, y, "o", color="tab:red" if row.name == DEFAULT else "tab:blue")
        axes.annotate(row.name, (x, y), textcoords="offset points", xytext=(6, 4))
    axes.set(
        xlabel="images of an absent task that some task accepts, %",
        ylabel="images that reach their task, %",
        xlim=(0, 115),
    )
    axes.grid(alpha=0.3)
    return figure
