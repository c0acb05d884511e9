"""The `medley` command, made of the sub-commands of the other packages.

Sub-commands come from the entry-point group `medley.commands`, so that this package imports neither
the trainer nor the service. Each entry is a typer application; one without a name of its own adds
its commands at the top.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points

import typer
from rich.console import Console

from medley.errors import MedleyError

__all__ = ["build", "main"]

GROUP = "medley.commands"


def build() -> typer.Typer:
    """Put all sub-commands that are installed into one application."""
    app = typer.Typer(
        name="medley",
        help="Serve a frozen CLIP that keeps learning.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        part: typer.Typer = entry.load()
        app.add_typer(part)
    return app


def main() -> None:
    """Run the command line; an expected error ends it with one line and status 2."""
    # torch's threads spin while they wait for each other and starve whatever else runs: a server
    # beside a trainer stands nearly still (docs/adr/0011). It must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    console = Console(stderr=True)
    try:
        build()()
    except MedleyError as error:
        console.print(
            f"medley: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True
        )
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("medley: interrupted", style="bold red")
        sys.exit(130)
