"""What people type: `medley serve | classify | route | replicas | task | store | doctor`, `bench`.

Heavy imports wait until a command runs.
"""

from __future__ import annotations

import typer

from service.bench.command import bench_commands
from service.commands.ask import classify, route
from service.commands.doctor import doctor
from service.commands.replicas import replicas
from service.commands.serve import serve
from service.commands.store import store_commands
from service.commands.task import task_commands

__all__ = ["commands"]

commands = typer.Typer(no_args_is_help=True)
for command in (serve, classify, route, replicas, doctor):
    commands.command()(command)
commands.add_typer(task_commands, name="task")
commands.add_typer(store_commands, name="store")
commands.add_typer(bench_commands, name="bench")
