"""What the benches' commands share: two consoles, and how they end."""

from __future__ import annotations

import signal
import sys
from importlib.util import find_spec
from typing import NoReturn

import typer
from rich.console import Console

__all__ = ["check_installed", "end_in_order", "err", "fail", "out"]

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


def fail(message: str) -> NoReturn:
    """End with one line and status 2."""
    err.print(f"medley: {message}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(2)
