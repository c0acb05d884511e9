"""The whole story in one command: learn a task, serve it, teach a second one while the server runs.

Every step is what a user would type; the commands are printed before they run. Nothing is
downloaded. What it makes goes into demo/out and is made anew each time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from service.client import Client
from service.wire.schemas import ClassifyOptions, Prediction
from trainer.datasets import ImageSet, open_dataset

DEMO = Path(__file__).parent
OUT = DEMO / "out"
MEDLEY = str(Path(sys.executable).parent / "medley")
BATCH = 16
console = Console(width=100)


@dataclass(frozen=True)
class Score:
    """How a set of pictures was answered."""

    right: float
    by_experts: float

    def __str__(self) -> str:
        return f"{self.right:.1%} right, {self.by_experts:.0%} by experts"


def main() -> None:
    """Tell the story."""
    started_s = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    fashion, flags = load("fashion"), load("flags")
    console.rule("1. Learn a first task from 1,000 pictures of clothes")
    learn("fashion")
    with server() as url, Client(url, timeout_s=120) as client:
        console.rule("2. Serve it")
        register(client, "fashion")
        before = {"fashion": ask(client, fashion), "flags": ask(client, flags, labels=True)}
        told_before = ask(client, fashion, model="fashion")
        show_answers(client, fashion, flags)
        console.rule("3. Teach a second one, 48 flags, while the server answers")
        with steady_traffic(url, fashion) as traffic:
            learn("flags")
            register(client, "flags")
        after = {"fashion": ask(client, fashion), "flags": ask(client, flags, labels=True)}
        show_answers(client, fashion, flags)
        unlabelled, told = ask(client, flags), ask(client, flags, model="flags")
        told_after = ask(client, fashion, model="fashion")
    console.rule("4. What changed, and what did not")
    show(fashion, flags, before, after, unlabelled, told)
    same = sum(a == b for a, b in zip(told_before, told_after, strict=True))
    console.print(
        f"Answers of task fashion, every probability of {len(told_after)} pictures: "
        f"{same} of {len(told_after)} equal to the last bit before and after."
    )
    console.print(f"While flags was taught: {traffic.answered} requests, {traffic.failed} failed.")
    console.print(
        f"The server stopped cleanly. All of it took {time.monotonic() - started_s:.0f} s."
    )
    if same < len(told_after) or traffic.failed:
        sys.exit("the demo did not show what it promises")


def load(task: str) -> ImageSet:
    """Read a task's test pictures."""
    return open_dataset(str(DEMO / task), "test")


def run(*arguments: str) -> None:
    """Run a medley command as a user would."""
    console.print(f"[bold]$ medley {' '.join(arguments)}[/bold]")
    subprocess.run([MEDLEY, *arguments], check=True)


def learn(task: str) -> None:
    """Learn a task from its training pictures into a bundle."""
    folder = (
        (DEMO / task).relative_to(Path.cwd()) if DEMO.is_relative_to(Path.cwd()) else DEMO / task
    )
    run("train", str(folder), "--task", task, "--version", "1", "--out", str(OUT))


def register(client: Client, task: str) -> None:
    """Upload a bundle to the running server and say how long it took to go live."""
    bundle = OUT / f"{task}-1.safetensors"
    console.print(f"[bold]$ medley task register {bundle.name}[/bold]")
    started_s = time.monotonic()
    client.register(task, "1", bundle)
    console.print(f"live {time.monotonic() - started_s:.2f} s after the upload began")


@contextmanager
def server() -> Iterator[str]:
    """Run a server on a free port; on leaving, stop it and insist that it ends cleanly."""
    arguments = ["serve", "--port", "0", "--store", str(OUT / "store")]
    console.print(f"[bold]$ medley {' '.join(arguments)}[/bold]")
    quiet = os.environ | {"MEDLEY_LOG_LEVEL": "warning"}  # not a line for each request
    process = subprocess.Popen([MEDLEY, *arguments], stdout=subprocess.PIPE, text=True, env=quiet)
    assert process.stdout is not None
    try:
        line = process.stdout.readline().strip()
        if "http://" not in line:
            sys.exit("the server did not start")
        console.print(line)
        yield line.split()[-1]
    finally:
        process.terminate()
        if process.wait(timeout=30) != 0:
            sys.exit(f"the server ended with status {process.returncode}")


