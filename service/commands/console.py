"""What the commands share: options, a client, tables, and errors of one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from service.client import Client

__all__ = [
    "DEFAULT_URL",
    "AdminKey",
    "IfMatch",
    "Json",
    "ReadKey",
    "Replicas",
    "Url",
    "err",
    "fail",
    "one_line_errors",
    "open_client",
    "out",
    "table_of",
]

out, err = Console(), Console(stderr=True)

DEFAULT_URL = "http://127.0.0.1:8000"
Url = Annotated[str, typer.Option(envvar="MEDLEY_URL", help="Where the server is.")]
AdminKey = Annotated[
    str | None, typer.Option("--key", envvar="MEDLEY_ADMIN_KEY", help="Admin key, if it has one.")
]
ReadKey = Annotated[
    str | None,
    typer.Option(
        "--key", envvar=["MEDLEY_READ_KEY", "MEDLEY_ADMIN_KEY"], help="Read key, if it has one."
    ),
]
IfMatch = Annotated[
    int | None,
    typer.Option(
        help="Only if the task has not changed since: the generation that `task show` names."
    ),
]
Replicas = Annotated[
    str | None,
    typer.Option(help="Wait until so many replicas have it: all, majority, or a number."),
]
Json = Annotated[bool, typer.Option("--json", help="Print lines of JSON.")]


def open_client(url: str, key: str | None) -> Client:
    """A client, to be closed by `with`."""
    from pydantic import SecretStr

    from service.client import Client

    try:
        return Client(url, key=SecretStr(key) if key else None)
    except ValueError as error:
        fail(str(error))


def table_of(*columns: str) -> Table:
    """An empty table without lines."""
    table = Table(box=None, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Whatever a person can do something about is one line and status 2, as in `medley/cli.py`."""
    from pydantic import ValidationError

    from medley.errors import MedleyError
    from service.client import ClientError

    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        fail(f"{where or 'settings'}: {first['msg'].removeprefix('Value error, ')}")
    except (MedleyError, ClientError) as error:
        fail("; ".join(getattr(error, "problems", None) or [str(error)]))
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))


def fail(message: str, *, status: int = 2) -> NoReturn:
    """Say why in one line, and end."""
    line = " ".join(message.split())
    err.print(f"medley: {line}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(status)
