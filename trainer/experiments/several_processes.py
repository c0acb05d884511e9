"""What learning in several processes costs and changes, beside one process and beside threads.

    python -m trainer.experiments.several_processes demo/fashion

The same task with the same seed is learnt by `medley train` alone, by one process of two threads
and under torchrun by two processes of one thread each, one after the other. Compared are seconds on
the clock and of the processors, the curves of losses, and what the bundle measured of itself.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

SETUPS = ((1, 1), (1, 2), (2, 1))  # processes, threads of each
STEPS = (20, 100)  # up to which losses are compared, besides all


@dataclass(frozen=True)
class Result:
    """One run."""

    processes: int
    threads: int
    wall_s: float
    cpu_s: float
    report: dict[str, Any]

    def row(self, first: Result) -> list[str]:
        """What the table says of it, beside the first."""
        metrics, selector = self.report["metrics"], self.report["selector"]
        return [
            f"{self.processes} x {self.threads}",
            *(f"{self.report[name]:.0f}" for name in ("training_s", "export_s")),
            *(f"{seconds:.0f}" for seconds in (self.wall_s, self.cpu_s)),
            *(f"{_apart(self, first, steps):.1e}" for steps in (*STEPS, None)),
            f"{np.mean(self.report['history']['losses'][-20:]):.4f}",
            f"{metrics['held_out_accuracy']:.3f}",
            f"{selector['calibration']['false_reject_rate']:.3f}",
        ]


def main(
    data: Annotated[str, typer.Argument(help="As for `medley train`.")],
    iterations: Annotated[int, typer.Option(help="Optimiser steps.")] = 300,
) -> None:
    """Learn with each setup and print what came of it."""
    table = Table(
        *("processes x threads", "training s", "export s", "all s", "CPU s"),
        *(f"loss apart, {steps} steps" for steps in (*STEPS, "all")),
        *("last 20 losses", "held-out accuracy", "refused"),
    )
    results: list[Result] = []
    for processes, threads in SETUPS:
        results.append(_learnt(data, iterations, processes, threads))
        table.add_row(*results[-1].row(results[0]))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    Console(width=160).print(
        table, f"{os.cpu_count()} processors; load of the last 1, 5 and 15 minutes: {load}"
    )


def _learnt(data: str, iterations: int, processes: int, threads: int) -> Result:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "medley", "train", data, "--task", "measured", "--out", folder]
        words += ["--iterations", str(iterations)]
        began_s, used_s = time.monotonic(), _cpu_s()
        subprocess.run(
            [sys.executable, *(torchrun if processes > 1 else []), *words],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            check=True,
        )
        wall_s, cpu_s = time.monotonic() - began_s, _cpu_s() - used_s
        report = json.loads((Path(folder) / "measured-1" / "report.json").read_text())
    return Result(processes, threads, wall_s, cpu_s, report)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _apart(one: Result, other: Result, steps: int | None) -> float:
    """The largest difference of two losses of the same step."""
    losses, others = (np.array(r.report["history"]["losses"][:steps]) for r in (one, other))
    return float(np.abs(losses - others).max())


if __name__ == "__main__":
    typer.run(main)
