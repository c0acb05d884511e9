"""`medley bench serve`, and the group of all benches. Heavy imports wait until it runs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from service.bench.console import check_installed, end_in_order, fail, journalled, out
from service.bench.methods.command import methods
from service.bench.replicas.command import replicas

__all__ = ["bench_commands"]

bench_commands = typer.Typer(no_args_is_help=True, help="Measure learning, and speed.")
bench_commands.command()(replicas)
bench_commands.command()(methods)


class PrecisionName(StrEnum):
    """How the image tower computes."""

    EXACT = "exact"
    FP32 = "fp32"
    BF16 = "bf16"


@bench_commands.callback()
def bench() -> None:
    """Measure learning, and speed."""


@bench_commands.command()
def serve(
    folder: Annotated[Path, typer.Option("--out", help="Folder of lines, report and pictures.")],
    backbone: Annotated[str, typer.Option(help="What is served.")] = "medley-mini",
    weights: Annotated[
        Path | None, typer.Option(help="File of its weights.", exists=True, dir_okay=False)
    ] = None,
    buckets: Annotated[str, typer.Option(help="Images of a forward, as MEDLEY_BUCKETS.")] = "1",
    precision: Annotated[PrecisionName, typer.Option(help="Of the tower.")] = PrecisionName.EXACT,
    threads: Annotated[int, typer.Option(min=0, help="Of torch, as MEDLEY_THREADS.")] = 0,
    infinity: Annotated[
        Path | None,
        typer.Option(
            help="Python of an environment with infinity_emb, to be compared with.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    quick: Annotated[bool, typer.Option(help="A minute, to see that it works.")] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Measure nothing: the report again.")
    ] = False,
) -> None:
    """A server under open-loop load from another process, beside a bare loop and infinity."""
    check_installed()
    from service.bench.report import write_report

    if not report_only:
        end_in_order()
        _measure(
            folder,
            backbone=backbone,
            weights=weights,
            buckets=buckets,
            precision=precision,
            threads=threads,
            infinity=infinity,
            quick=quick,
        )
    write_report(folder)
    out.print(f"{folder / 'report.md'}", soft_wrap=True, highlight=False)


def _measure(
    folder: Path,
    *,
    backbone: str,
    weights: Path | None,
    buckets: str,
    precision: PrecisionName,
    threads: int,
    infinity: Path | None,
    quick: bool,
) -> None:
    from service.bench.cells import FULL, QUICK
    from service.bench.run import measure
    from service.bench.served import Served

    served = Served(
        backbone=backbone,
        weights=weights,
        buckets=_sizes(buckets),
        precision=precision.value,
        threads=threads,
    )
    plan = QUICK if quick else FULL
    journalled(
        "serve",
        folder,
        lambda journal, on_step: measure(journal, plan, served, infinity=infinity, on_step=on_step),
        steps=plan.steps(infinity=infinity is not None),
        needs="locust",
    )


def _sizes(text: str) -> tuple[int, ...]:
    from medley.classifier import check_buckets

    try:
        sizes = tuple(int(size) for size in text.split(","))
        check_buckets(sizes)
    except ValueError as error:
        fail(f"--buckets {text}: {error}")
    return sizes
