"""Times columns in turns: every round calls each of them once, in an order drawn anew.

So a machine that becomes slower in between is slower for all, and what two columns are compared by
is the median of the ratios within rounds. On a GPU the work of a round runs over several inputs,
together larger than the L2 cache, and is timed by events; `graphed` makes a CUDA graph of it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Pass", "Timed", "Work", "graphed", "in_turns", "over", "reason", "seconds"]

Work = Callable[[], object]

LEAST_SAMPLE_S = 0.004  # shorter work is repeated within a round: clocks and interrupts
LONG_S = 0.25  # it is warm after one call, and a sample by itself
MOST_CALLS, MOST_ROUNDS = 200, 400


@dataclass(frozen=True)
class Pass:
    """The same work on one input or on several, one after the other."""

    run: Work
    inputs: int = 1


@dataclass(frozen=True)
class Timed:
    """Seconds of one input in each round, or why there are none."""

    times_s: tuple[float, ...] = ()
    failure: str | None = None


def over(works: Sequence[Work]) -> Pass:
    """One piece of work for each input."""

    def run() -> None:
        for work in works:
            work()

    return Pass(run, len(works))


def graphed(works: Sequence[Work]) -> Pass:
    """The same as one CUDA graph, captured by the first call, so that its failure is the column's.

    One graph for all inputs: a launch of its own for each would take as long as a small kernel.
    """
    graphs: list[torch.cuda.CUDAGraph] = []

    def run() -> None:
        if not graphs:
            graphs.append(_captured(works))
        graphs[0].replay()

    return Pass(run, len(works))


def in_turns(
    columns: Mapping[str, Pass], *, device: torch.device, repeats: int, least_s: float = 0.0
) -> dict[str, Timed]:
    """Time all columns.

    Args:
        columns: what is compared, by name.
        device: what the clock waits for.
        repeats: rounds, at least;
        least_s: and more of them (400 at most) until so many seconds are over.
    """
    failures: dict[str, str] = {}
    calls: dict[str, int] = {}
    for name, column in columns.items():
        try:
            calls[name] = _warm_up(column.run, device)
        except Exception as error:  # whatever a column dies of is its result, and no other's
            failures[name] = reason(error)
    times_s: dict[str, list[float]] = {name: [] for name in calls}
    order, chance = list(calls), random.Random(0)
    started_s, rounds = time.perf_counter(), 0
    while order and (rounds < repeats or time.perf_counter() - started_s < least_s):
        chance.shuffle(order)
        for name in order:
            passed_s = seconds(columns[name].run, device=device, calls=calls[name])
            times_s[name].append(passed_s / columns[name].inputs)
        rounds += 1
        if rounds == MOST_ROUNDS:
            break
    return {name: Timed(tuple(times_s.get(name, ())), failures.get(name)) for name in columns}


def seconds(work: Work, *, device: torch.device, calls: int = 1) -> float:
    """Seconds of a call, the mean of some in a row."""
    if device.type == "cuda":
        return _cuda_seconds(work, calls)
    started_s = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - started_s) / calls


def reason(error: Exception) -> str:
    """What something died of, in one line."""
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first}"[:200]


def _captured(works: Sequence[Work]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries take their workspaces before the capture
        for _ in range(3):
            works[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    return graph


def _warm_up(work: Work, device: torch.device) -> int:
    """Run what compiles or allocates at first; return how many calls make a sample."""
    passed_s = seconds(work, device=device)
    if passed_s < LONG_S:
        passed_s = seconds(work, device=device)
    return min(MOST_CALLS, max(1, round(LEAST_SAMPLE_S / max(passed_s, 1e-9))))


def _cuda_seconds(work: Work, calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / calls
