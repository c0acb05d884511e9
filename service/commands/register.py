"""`medley task register`: a bundle to a server, and what it is loaded from, with their progress."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TransferSpeedColumn,
)

from service.commands.console import (
    DEFAULT_URL,
    AdminKey,
    IfMatch,
    Replicas,
    Url,
    err,
    fail,
    one_line_errors,
    open_client,
    out,
)

if TYPE_CHECKING:
    from medley.manifest import Manifest
    from service.client import Client
    from service.exchanges import OnProgress
    from service.wire.task_schemas import OperationAnswer, TaskAnswer

__all__ = ["register"]

PROVING = "the server proves it"


def register(
    bundle: Annotated[str, typer.Argument(help="Bundle file, or with --task where it is.")],
    url: Url = DEFAULT_URL,
    key: AdminKey = None,
    activate: Annotated[bool, typer.Option(help="Make it live at once.")] = True,
    task: Annotated[
        str | None, typer.Option(help="Its task, of a bundle that the server gets by itself.")
    ] = None,
    version: Annotated[str | None, typer.Option(help="Its version, likewise.")] = None,
    replicas: Replicas = None,
    if_match: IfMatch = None,
) -> None:
    """Upload a bundle, or let the server get it; it is proven before anything is answered from it.

    A trigger bundle's unified model is uploaded first, from beside it, if the server has none.
    With --task and --version the bundle is a URL, or a path on the server, under one of its
    MEDLEY_BUNDLE_SOURCES.
    """
    options = {"activate": activate, "replicas": replicas, "if_match": if_match}
    if (task is None) != (version is None):
        fail("--task and --version go together")
    with one_line_errors(), open_client(url, key) as client, _progress() as progress:
        if task is not None and version is not None:
            answer, warnings = _fetched(client, (task, version), bundle, progress, options)
        else:
            answer, version, warnings = _uploaded(client, bundle, progress, options)
    out.print(f"{answer.task}@{version} is registered; live: {answer.live or 'none'}")
    for warning in warnings:
        err.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)


def _fetched(
    client: Client, key: tuple[str, str], source: str, progress: Progress, options: dict[str, Any]
) -> tuple[TaskAnswer, list[str]]:
    from service.client import StillRunningError

    progress.add_task("the server gets and proves it", total=None)
    try:
        answer = client.register_from(*key, source, **options)
    except StillRunningError as still:
        return _ended(client, still.operation)
    return answer, answer.warnings


def _uploaded(
    client: Client, bundle: str, progress: Progress, options: dict[str, Any]
) -> tuple[TaskAnswer, str, list[str]]:
    from medley.bundle import read_bundle
    from service.client import StillRunningError

    path = Path(bundle)
    if "://" in bundle and not path.exists():
        fail("for a bundle that the server gets by itself, give --task and --version too")
    manifest = read_bundle(path).manifest
    _upload_unified(client, manifest, path.parent, progress)
    heard = _sending(path, progress, "sending", then=PROVING)
    try:
        answer = client.register(
            manifest.task, manifest.version, path, on_progress=heard, **options
        )
    except StillRunningError as still:
        task, warnings = _ended(client, still.operation)
        return task, manifest.version, warnings
    return answer, manifest.version, answer.warnings


def _upload_unified(client: Client, manifest: Manifest, folder: Path, progress: Progress) -> None:
    """Let the server have the unified model that a bundle names, if it does not."""
    from medley.unified import unified_name

    if manifest.fusion is None:
        return
    digest = manifest.fusion.unified
    if any(one.digest == digest and one.here for one in client.unified().unified):
        return
    path = folder / unified_name(digest)
    if not path.is_file():
        fail(f"the server lacks the unified model of this bundle, and there is no {path}")
    heard = _sending(path, progress, "sending its unified model", then="the server reads it")
    client.upload_unified(digest, path, on_progress=heard)


def _sending(path: Path, progress: Progress, said: str, *, then: str) -> OnProgress:
    """A bar for a file on its way, and what is said once it is there."""
    size_bytes = path.stat().st_size
    bar = progress.add_task(said, total=size_bytes)

    def heard(sent_bytes: int) -> None:
        progress.advance(bar, sent_bytes)
        if progress.tasks[bar].completed >= size_bytes:
            progress.update(bar, description=then, total=None)

    return heard


def _ended(client: Client, operation: OperationAnswer) -> tuple[TaskAnswer, list[str]]:
    """Wait for a registration that outlasts its request."""
    ended = client.ended(operation.id)
    if ended.error is not None:
        fail("; ".join((ended.error.model_extra or {}).get("problems") or [ended.error.detail]))
    return client.task(ended.task), ended.warnings


def _progress() -> Progress:
    """For people at a terminal; elsewhere nothing is drawn."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
