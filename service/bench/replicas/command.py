"""`medley bench replicas`. Heavy imports wait until it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service.bench.console import check_installed, end_in_order, journalled, out

__all__ = ["replicas"]


def replicas(
    folder: Annotated[Path, typer.Option("--out", help="Folder of lines, report and picture.")],
    backbone: Annotated[str, typer.Option(help="What is served.")] = "medley-mini",
    changes: Annotated[int, typer.Option(min=1, help="Of each kind, in each situation.")] = 100,
    quick: Annotated[bool, typer.Option(help="A minute, to see that it works.")] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Measure nothing: the report again.")
    ] = False,
) -> None:
    """How soon several servers that share a registry answer with what one of them was told."""
    check_installed()
    from service.bench.replicas.report import REPORT, write_report

    if not report_only:
        end_in_order()
        _measure(folder, backbone=backbone, changes=changes, quick=quick)
    write_report(folder)
    out.print(f"{folder / REPORT}", soft_wrap=True, highlight=False)


def _measure(folder: Path, *, backbone: str, changes: int, quick: bool) -> None:
    from dataclasses import replace

    from service.bench.replicas.cells import FULL, QUICK
    from service.bench.replicas.run import measure
    from service.bench.served import Served

    plan = QUICK if quick else replace(FULL, changes=changes)
    served = Served(backbone=backbone, threads=1)
    journalled(
        "replicas",
        folder,
        lambda journal, on_step: measure(journal, plan, served, on_step=on_step),
        steps=plan.steps,
        needs="redis",
    )
