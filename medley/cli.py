"""The `medley` command, made of the sub-commands of the other packages.

Sub-commands come from the entry-point group `medley.commands`, so that this package imports neither
the trainer nor the service. Each entry is a typer application whose commands stand at the top. A
group that several of them have, such as `bench`, is one group with the commands of all.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points

import typer
from rich.console import Console
from typer.core import TyperGroup
from typer.main import get_group

from medley.errors import MedleyError

__all__ = ["build", "main", "merge"]

GROUP = "medley.commands"


def build() -> TyperGroup:
    """Put all sub-commands that are installed into one command.

    Raises:
        ValueError: two packages have a command of the same name.
    """
    app = typer.Typer(
        name="medley",
        help="Serve a frozen CLIP that keeps learning.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    command = get_group(app)
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        part: typer.Typer = entry.load()
        merge(command, get_group(part))
    return command


def merge(into: TyperGroup, part: TyperGroup) -> None:
    """Add all commands of a group to another, and to the groups that both have.

    Raises:
        ValueError: both have a command of the same name, and it is not a group in both.
    """
    for name, command in part.commands.items():
        there = into.commands.get(name)
        if isinstance(there, TyperGroup) and isinstance(command, TyperGroup):
            merge(there, command)
        elif there is not None:
            raise ValueError(f"two packages have a command {name!r}")
        else:
            into.add_command(command, name)


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
