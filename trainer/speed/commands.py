"""`medley bench kernels | model | ddas | swap | speed`. Heavy imports wait until one runs."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from trainer.options import PrecisionName
from trainer.progress import bars

if TYPE_CHECKING:
    import torch

    from trainer.speed.goals import Goal
    from trainer.speed.plans import Bench

__all__ = ["SPEED_COMMANDS"]

out, err = Console(), Console(stderr=True)


class DeviceName(StrEnum):
    """Where it runs."""

    CPU = "cpu"
    CUDA = "cuda"


Out = Annotated[Path, typer.Option("--out", help="Folder of lines, report and picture.")]
Device = Annotated[DeviceName, typer.Option(help="What is measured.")]
Repeats = Annotated[
    int | None,
    typer.Option(min=1, help="Rounds of each row, at least; 3 to 5 on a CPU, 20 on a GPU."),
]
Batch = Annotated[list[int] | None, typer.Option(min=1, help="Only this size; repeat for more.")]
Backbones = Annotated[
    list[str] | None, typer.Option("--backbone", help="Only this one; repeat for more.")
]
Compiled = Annotated[bool, typer.Option(help="Also torch.compile, which takes its time.")]
Precision = Annotated[PrecisionName | None, typer.Option(help="Of the tower.")]
ReportOnly = Annotated[
    bool, typer.Option("--report-only", help="Measure nothing: the report again from its lines.")
]


def kernels_command(
    folder: Out,
    device: Device = DeviceName.CPU,
    repeats: Repeats = None,
    batch: Batch = None,
    compiled: Compiled = False,
    report_only: ReportOnly = False,
) -> None:
    """The expert branch of one block beside the published dispatcher and other ways to do it."""
    from trainer.speed.plans import kernels_bench

    def make(on: torch.device) -> Bench:
        return kernels_bench(on, repeats=repeats, batches=_sizes(batch), compiled=compiled)

    _show(_one(folder, device, make, report_only=report_only), folder)


def model_command(
    folder: Out,
    device: Device = DeviceName.CPU,
    repeats: Repeats = None,
    batch: Batch = None,
    backbone: Backbones = None,
    precision: Annotated[
        list[PrecisionName] | None, typer.Option(help="Only this one; repeat for more.")
    ] = None,
    tasks: Annotated[int, typer.Option(min=1, help="That are active at once.")] = 256,
    first_expert_block: Annotated[
        int, typer.Option(min=0, help="First image block with experts; 0 as in the paper.")
    ] = 0,
    compiled: Compiled = False,
    report_only: ReportOnly = False,
) -> None:
    """Whole image towers with experts beside the frozen tower and open_clip."""
    from trainer.speed.plans import model_bench

    def make(on: torch.device) -> Bench:
        return model_bench(
            on,
            repeats=repeats,
            batches=_sizes(batch, powers=True),
            backbones=tuple(backbone or ()),
            precisions=tuple(name.value for name in precision or ()),
            tasks=tasks,
            first_expert_block=first_expert_block,
            compiled=compiled,
        )

    _show(_one(folder, device, make, report_only=report_only), folder)


def ddas_command(
    folder: Out,
    device: Device = DeviceName.CPU,
    repeats: Repeats = None,
    batch: Batch = None,
    backbone: Backbones = None,
    precision: Precision = None,
    report_only: ReportOnly = False,
) -> None:
    """What deciding among 1 to 1,000 tasks costs, as a share of a forward."""
    from trainer.speed.plans import ddas_bench

    def make(on: torch.device) -> Bench:
        return ddas_bench(
            on,
            repeats=repeats,
            batches=_sizes(batch),
            backbones=tuple(backbone or ()),
            precision=precision.value if precision else None,
        )

    _show(_one(folder, device, make, report_only=report_only), folder)


def swap_command(
    folder: Out,
    device: Device = DeviceName.CPU,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Segments of three seconds in each rhythm; 5.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images of a batch, a power of two.")] = 8,
    backbone: Annotated[str, typer.Option(help="Which tower.")] = "medley-mini",
    precision: Precision = None,
    swaps: Annotated[
        int, typer.Option(min=1, help="While the others' answers are compared.")
    ] = 1000,
    report_only: ReportOnly = False,
) -> None:
    """Tasks that come and go between the batches of others: time taken, and nothing leaked."""
    from trainer.speed.plans import swap_bench

    def make(on: torch.device) -> Bench:
        (size,) = _sizes([batch], powers=True)
        return swap_bench(
            on,
            repeats=repeats,
            batch=size,
            backbone=backbone,
            precision=precision.value if precision else None,
            swaps=swaps,
        )

    _show(_one(folder, device, make, report_only=report_only), folder)


def speed_command(
    folder: Out,
    device: Device = DeviceName.CPU,
    repeats: Repeats = None,
    compiled: Compiled = False,
    report_only: ReportOnly = False,
) -> None:
    """All four into one folder, with a summary; on a GPU the one thing to run.

    Every kernel is checked against float64 before anything is timed.
    """
    from trainer.speed.plans import ddas_bench, kernels_bench, model_bench, swap_bench

    makers: dict[str, Callable[[torch.device], Bench]] = {
        "kernels": lambda on: kernels_bench(on, repeats=repeats, compiled=compiled),
        "model": lambda on: model_bench(on, repeats=repeats, compiled=compiled),
        "ddas": lambda on: ddas_bench(on, repeats=repeats),
        "swap": lambda on: swap_bench(on),
    }
    _all(folder, device, makers, report_only=report_only)


SPEED_COMMANDS: dict[str, Callable[..., None]] = {
    "kernels": kernels_command,
    "model": model_command,
    "ddas": ddas_command,
    "swap": swap_command,
    "speed": speed_command,
}


def _all(
    folder: Path,
    device: DeviceName,
    makers: dict[str, Callable[[torch.device], Bench]],
    *,
    report_only: bool,
) -> None:
    """Each bench into a folder of its own; the summary grows with them."""
    from trainer.speed.report import SUMMARY, write_summary

    goals: dict[str, list[Goal]] = {}
    for name, make in makers.items():
        goals[name] = _one(folder / name, device, make, report_only=report_only)
        write_summary(folder, goals)
    _show([goal for some in goals.values() for goal in some], folder, SUMMARY)


def _one(
    folder: Path,
    device: DeviceName,
    make: Callable[[torch.device], Bench],
    *,
    report_only: bool,
) -> list[Goal]:
    """Measure one bench into a folder and write its report; return its goals."""
    from medley.backbone import find_device
    from medley.journal import Journal
    from medley.machine import run_of
    from trainer.speed.report import write_report

    if not report_only:
        on = find_device(device.value)
        bench, run = make(on), run_of(on)
        err.print(f"{run.machine}; {run.versions}", highlight=False)
        journal = Journal(folder, run)
        with bars(err) as show:
            bench.run(journal, show.counting(bench.name, bench.steps))
    return write_report(folder)


def _sizes(batch: list[int] | None, *, powers: bool = False) -> tuple[int, ...]:
    """The batch sizes that were asked for.

    Raises:
        DataError: with code `batch`: one is not a power of two where that is needed.
    """
    from medley.errors import DataError

    odd = [size for size in batch or () if powers and size & (size - 1)]
    if odd:
        raise DataError(f"the batch size {odd[0]} is not a power of two", code="batch")
    return tuple(batch or ())


def _show(goals: list[Goal], folder: Path, report: str = "report.md") -> None:
    from rich.markdown import Markdown

    from trainer.speed.goals import goals_table

    out.print(Markdown(goals_table(goals)))
    out.print(f"{folder / report}", soft_wrap=True, highlight=False)
