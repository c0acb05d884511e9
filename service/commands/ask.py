"""`medley classify` and `medley route`: ask a server about images."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.markup import escape
from rich.table import Table

from service.commands.console import (
    DEFAULT_URL,
    Json,
    ReadKey,
    Url,
    fail,
    one_line_errors,
    open_client,
    out,
    table_of,
)
from service.commands.pictures import batches, pictures

if TYPE_CHECKING:
    from service.client import RefusedError
    from service.wire import schemas
    from service.wire.route_schemas import Decision
    from service.wire.schemas import ClassifyOptions, Failure, Prediction

__all__ = ["classify", "route"]

Images = Annotated[list[Path], typer.Argument(help="Image files, or folders.", exists=True)]
Model = Annotated[str, typer.Option(help="auto, base, a task, task@version or task@alias.")]
Labels = Annotated[list[str] | None, typer.Option("--label", help="Choose among these labels.")]
Unclaimed = Annotated[
    str | None,
    typer.Option(
        help="Who answers what no task claims: zero_shot, aggregate; as the server is set."
    ),
]
Neighbours = Annotated[
    int | None, typer.Option(min=1, help="How many tasks answer beside zero-shot then.")
]
Result = TypeVar("Result", "Prediction", "Decision")
Row = tuple[str, ...]


def classify(
    images: Images,
    url: Url = DEFAULT_URL,
    key: ReadKey = None,
    model: Model = "auto",
    label: Labels = None,
    template: Annotated[list[str] | None, typer.Option(help='Prompt with one "{}".')] = None,
    top_k: Annotated[int, typer.Option(min=1, help="How many labels to show.")] = 1,
    unclaimed: Unclaimed = None,
    neighbours: Neighbours = None,
    as_json: Json = False,
) -> None:
    """Ask a server what is on images."""
    table = table_of("image", "label", "probability", "answered by")
    with one_line_errors(), open_client(url, key) as client:
        options = _options(
            model=model,
            labels=label,
            templates=template,
            top_k=top_k,
            unclaimed=unclaimed,
            neighbours=neighbours,
        )
        asked = _asked(images, lambda batch: client.classify(batch, options).results)
        _show(asked, table, _choices, as_json=as_json)


def route(
    images: Images,
    url: Url = DEFAULT_URL,
    key: ReadKey = None,
    model: Model = "auto",
    label: Labels = None,
    tasks: Annotated[int, typer.Option(min=1, help="How many tasks to show, nearest first.")] = 5,
    unclaimed: Unclaimed = None,
    neighbours: Neighbours = None,
    as_json: Json = False,
) -> None:
    """Ask a server which task would answer for images, and why; nothing is computed beyond that."""
    table = table_of("image", "goes to", "task", "score", "threshold", "margin", "accepted")
    with one_line_errors(), open_client(url, key) as client:
        options = _options(model=model, labels=label, unclaimed=unclaimed, neighbours=neighbours)
        asked = _asked(images, lambda batch: client.route(batch, options).results)
        _show(asked, table, lambda decision: _scores(decision, tasks), as_json=as_json)


def _options(**given: object) -> ClassifyOptions:
    from service.wire.schemas import ClassifyOptions

    return ClassifyOptions.model_validate(given)


def _asked(
    given: Iterable[Path], ask: Callable[[list[bytes]], Sequence[Result | Failure]]
) -> Iterator[tuple[Path, Result | Failure]]:
    """A result for each image; the only image's error is a result like any other."""
    from service.client import RefusedError

    paths = pictures(given)
    if not paths:
        fail("there is no image")
    for batch in batches(paths):
        results: Sequence[Result | Failure]
        try:
            results = ask([data for _, data in batch])
        except RefusedError as error:
            if len(batch) > 1 or error.status not in (413, 415, 422):
                raise
            results = [_failure(error)]
        yield from zip([path for path, _ in batch], results, strict=True)


def _failure(error: RefusedError) -> Failure:
    from service.wire.schemas import Failure, Problem

    problem = Problem(
        type="about:blank", title="", status=error.status, code=error.code, detail=str(error)
    )
    return Failure(error=problem)


def _show(
    asked: Iterable[tuple[Path, Result | Failure]],
    table: Table,
    rows: Callable[[Result], list[Row]],
    *,
    as_json: bool,
) -> None:
    """Print what is known of each image; status 1 if one could not be used."""
    from service.wire.schemas import Failure

    failures = 0
    for path, result in asked:
        failures += isinstance(result, Failure)
        if as_json:
            fields = result.model_dump(mode="json", exclude_none=True)
            out.print_json(json.dumps({"image": str(path)} | fields), indent=None)
        elif isinstance(result, Failure):
            table.add_row(escape(str(path)), f"[red]{escape(result.error.detail)}[/red]")
        else:
            for index, row in enumerate(rows(result)):
                table.add_row(escape(str(path)) if index == 0 else "", *map(escape, row))
    if not as_json:
        out.print(table)
    if failures:
        raise typer.Exit(1)


def _choices(prediction: Prediction) -> list[Row]:
    """Label, probability, who says so: the last in the first row only."""
    who = _name(prediction.path)
    if prediction.path.kind != "task":
        who = f"{who} ({prediction.label_set})"
    return [
        (choice.label, f"{choice.probability:.1%}", who if rank == 0 else "")
        for rank, choice in enumerate(prediction.top_k)
    ]


def _scores(decision: Decision, most: int) -> list[Row]:
    """Where the image goes, in the first row; then tasks and their scores, nearest first."""
    scores = sorted(
        decision.scores.items(),
        key=lambda item: float("inf") if item[1].margin is None else -item[1].margin,
    )
    rows = [
        (
            task if score.eligible else f"{task} (may not)",
            _number(score.score),
            _number(score.threshold),
            _number(score.margin),
            "yes" if score.accepted else "no",
        )
        for task, score in scores[:most]
    ] or [("",) * 5]
    return [(_name(decision.path) if index == 0 else "", *row) for index, row in enumerate(rows)]


def _name(path: schemas.Path | schemas.PathMember) -> str:
    """Who answers; of several, how much each counts."""
    if path.kind == "aggregate":
        return ", ".join(f"{_name(one)} {one.weight:.0%}" for one in path.members or ())
    return f"{path.task}@{path.version}" if path.kind == "task" else "zero-shot"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
