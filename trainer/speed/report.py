"""Report and pictures of a folder of lines; the same lines give the same report again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from medley.files import write_whole
from medley.journal import Measurement, read_lines
from trainer.speed.goals import Goal, goals_of, goals_table
from trainer.speed.pictures import PICTURES
from trainer.speed.sections import SECTIONS

__all__ = ["REPORT", "SUMMARY", "write_report", "write_summary"]

REPORT, SUMMARY = "report.md", "README.md"


def write_report(folder: Path) -> list[Goal]:
    """Read the lines of a folder, write `report.md` and its pictures; return the goals.

    Raises:
        DataError: see `read_lines`.
    """
    lines = read_lines(folder)
    goals = goals_of(lines)
    parts = ["# Speed", _measured_on(lines), "## Goals", goals_table(goals)]
    for bench, (heading, section) in SECTIONS.items():
        text = section(lines)
        if not text:
            continue
        parts += [f"## {heading}", *_picture(folder, bench, lines), text]
    write_whole(folder / REPORT, ("\n\n".join(parts) + "\n").encode())
    return goals


def write_summary(folder: Path, goals: Mapping[str, Sequence[Goal]]) -> None:
    """Write `README.md` over several benches: their goals in one table, and links."""
    every = [goal for some in goals.values() for goal in some]
    links = [f"- [{bench}]({bench}/{REPORT})" for bench in goals]
    lines = [line for bench in goals for line in read_lines(folder / bench)[:1]]
    parts = ["# Speed: summary", _measured_on(lines[:1]), goals_table(every), "\n".join(links)]
    write_whole(folder / SUMMARY, ("\n\n".join(parts) + "\n").encode())


def _measured_on(lines: Sequence[Measurement]) -> str:
    if not lines:
        return "Nothing was measured."
    run = lines[0].run
    note = (
        "A GPU: CUDA events; inputs take turns and are together larger than its L2 cache (cold); "
        "columns named graph are replays of CUDA graphs, the others are eager."
        if run.device == "cuda"
        else "A CPU: wall clock, one input for all calls, caches warm. Nothing here ran on a GPU."
    )
    return (
        f"`{run.command}`\n\n{run.machine}; {run.versions}; {run.started}.\n\n{note} Random data. "
        "Columns of a row were called in turns, in an order drawn anew each round; a ratio is the "
        "median of the ratios within rounds, a spread is that of the quartiles."
    )


def _picture(folder: Path, bench: str, lines: Sequence[Measurement]) -> list[str]:
    name, draw = PICTURES.get(bench, ("", lambda _: None))
    png = draw(lines)
    if png is None:
        return []
    write_whole(folder / name, png)
    return [f"![{bench}]({name})"]
