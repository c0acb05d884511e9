"""`medley bench methods`. Heavy imports wait until it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service.bench.console import check_installed, end_in_order, journalled, out

__all__ = ["methods"]


def methods(
    folder: Annotated[Path, typer.Option("--out", help="Folder of lines and report.")],
    backbone: Annotated[str, typer.Option(help="What is served.")] = "medley-mini",
    neighbours: Annotated[
        int, typer.Option(min=1, max=16, help="Tasks that answer beside zero-shot.")
    ] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Of each kind of traffic.")] = 5,
    quick: Annotated[bool, typer.Option(help="A minute, to see that it works.")] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Measure nothing: the report again.")
    ] = False,
) -> None:
    """Tasks of every method on a server: size, loading, and what aggregated answers cost."""
    check_installed()
    from service.bench.methods.report import REPORT, write_report

    if not report_only:
        end_in_order()
        _measure(folder, backbone=backbone, neighbours=neighbours, rounds=rounds, quick=quick)
    write_report(folder)
    out.print(f"{folder / REPORT}", soft_wrap=True, highlight=False)


def _measure(folder: Path, *, backbone: str, neighbours: int, rounds: int, quick: bool) -> None:
    from dataclasses import replace

    from service.bench.methods.cells import FULL, QUICK
    from service.bench.methods.run import measure
    from service.bench.served import Served

    plan = QUICK if quick else replace(FULL, rounds=rounds, neighbours=neighbours)
    served = Served(backbone=backbone, threads=1)
    journalled(
        "methods",
        folder,
        lambda journal, on_step: measure(journal, plan, served, on_step=on_step),
        steps=plan.steps,
        needs="locust",
    )