@dataclass
class Traffic:
    """What became of the requests of `steady_traffic`."""

    answered: int = 0
    failed: int = 0


@contextmanager
def steady_traffic(url: str, pictures: ImageSet) -> Iterator[Traffic]:
    """Keep asking, one picture after the other, until the block ends."""
    traffic, stop = Traffic(), threading.Event()

    def keep_asking() -> None:
        with Client(url, timeout_s=120) as client:
            while not stop.wait(0.5):
                try:
                    client.classify(files(pictures, [traffic.answered % len(pictures)]))
                    traffic.answered += 1
                except Exception as error:  # whatever it is, it is a request that failed
                    console.print(f"[red]{error}[/red]")
                    traffic.failed += 1

    thread = threading.Thread(target=keep_asking)
    thread.start()
    try:
        yield traffic
    finally:
        stop.set()
        thread.join()


def ask(
    client: Client, pictures: ImageSet, *, model: str = "auto", labels: bool = False
) -> list[Prediction]:
    """Classify all pictures of a task; with their label list or without."""
    options = ClassifyOptions(
        model=model,
        labels=list(pictures.class_names) if labels else None,
        templates=list(pictures.templates) if labels else None,
        top_k=len(pictures.class_names),
    )
    answers: list[Prediction] = []
    for start in range(0, len(pictures), BATCH):
        some = range(start, min(start + BATCH, len(pictures)))
        results = client.classify(files(pictures, some), options).results
        answers += [result for result in results if isinstance(result, Prediction)]
    return answers


def truth(pictures: ImageSet) -> list[str]:
    """Name the class that each picture shows."""
    return [pictures.class_names[label] for label in pictures.labels]


def files(pictures: ImageSet, indices: Iterable[int]) -> list[bytes]:
    """Read some pictures as they are sent."""
    return [pictures.bytes_of(index) for index in indices]


def score(pictures: ImageSet, answers: list[Prediction]) -> Score:
    """Count right answers, and those that the task's own experts gave."""
    right = [a.label == t for a, t in zip(answers, truth(pictures), strict=True)]
    expert = [a.path.task == pictures.name for a in answers]
    return Score(sum(right) / len(right), sum(expert) / len(expert))


def show_answers(client: Client, *tasks: ImageSet) -> None:
    """Show what the server says to a few pictures."""
    table = Table("picture of", "answer", "probability", "answered by", box=None)
    for pictures in tasks:
        step = len(pictures) // 3
        some = range(step // 2, len(pictures), step)
        options = ClassifyOptions(
            labels=list(pictures.class_names), templates=list(pictures.templates)
        )
        results = client.classify(files(pictures, some), options).results
        for i, result in zip(some, results, strict=True):
            assert isinstance(result, Prediction)
            right = result.label == truth(pictures)[i]
            answer = f"[{'green' if right else 'red'}]{result.label}[/]"
            by = f"{result.path.task}@{result.path.version}" if result.path.task else "zero-shot"
            table.add_row(truth(pictures)[i], answer, f"{result.probability:.0%}", by)
    console.print(table)


def show(
    fashion: ImageSet,
    flags: ImageSet,
    before: dict[str, list[Prediction]],
    after: dict[str, list[Prediction]],
    unlabelled: list[Prediction],
    told: list[Prediction],
) -> None:
    """Print the table of the story; only in the last row is the server told the task."""
    table = Table("pictures", "the request", "before flags was taught", "after")
    table.add_row(
        f"{len(fashion)} of fashion",
        "picture alone",
        str(score(fashion, before["fashion"])),
        str(score(fashion, after["fashion"])),
    )
    table.add_row(
        f"{len(flags)} of flags",
        f"picture and {len(flags.class_names)} labels",
        str(score(flags, before["flags"])),
        str(score(flags, after["flags"])),
    )
    table.add_row(f"{len(flags)} of flags", "picture alone", "-", str(score(flags, unlabelled)))
    table.add_row(f"{len(flags)} of flags", "picture and model=flags", "-", str(score(flags, told)))
    console.print(table)
    console.print("The flags of the test are drawn by other people than those it learnt from.")


if __name__ == "__main__":
    main()
