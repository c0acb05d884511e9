"""`medley bench mtil | cil | ablation`, and those of speed. Heavy imports wait for a run."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from trainer.bench.ablation_command import ablation_command
from trainer.bench.cil_command import cil_command
from trainer.options import (
    DEFAULT_SEEDS,
    BackboneName,
    Cache,
    Device,
    Preset,
    Redundancy,
    RedundancyWeight,
    Seeds,
    Weights,
)
from trainer.progress import bars
from trainer.sources import DEFAULT_CACHE
from trainer.speed.commands import SPEED_COMMANDS

if TYPE_CHECKING:
    from trainer.bench.record import Record

__all__ = ["bench"]

bench = typer.Typer(no_args_is_help=True, help="Measure learning, and speed.")
bench.command("ablation")(ablation_command)
bench.command("cil")(cil_command)
for name, command in SPEED_COMMANDS.items():
    bench.command(name)(command)
out, err = Console(), Console(stderr=True)


class SuiteName(StrEnum):
    """Which data sets."""

    SMALL = "small"
    MTIL = "mtil"


class Protocol(StrEnum):
    """What the request tells: the task, the data set's classes, or nothing."""

    TOLD = "told"
    AGNOSTIC = "agnostic"
    UNION = "union"


class MethodName(StrEnum):
    """What is compared."""

    ZERO_SHOT = "zero-shot"
    LINEAR_PROBE = "linear-probe"
    FINETUNE = "finetune"
    LORA = "lora"
    MOE_ADAPTER = "moe_adapter"
    CONDU_LORA = "condu-lora"
    CONDU_FINETUNE = "condu-finetune"


@bench.command()
def mtil(
    folder: Annotated[
        Path, typer.Option("--out", help="Folder of the run; one that was interrupted goes on.")
    ],
    suite: Annotated[SuiteName, typer.Option(help="Which data sets.")] = SuiteName.SMALL,
    root: Annotated[
        Path | None, typer.Option(help="Where the folders of --suite mtil are.")
    ] = None,
    order: Annotated[
        str, typer.Option(help="I, II, smoke (small suite), or tasks with commas between.")
    ] = "I",
    protocol: Annotated[
        list[Protocol] | None, typer.Option(help="Only this one is shown; repeat for more.")
    ] = None,
    method: Annotated[
        list[MethodName] | None, typer.Option(help="Only this one; repeat for more.")
    ] = None,
    seed: Seeds = None,
    shots: Annotated[
        int | None, typer.Option(min=1, help="Learn from so many images a class; 5 or 16.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many test images of each data set.")
    ] = None,
    share: Annotated[
        bool, typer.Option(help="Later tasks may choose the frozen experts of earlier ones.")
    ] = False,
    preset: Annotated[Preset, typer.Option(help="Settings of learning.")] = Preset.SMALL,
    iterations: Annotated[int | None, typer.Option(help="Optimiser steps a task.")] = None,
    baseline_iterations: Annotated[
        int | None,
        typer.Option(min=1, help="The same for all but moe_adapter; default: as many."),
    ] = None,
    first_expert_block: Annotated[
        int | None, typer.Option(help="First image block that is trained.")
    ] = None,
    redundancy: Redundancy = None,
    redundancy_weight: RedundancyWeight = None,
    rivals: Annotated[
        bool, typer.Option(help="Fit other routers to the bundles of moe_adapter, to compare.")
    ] = True,
    backbone: BackboneName = "medley-mini",
    weights: Weights = None,
    device: Device = "cpu",
    cache: Cache = DEFAULT_CACHE,
) -> None:
    """Learn a sequence of tasks and measure all protocols, per image; JSON, report and pictures."""
    from medley.backbone import load_backbone
    from trainer.bench.course import Plan
    from trainer.bench.sequence import METHODS, run
    from trainer.settings import PRESETS, TrainSettings
    from trainer.suites import open_suite

    given: dict[str, Any] = {
        "shots": shots,
        "iterations": iterations,
        "first_expert_block": first_expert_block,
        "redundancy": redundancy and redundancy.value,
        "redundancy_weight": redundancy_weight,
    }
    settings = PRESETS[preset.value] | {k: v for k, v in given.items() if v is not None}
    opened = open_suite(suite.value, root=root, cache=cache)
    plan = Plan(
        suite=opened,
        order=opened.order(order),
        settings=TrainSettings(**settings),
        limit=limit,
        share=share,
        baseline_iterations=baseline_iterations,
        rivals=rivals,
    )
    with bars(err) as show:
        records = run(
            plan,
            load_backbone(backbone, weights=weights, device=device),
            folder,
            seeds=seed or DEFAULT_SEEDS,
            methods=[m.value for m in method] if method else METHODS,
            cache=cache,
            command=_command(),
            bars=show,
        )
    _show(records, {p.value for p in protocol or Protocol})
    out.print(f"{folder / 'report.md'}")


def _command() -> str:
    return " ".join(["medley", *sys.argv[1:]])


def _show(records: list[Record], protocols: set[str]) -> None:
    """Print what most people want to know first."""
    from trainer.bench.metrics import over_seeds, sequential

    table = Table()
    for heading in ("method", "router", "protocol", "Transfer", "Average", "Last", "Forgetting"):
        table.add_column(heading, overflow="fold")  # names are told apart by their ends
    for row in records[0].rows:
        if row.protocol not in protocols:
            continue
        same = [
            sequential(r.accuracy_TT)
            for record in records
            for r in record.rows
            if (r.method, r.router, r.protocol) == (row.method, row.router, row.protocol)
        ]
        cells = []
        for name in ("transfer", "average", "last", "forgetting"):
            values = [getattr(one, name) for one in same]
            known = [value for value in values if value is not None]
            cells.append(f"{100 * over_seeds(known).mean:.1f}" if known else "-")
        table.add_row(row.method, row.router, row.protocol, *cells)
    out.print(table)
