"""Suites: the data sets of a benchmark by name, and the orders in which they are learnt.

Knows not how a data set is built or read (`trainer.suite`, `trainer.mtil`), nor what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medley.errors import DataError
from trainer.datasets import ImageSet, Split, normalised
from trainer.sources import DEFAULT_CACHE

__all__ = ["SUITES", "Suite", "open_suite", "shared_names"]

SUITES = ("small", "mtil")


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Data sets of a benchmark and the orders in which they are learnt.

    Attributes:
        name: ``small`` or ``mtil``.
        tasks: all tasks, in order I.
        orders: named sequences of tasks; a sequence may leave tasks out.
        loader: reads one part of one task.

    Raises:
        DataError: two tasks have one name, or an order repeats or invents one.
    """

    name: str
    tasks: tuple[str, ...]
    orders: Mapping[str, tuple[str, ...]]
    loader: Callable[[str, Split], ImageSet]

    def __post_init__(self) -> None:
        if twice := _repeated(self.tasks):
            raise DataError(f"suite {self.name}: two tasks are called {', '.join(twice)}")
        for order in self.orders.values():
            self._check(order)

    def load(self, task: str, split: Split) -> ImageSet:
        """One part of one task.

        Raises:
            DataError: the suite has no such task, or its data cannot be had; one line.
        """
        self._check((task,))
        return self.loader(task, split)

    def order(self, text: str) -> tuple[str, ...]:
        """The sequence that ``I``, ``II`` or ``task,task,...`` means.

        Raises:
            DataError: neither an order nor tasks of this suite, or a task twice.
        """
        if text in self.orders:
            return self.orders[text]
        order = tuple(task.strip() for task in text.split(","))
        self._check(order)
        return order

    def shared_names(self) -> dict[str, tuple[str, ...]]:
        """Class names that several tasks have, with those tasks; it loads every task."""
        return shared_names({task: self.load(task, "test").class_names for task in self.tasks})

    def _check(self, order: Sequence[str]) -> None:
        if strangers := [task for task in order if task not in self.tasks]:
            raise DataError(
                f"suite {self.name} has no order and no task {', '.join(map(repr, strangers))}; "
                f"orders: {', '.join(self.orders)}; tasks: {', '.join(self.tasks)}"
            )
        if twice := _repeated(order):
            raise DataError(f"suite {self.name}: {', '.join(twice)} twice in one order")


def open_suite(name: str, *, root: Path | None = None, cache: Path = DEFAULT_CACHE) -> Suite:
    """Open a suite by name; data is read only when a task is loaded.

    Args:
        name: ``small``, rebuilt from packages, or ``mtil``, read from folders that you bring.
        root: where the folders of ``mtil`` are.
        cache: where ``small`` is kept once built.

    Raises:
        DataError: there is no such suite.
    """
    match name:
        case "small":
            return _small(cache)
        case "mtil":
            return _mtil(root)
        case _:
            raise DataError(f"there is no suite {name!r}; there are {', '.join(SUITES)}")


def shared_names(class_names: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Class names that several tasks have: normalised name to the tasks, in their order.

    Among the classes of all tasks together such a name cannot say whose class is meant.
    """
    owners: dict[str, list[str]] = {}
    for task, names in class_names.items():
        for name in {normalised(name) for name in names}:
            owners.setdefault(name, []).append(task)
    return {name: tuple(tasks) for name, tasks in sorted(owners.items()) if len(tasks) > 1}


def _small(cache: Path) -> Suite:
    from trainer.suite import TASKS, load_task  # draws with packages that training can do without

    return Suite(
        name="small",
        tasks=TASKS,
        orders={"I": TASKS, "II": TASKS[::-1], "smoke": ("animals", "flags", "letters")},
        loader=lambda task, split: load_task(task, split, cache=cache),
    )


def _mtil(root: Path | None) -> Suite:
    from trainer.mtil import ORDERS, TASKS, load_task

    return Suite(
        name="mtil",
        tasks=TASKS,
        orders=ORDERS,
        loader=lambda task, split: load_task(task, split, root=root),
    )


def _repeated(tasks: Sequence[str]) -> list[str]:
    return sorted({task for task in tasks if tasks.count(task) > 1})
