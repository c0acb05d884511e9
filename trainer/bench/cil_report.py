"""The report of class-incremental runs: a table, a picture, and the numbers behind them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from medley.machine import machine
from trainer.bench.cil_plan import CilResult, markdown
from trainer.bench.pictures import steps_png
from trainer.checkpoint import write_whole

__all__ = ["write_cil_report"]

ABOUT = """\
After each step a test image of any class seen so far is answered among all classes seen so far. Avg
is the mean over the steps, Last the last step; per cent, mean and sample standard deviation over
the seeds, each with an order of classes of its own unless the data set has a published one.
`moe_adapter` is the paper's arrangement for this protocol: two experts, one router for all steps,
nothing frozen, no selector; it forgets. `bundles` is ours: one bundle a step, DDAS choosing among
them for each image. `linear-probe` sees all earlier images again, which nobody else may: an upper
bound for frozen features.
"""


def write_cil_report(folder: Path, results: Sequence[CilResult], *, command: str) -> str:
    """Write cil.json, cil.md and cil.png of one data set.

    Returns:
        the page as Markdown.

    Raises:
        DataError: a file cannot be written.
    """
    curves: dict[str, list[tuple[float, ...]]] = {}
    for result in results:
        curves.setdefault(result.method, []).append(result.accuracy_S)
    first = results[0]
    seeds = sorted({result.seed for result in results})
    sizes = [len(step) for step in first.steps]
    page = "\n".join(
        [
            f"# Class-incremental learning: {first.data}\n",
            f"Command: `{command}`. Machine: {machine(torch.device('cpu'))}. Backbone:",
            f"{first.backbone}. Seeds: {', '.join(map(str, seeds))}. {sum(sizes)} classes in "
            f"{len(sizes)} steps of {', '.join(map(str, dict.fromkeys(sizes)))}.\n",
            ABOUT,
            markdown(results),
            "![accuracy over the steps](cil.png)\n",
        ]
    )
    content = [result.as_dict() for result in results]
    write_whole(folder / "cil.json", json.dumps(content, indent=1).encode())
    write_whole(folder / "cil.md", page.encode())
    means = {name: np.mean(rows, axis=0) for name, rows in curves.items()}
    write_whole(folder / "cil.png", steps_png(means, np.cumsum(sizes).tolist()))
    return page
