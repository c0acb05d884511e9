"""Progress bars of long work: what is being done, how far it is, how long it will take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

__all__ = ["Bars", "LearningBar", "bars"]


class Bars:
    """The lines at the bottom of the screen; at most one of them at a time is being worked on."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def learning(self, name: str, batch_size: int) -> LearningBar:
        """Start the bar of a training run; a `Watcher`."""
        self._clear()
        return LearningBar(self._progress, name, batch_size)

    def counting(self, name: str, total: int | None = None) -> Callable[[int], None]:
        """Start the bar of something that is counted; call it with how many more are done."""
        self._clear()
        bar = self._progress.add_task(name, total=total, note="")
        return lambda count: self._progress.advance(bar, count)

    def _clear(self) -> None:
        for task in self._progress.task_ids:
            self._progress.remove_task(task)


class LearningBar:
    """Shows loss, accuracy, rate and time left of a training run."""

    def __init__(self, progress: Progress, name: str, batch_size: int) -> None:
        self._progress, self._name, self._batch_size = progress, name, batch_size
        self._bar = progress.add_task(f"{name}: preparing", total=None, note="")
        self._trunk = 0

    def on_start(self, step: int, steps: int) -> None:
        """See `Watcher`."""
        self._progress.remove_task(self._bar)
        self._bar = self._progress.add_task(self._name, total=steps, completed=step, note="")
        self._trunk = 0

    def on_trunk(self, images: int) -> None:
        """See `Watcher`."""
        self._trunk += images
        self._progress.update(self._bar, note=f"{self._trunk} images through the frozen blocks")

    def on_step(self, step: int, loss: float, accuracy: float) -> None:
        """See `Watcher`."""
        speed = next(task.speed for task in self._progress.tasks if task.id == self._bar)
        rate = f"{speed * self._batch_size:.0f} images/s" if speed else ""
        note = f"loss {loss:.3f} accuracy {accuracy:.2f} {rate}"
        self._progress.update(self._bar, completed=step, note=note)


@contextmanager
def bars(console: Console) -> Iterator[Bars]:
    """Show progress bars on a console while the block runs."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield Bars(progress)
