"""`medley data list | fetch | check`: what the suites are made of, and whether it is all there."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from trainer.progress import bars
from trainer.sources import DEFAULT_CACHE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trainer.cards import Card

__all__ = ["data_commands"]

data_commands = typer.Typer(no_args_is_help=True, help="Data sets of the benchmark suites.")
out, err = Console(), Console(stderr=True)


class SuiteName(StrEnum):
    """What can be named with --suite."""

    SMALL = "small"
    MTIL = "mtil"


Root = Annotated[Path | None, typer.Option(help="Folder that holds the data sets of mtil.")]
Cache = Annotated[Path, typer.Option(help="Where built tasks of the small suite are kept.")]
Tasks = Annotated[list[str] | None, typer.Argument(help="Tasks or an order; by default all.")]


@data_commands.command("list")
def list_tasks(
    suite: Annotated[SuiteName | None, typer.Option(help="One suite; by default both.")] = None,
    root: Root = None,
    cache: Cache = DEFAULT_CACHE,
) -> None:
    """Show each task: classes, images, split, terms, where it comes from, and if it is here."""
    for name in [suite] if suite is not None else list(SuiteName):
        table = Table("task", "classes", "train", "test", "here", "about", title=f"suite {name}")
        for card in _cards(name).values():
            place = _place(name, card.task, root, cache)
            table.add_row(
                *(card.task, str(card.classes)),
                *(f"{card.images['train']:,}", f"{card.images['test']:,}"),
                "yes" if place is not None and place.exists() else "no",
                f"{_shortened(card.source)}\nsplit: {card.split}\nterms: {card.licence}",
            )
        out.print(table)


@data_commands.command()
def fetch(
    tasks: Tasks = None,
    suite: Annotated[SuiteName, typer.Option(help="Which suite.")] = SuiteName.SMALL,
    cache: Cache = DEFAULT_CACHE,
) -> None:
    """Fetch the packages of the small suite by their ordinary clients, and build the tasks."""
    from medley.errors import DataError
    from trainer.suite import load_task

    if suite is SuiteName.MTIL:
        sources = "; ".join(f"{card.task}: {card.source}" for card in _cards(suite).values())
        raise DataError(f"mtil cannot be fetched for you; get the data sets from {sources}")
    chosen = _chosen(suite, tasks)
    with bars(err) as progress:
        advance = progress.counting("tasks", len(chosen))
        for task in chosen:
            load_task(task, "test", cache=cache)
            advance(1)


@data_commands.command()
def check(
    tasks: Tasks = None,
    suite: Annotated[SuiteName, typer.Option(help="Which suite.")] = SuiteName.SMALL,
    root: Root = None,
    cache: Cache = DEFAULT_CACHE,
    decode: Annotated[
        bool, typer.Option(help="Open every picture of mtil as well, which takes long.")
    ] = False,
) -> None:
    """Count images by part and class, compare digests, and say what is missing.

    Goes through all data sets whatever it meets. Exit status 2 if anything is missing.
    """
    from medley.errors import DataError

    if suite is SuiteName.MTIL and root is None:
        raise DataError("mtil needs --root, the folder that holds its data sets")
    complete = True
    for task in _chosen(suite, tasks):
        found = _problems(suite, task, root, cache, decode)
        complete &= not found
        for line in found or [f"{task}: complete"]:
            out.print(line, markup=False, highlight=False, soft_wrap=True)
    if not complete:
        raise typer.Exit(2)


def _cards(suite: SuiteName) -> Mapping[str, Card]:
    if suite is SuiteName.MTIL:
        from trainer.mtil import CARDS as MTIL_CARDS

        return MTIL_CARDS
    from trainer.suite import CARDS as SMALL_CARDS

    return SMALL_CARDS


def _chosen(suite: SuiteName, tasks: Sequence[str] | None) -> list[str]:
    """The tasks named, or all; ``DataError`` for one that the suite lacks."""
    from trainer.suites import open_suite

    opened = open_suite(suite)
    return list(opened.order(",".join(tasks)) if tasks else opened.tasks)


def _place(suite: SuiteName, task: str, root: Path | None, cache: Path) -> Path | None:
    if suite is SuiteName.MTIL:
        from trainer.mtil import home_of

        return None if root is None else home_of(task, root)
    from trainer.suite import cached_file

    return cached_file(task, cache)


def _problems(
    suite: SuiteName, task: str, root: Path | None, cache: Path, decode: bool
) -> list[str]:
    if suite is SuiteName.MTIL and root is not None:
        from trainer.mtil import problems as mtil_problems

        with bars(err) as progress:
            total = sum(_cards(suite)[task].images.values())
            advance = progress.counting(task, total) if decode else lambda count: None
            return mtil_problems(task, root, decode=decode, on_image=lambda: advance(1))
    from trainer.suite import problems as small_problems

    return small_problems(task, cache)


def _shortened(source: str) -> str:
    names = source.split(", ")
    return source if len(names) < 5 else f"{', '.join(names[:3])} and {len(names) - 3} more"
