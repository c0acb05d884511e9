"""Report and pictures of a folder of lines; the same lines give the same report again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medley.files import write_whole
from medley.journal import Measurement, read_lines
from service.bench.goals import Goal, goals_of, goals_table
from service.bench.names import SERVED
from service.bench.pictures import PICTURES
from service.bench.sections import SECTIONS

__all__ = ["REPORT", "measured_on", "write_report"]

REPORT = "report.md"
NOTE = (
    "Server, visitors and whatever else runs share these cores. Arrivals are a Poisson process, "
    "fixed before; a latency counts from the moment at which a request was due, so that one which "
    "had to wait for a connection counts its wait. Saturation is what 16 visitors get who come "
    "again as soon as they are answered; loads are shares of it, measured just before. Stages are "
    "means from the server's own /metrics; cpu is processor time for an image, of all threads. "
    "A p99 of fewer than 100 visits is left out. Images are noise that is as heavy to decode as "
    "photographs (500 x 375, 70 kB); `pixels` are uncompressed BMPs of the input size, which need "
    "neither decoding nor resizing. Tasks are random, of the size that training makes."
)


def write_report(folder: Path) -> list[Goal]:
    """Read the lines of a folder, write `report.md` and its pictures; return the goals.

    Raises:
        DataError: see `read_lines`.
    """
    lines = read_lines(folder)
    goals = goals_of(lines)
    parts = ["# Serving under load", measured_on(lines), NOTE, "## Goals", goals_table(goals)]
    for name, draw in PICTURES.items():
        png = draw(lines)
        if png is not None:
            write_whole(folder / name, png)
            parts.append(f"![{name.removesuffix('.png')}]({name})")
    for heading, section in SECTIONS.items():
        text = section(lines)
        if text:
            parts += [f"## {heading}", text]
    write_whole(folder / REPORT, ("\n\n".join(parts) + "\n").encode())
    return goals


def measured_on(lines: Sequence[Measurement]) -> str:
    """The command, the machine and what was served, for the head of a report."""
    if not lines:
        return "Nothing was measured."
    run = lines[0].run
    served = ", ".join(
        f"{name} {value}"
        for line in lines
        if line.bench == SERVED
        for name, value in line.conditions.items()
    )
    told = f"{run.machine}; {run.versions}; {run.started}."
    return f"`{run.command}`\n\n{told}\n\nServed: {served}."
