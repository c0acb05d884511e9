"""`medley task`: list and change what a server serves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from service.commands.console import (
    DEFAULT_URL,
    AdminKey,
    IfMatch,
    Json,
    ReadKey,
    Replicas,
    Url,
    err,
    fail,
    one_line_errors,
    open_client,
    out,
    table_of,
)
from service.commands.register import register
from service.commands.rollout import rollout_commands

if TYPE_CHECKING:
    from service.wire.task_schemas import ChangeAnswer, VersionAnswer

__all__ = ["task_commands"]

task_commands = typer.Typer(no_args_is_help=True, help="List and change what a server serves.")
task_commands.command()(register)
task_commands.add_typer(rollout_commands, name="rollout")


@task_commands.command("list")
def list_tasks(url: Url = DEFAULT_URL, key: ReadKey = None, as_json: Json = False) -> None:
    """Show all tasks and their versions."""
    with one_line_errors(), open_client(url, key) as client:
        answer = client.tasks()
    if as_json:
        for task in answer.tasks:
            out.print_json(task.model_dump_json(), indent=None)
        return
    table = table_of("task", "version", "state", "digest", "since")
    for task in answer.tasks:
        for v in task.versions:
            table.add_row(task.task, v.version, escape(_state(v)), v.digest[:19], v.created_at)
    out.print(table)
    out.print(f"generation {answer.generation}")


@task_commands.command()
def show(task: str, url: Url = DEFAULT_URL, key: ReadKey = None, as_json: Json = False) -> None:
    """Show one task: its classes, and where each of its versions is."""
    with one_line_errors(), open_client(url, key) as client:
        answer = client.task(task)
    if as_json:
        out.print_json(answer.model_dump_json(), indent=None)
        return
    out.print(f"{answer.task}: last changed by generation {answer.changed}")
    if answer.class_names:
        out.print(f"classes: {', '.join(answer.class_names)}", markup=False, highlight=False)
    table = table_of("version", "state", "aliases", "tier", "pinned", "bytes", "digest", "since")
    for v in answer.versions:
        table.add_row(
            v.version,
            escape(_state(v)),
            ", ".join(v.aliases),
            v.tier,
            "yes" if v.pinned else "no",
            "" if v.size_bytes is None else str(v.size_bytes),
            v.digest[:19],
            v.created_at,
        )
    out.print(table)
    for v in answer.versions:
        if v.unified is not None:
            said = f"{v.version}: {v.method}, loaded from the unified model {v.unified}"
            out.print(said, markup=False, highlight=False, soft_wrap=True)


@task_commands.command()
def usage(task: str, url: Url = DEFAULT_URL, key: ReadKey = None, as_json: Json = False) -> None:
    """Show what a task has used on this server since it started."""
    with one_line_errors(), open_client(url, key) as client:
        answer = client.usage(task)
    if as_json:
        out.print_json(answer.model_dump_json(), indent=None)
        return
    out.print(
        f"{answer.task}: {answer.images} images, {answer.forward_s:.1f} s of forwards "
        f"({answer.forward_share:.1%} of all) since {answer.since}; {answer.resident_bytes} bytes "
        f"on the device, {answer.bundle_bytes} in the store",
        soft_wrap=True,
    )


@task_commands.command()
def activate(
    task: str,
    version: str,
    url: Url = DEFAULT_URL,
    key: AdminKey = None,
    replicas: Replicas = None,
    if_match: IfMatch = None,
) -> None:
    """Make a registered version live."""
    with one_line_errors(), open_client(url, key) as client:
        _say_live(client.set_alias(task, "live", version, replicas=replicas, if_match=if_match))


@task_commands.command()
def alias(
    task: str,
    name: str,
    version: Annotated[str | None, typer.Argument()] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Forget the alias.")] = False,
    url: Url = DEFAULT_URL,
    key: AdminKey = None,
    if_match: IfMatch = None,
) -> None:
    """Let a name of your choice stand for a version, as in task@name; `live` makes it live."""
    if remove == (version is not None):
        fail("give a version that the alias is to name, or --remove")
    with one_line_errors(), open_client(url, key) as client:
        if version is None:
            answer = client.delete_alias(task, name, if_match=if_match)
        else:
            answer = client.set_alias(task, name, version, if_match=if_match)
    named = ", ".join(f"{alias} is {version}" for alias, version in answer.aliases.items())
    out.print(f"{answer.task}: {named or 'no aliases'}", highlight=False)


@task_commands.command()
def rollback(
    task: str,
    url: Url = DEFAULT_URL,
    key: AdminKey = None,
    replicas: Replicas = None,
    if_match: IfMatch = None,
) -> None:
    """Make the version live that was live before."""
    with one_line_errors(), open_client(url, key) as client:
        _say_live(client.rollback(task, replicas=replicas, if_match=if_match))


@task_commands.command()
def pin(
    task: str,
    version: str,
    url: Url = DEFAULT_URL,
    key: AdminKey = None,
    if_match: IfMatch = None,
) -> None:
    """Keep a version on the device, whatever else wants its place."""
    with one_line_errors(), open_client(url, key) as client:
        client.pin(task, version, if_match=if_match)
    out.print(f"{task}@{version} stays on the device")


@task_commands.command()
def unpin(
    task: str,
    version: str,
    url: Url = DEFAULT_URL,
    key: AdminKey = None,
    if_match: IfMatch = None,
) -> None:
    """Let a version leave the device again when its place is needed."""
    with one_line_errors(), open_client(url, key) as client:
        client.pin(task, version, pinned=False, if_match=if_match)
    out.print(f"{task}@{version} may leave the device")


@task_commands.command()
def delete(
    task: str,
    version: Annotated[str | None, typer.Option(help="Only this version.")] = None,
    url: Url = DEFAULT_URL,
    key: AdminKey = None,
    if_match: IfMatch = None,
) -> None:
    """Remove a task, or one version of it that no alias names."""
    with one_line_errors(), open_client(url, key) as client:
        client.delete(task, version, if_match=if_match)
    out.print(f"{task} is gone" if version is None else f"{task}@{version} is gone")


@task_commands.command()
def operations(url: Url = DEFAULT_URL, key: ReadKey = None, as_json: Json = False) -> None:
    """Show what became of registrations since the server started, latest first."""
    with one_line_errors(), open_client(url, key) as client:
        found = client.operations().operations
    if as_json:
        for one in found:
            out.print_json(one.model_dump_json(), indent=None)
        return
    table = table_of("id", "task", "version", "state", "begun", "ended")
    for one in found:
        state = one.state if one.error is None else f"{one.state}: {one.error.detail}"
        ended = one.finished_at or ""
        table.add_row(one.id, one.task, one.version, escape(state), one.created_at, ended)
    out.print(table)


def _say_live(answer: ChangeAnswer) -> None:
    out.print(f"{answer.task}: live is {answer.live}")
    spread = answer.replicas
    if spread is not None:
        out.print(f"{spread.reached} of {spread.alive} replicas have it, {spread.wanted} wanted")
        for one in spread.failed:
            err.print(f"{one.name or one.replica}: {one.reason}", markup=False, highlight=False)
        if spread.reached < spread.wanted:
            raise typer.Exit(1)


def _state(version: VersionAnswer) -> str:
    return version.state if version.reason is None else f"{version.state}: {version.reason}"
