"""What the benches' commands share: two consoles, a bar while they measure, and how they end."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer
from rich.console import Console

if TYPE_CHECKING:
    from medley.journal import Journal

__all__ = ["check_installed", "end_in_order", "err", "fail", "journalled", "out"]

out, err = Console(), Console(stderr=True)
NEEDED = ("locust", "matplotlib", "psutil")


def check_installed() -> None:
    """End with one line where an extra is not installed."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        fail(f"{', '.join(missing)} not found; install medley-clip[bench]")


def end_in_order() -> None:
    """Let SIGTERM end the servers too that a bench has started, as Ctrl-C does."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def journalled(
    name: str,
    folder: Path,
    measure: Callable[[Journal, Callable[[int], object]], object],
    *,
    steps: int,
    needs: str,
) -> None:
    """Measure into the journal of a folder, with a bar.

    Args:
        name: of the bench.
        folder: of the journal.
        measure: gets the journal, and what to tell of steps that are done.
        steps: how many there are.
        needs: the package whose version matters, beside those of the server.
    """
    import torch
    from rich.progress import Progress

    from medley.journal import Journal
    from medley.machine import run_of
    from service.bench.load import LoadError

    run = run_of(torch.device("cpu"), packages=(needs, "uvicorn", "fastapi"))
    err.print(f"{run.machine}; {run.versions}", highlight=False)
    with Progress(console=err) as progress:
        bar = progress.add_task(name, total=steps)
        try:
            measure(Journal(folder, run), lambda count: progress.advance(bar, count))
        except LoadError as error:
            progress.stop()
            fail(str(error))


def fail(message: str) -> NoReturn:
    """End with one line and status 2."""
    err.print(f"medley: {message}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(2)
