"""`medley serve | classify | task`: what people type. Heavy imports wait until a command runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from service.bench.command import bench_commands

__all__ = ["commands"]

commands = typer.Typer(no_args_is_help=True)
task_commands = typer.Typer(no_args_is_help=True, help="List and change what a server serves.")
commands.add_typer(task_commands, name="task")
commands.add_typer(bench_commands, name="bench")
out, err = Console(), Console(stderr=True)
BATCH = 16  # images per request

Url = Annotated[str, typer.Option(envvar="MEDLEY_URL", help="Where the server is.")]
Key = Annotated[
    str | None, typer.Option(envvar="MEDLEY_ADMIN_KEY", help="Admin key, if the server has one.")
]
DEFAULT_URL = "http://127.0.0.1:8000"


@commands.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.")] = None,
    store: Annotated[Path | None, typer.Option(help="Folder of registry and bundles.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Name of the frozen CLIP.")] = None,
    weights: Annotated[Path | None, typer.Option(help="File of its weights.")] = None,
    device: Annotated[str | None, typer.Option(help="Torch device.")] = None,
) -> None:
    """Run a server; further settings come from MEDLEY_* variables (docs/settings.md)."""
    from medley.errors import MedleyError
    from service import logs
    from service.app import create_app
    from service.server import serve as run
    from service.settings import Settings

    given: dict[str, Any] = {
        "host": host,
        "port": port,
        "store": store,
        "backbone": backbone,
        "weights": weights,
        "device": device,
    }
    with _one_line_errors():
        settings = Settings(**{k: v for k, v in given.items() if v is not None})
        logs.configure(settings.log_format, level=settings.log_level)
        app = create_app(settings, in_background=True)
    try:
        run(app, settings, on_ready=lambda url: out.print(f"Medley answers at {url}"))
    except MedleyError as error:
        _fail(str(error), status=1)


@commands.command()
def classify(
    images: Annotated[list[Path], typer.Argument(help="Image files.", exists=True, dir_okay=False)],
    url: Url = DEFAULT_URL,
    model: Annotated[str, typer.Option(help="auto, base, a task, or task@version.")] = "auto",
    label: Annotated[list[str] | None, typer.Option(help="Choose among these labels.")] = None,
    template: Annotated[list[str] | None, typer.Option(help='Prompt with one "{}".')] = None,
    top_k: Annotated[int, typer.Option(min=1, help="How many labels to show.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line per image.")] = False,
) -> None:
    """Ask a server what is on images."""
    from service.client import Client
    from service.schemas import ClassifyOptions, Failure

    failures = 0
    table = _table("image", "label", "probability", "answered by")
    with _one_line_errors(), Client(url) as client:
        options = ClassifyOptions(model=model, labels=label, templates=template, top_k=top_k)
        for start in range(0, len(images), BATCH):
            some = images[start : start + BATCH]
            for path, result in zip(some, _classified(client, some, options), strict=True):
                failures += isinstance(result, Failure)
                if as_json:
                    out.print_json(result.model_dump_json(exclude_none=True), indent=None)
                else:
                    _add_rows(table, path, result)
    if not as_json:
        out.print(table)
    if failures:
        raise typer.Exit(1)


@task_commands.command("list")
def list_tasks(url: Url = DEFAULT_URL) -> None:
    """Show all tasks and their versions."""
    from service.client import Client

    with _one_line_errors(), Client(url) as client:
        answer = client.tasks()
    table = _table("task", "version", "state", "digest", "since")
    for task in answer.tasks:
        for v in task.versions:
            state = v.state if v.reason is None else f"{v.state}: {v.reason}"
            table.add_row(task.task, v.version, escape(state), v.digest[:19], v.created_at)
    out.print(table)
    out.print(f"generation {answer.generation}")


@task_commands.command()
def register(
    bundle: Annotated[Path, typer.Argument(help="Bundle file.", exists=True, dir_okay=False)],
    url: Url = DEFAULT_URL,
    key: Key = None,
    activate: Annotated[bool, typer.Option(help="Make it live at once.")] = True,
) -> None:
    """Upload a bundle; the server proves it before it answers from it."""
    from medley.bundle import read_bundle

    with _one_line_errors():
        manifest = read_bundle(bundle).manifest
        with _client(url, key) as client:
            answer = client.register(manifest.task, manifest.version, bundle, activate=activate)
    out.print(f"{answer.task}@{manifest.version} is registered; live: {answer.live or 'none'}")


@task_commands.command()
def activate(task: str, version: str, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Make a registered version live."""
    with _one_line_errors(), _client(url, key) as client:
        answer = client.set_alias(task, "live", version)
    out.print(f"{answer.task}: live is {answer.live}")


@task_commands.command()
def rollback(task: str, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Make the version live that was live before."""
    with _one_line_errors(), _client(url, key) as client:
        answer = client.rollback(task)
    out.print(f"{answer.task}: live is {answer.live}")


@task_commands.command()
def delete(
    task: str,
    version: Annotated[str | None, typer.Option(help="Only this version.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Remove a task, or one version of it that is not live."""
    with _one_line_errors(), _client(url, key) as client:
        client.delete(task, version)
    out.print(f"{task} is gone" if version is None else f"{task}@{version} is gone")


def _client(url: str, key: str | None) -> Any:
    from pydantic import SecretStr

    from service.client import Client

    return Client(url, key=SecretStr(key) if key else None)


def _classified(client: Any, paths: list[Path], options: Any) -> list[Any]:
    """One result per image; the only image's error is a result like any other."""
    from service.client import RefusedError
    from service.schemas import Failure, Problem

    try:
        return list(client.classify([path.read_bytes() for path in paths], options).results)
    except RefusedError as error:
        if len(paths) > 1 or error.status not in (413, 415, 422):
            raise
        problem = Problem(
            type="about:blank", title="", status=error.status, code=error.code, detail=str(error)
        )
        return [Failure(error=problem)]


def _add_rows(table: Table, path: Path, result: Any) -> None:
    from service.schemas import Failure

    if isinstance(result, Failure):
        table.add_row(escape(str(path)), f"[red]{escape(result.error.detail)}[/red]", "", "")
        return
    by = result.path
    who = f"{by.task}@{by.version}" if by.kind == "task" else f"zero-shot ({result.label_set})"
    for rank, choice in enumerate(result.top_k):
        name, answered = (escape(str(path)), who) if rank == 0 else ("", "")
        table.add_row(name, escape(choice.label), f"{choice.probability:.1%}", answered)


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Whatever a person can do something about is one line and status 2, as in `medley/cli.py`."""
    from pydantic import ValidationError

    from medley.errors import MedleyError
    from service.client import RefusedError, UnreachableError

    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        _fail(f"{where or 'settings'}: {first['msg'].removeprefix('Value error, ')}")
    except (MedleyError, RefusedError, UnreachableError) as error:
        _fail("; ".join(getattr(error, "problems", None) or [str(error)]))


def _fail(message: str, *, status: int = 2) -> None:
    err.print(f"medley: {message}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(status)
