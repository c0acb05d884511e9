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

__all__ = ["Timed", "Work", "graphed", "in_turns", "seconds"]

Work = Callable[[], object]

LEAST_SAMPLE_S = 0.004  # shorter work is repeated within a round: clocks and interrupts
LONG_S = 0.25  # it is warm after one call, and a sample by itself
MOST_CALLS, MOST_ROUNDS = 200, 400


@dataclass(frozen=True)
class Timed:
    """Seconds of one call in each round, or why there are none."""

    times_s: tuple[float, ...] = ()
    failure: str | None = None


def in_turns(
    columns: Mapping[str, Sequence[Work]],
    *,
    device: torch.device,
    repeats: int,
    least_s: float = 0.0,
) -> dict[str, Timed]:
    """Time all columns.

    Args:
        columns: the same work on one or several inputs, by name; a time is that of one input.
        device: what the clock waits for.
        repeats: rounds, at least;
        least_s: and more of them (400 at most) until so many seconds are over.
    """
    failures: dict[str, str] = {}
    calls: dict[str, int] = {}
    for name, works in columns.items():
        try:
            calls[name] = _warm_up(works, device)
        except Exception as error:  # whatever a column dies of is its result, and no other's
            failures[name] = _reason(error)
    times_s: dict[str, list[float]] = {name: [] for name in calls}
    order, chance = list(calls), random.Random(0)
    started_s, rounds = time.perf_counter(), 0
    while order and (rounds < repeats or time.perf_counter() - started_s < least_s):
        chance.shuffle(order)
        for name in order:
            passed_s = seconds(columns[name], device=device, passes=calls[name])
            times_s[name].append(passed_s / len(columns[name]))
        rounds += 1
        if rounds == MOST_ROUNDS:
            break
    return {name: Timed(tuple(times_s.get(name, ())), failures.get(name)) for name in columns}


def seconds(works: Sequence[Work], *, device: torch.device, passes: int = 1) -> float:
    """Seconds of one pass over `works`, the mean of `passes` in a row."""
    if device.type == "cuda":
        return _cuda_seconds(works, passes)
    started_s = time.perf_counter()
    for _ in range(passes):
        for work in works:
            work()
    return (time.perf_counter() - started_s) / passes


def graphed(works: Sequence[Work]) -> Sequence[Work]:
    """Capture each piece of work as a CUDA graph of its own; replays take the place of calls."""
    return [_captured(work) for work in works]


def _captured(work: Work) -> Work:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries take their workspaces before the capture
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = work()

    def replay(kept: object = kept) -> None:  # what the graph writes must stay allocated
        graph.replay()

    return replay


def _warm_up(works: Sequence[Work], device: torch.device) -> int:
    """Run what compiles or allocates at first; return how many passes make a sample."""
    passed_s = seconds(works, device=device)
    if passed_s < LONG_S:
        passed_s = seconds(works, device=device)
    return min(MOST_CALLS, max(1, round(LEAST_SAMPLE_S / max(passed_s, 1e-9))))


def _cuda_seconds(works: Sequence[Work], passes: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(passes):
        for work in works:
            work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / passes


def _reason(error: Exception) -> str:
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first}"[:200]
