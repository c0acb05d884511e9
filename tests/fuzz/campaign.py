"""Many cases of one target in several processes; each case is known by its seed and number."""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Protocol

__all__ = ["Chunk", "Result", "Target", "case", "chunk", "run"]

CHUNK = 250
HANG_S = 600.0  # nothing at all from any process


class Target(Protocol):
    """Something to be fed with bytes."""

    def make(self, random: Random) -> bytes:
        """Make a case; equal for equal numbers."""

    def check(self, data: bytes) -> str:
        """Feed a case in; returns a word for what became of it, raises if it is a finding."""


@dataclass(frozen=True)
class Chunk:
    """What became of some cases that one process ran one after another."""

    pid: int
    resident_bytes: int
    outcomes: Counter[str]
    slowest_s: float
    findings: dict[int, str]  # number of the case, what happened


@dataclass
class Result:
    """What became of all cases."""

    outcomes: Counter[str] = field(default_factory=Counter)
    findings: dict[int, str] = field(default_factory=dict)
    slowest_s: float = 0.0
    resident: dict[int, list[int]] = field(default_factory=dict)  # by process

    def add(self, part: Chunk) -> None:
        self.outcomes += part.outcomes
        self.findings |= part.findings
        self.slowest_s = max(self.slowest_s, part.slowest_s)
        self.resident.setdefault(part.pid, []).append(part.resident_bytes)

    @property
    def growth_bytes(self) -> int:
        """How much the process that grew most holds at its end beyond the first quarter's most."""
        grown = [s[-1] - max(s[: 1 + len(s) // 4]) for s in self.resident.values()]
        return max(grown, default=0)


def case(target: Target, seed: int, number: int) -> bytes:
    """One case again."""
    return target.make(Random(seed * 1_000_003 + number))


def chunk(target: Target, seed: int, numbers: range) -> Chunk:
    """Run some cases in this process."""
    outcomes: Counter[str] = Counter()
    findings, slowest_s = {}, 0.0
    for number in numbers:
        data, start_s = case(target, seed, number), time.thread_time()
        try:
            outcomes[target.check(data)] += 1
        except Exception as error:  # whatever it is: that is what is looked for
            findings[number] = f"{type(error).__name__}: {error}"[:300]
        slowest_s = max(slowest_s, time.thread_time() - start_s)
    return Chunk(os.getpid(), _resident_bytes(), outcomes, slowest_s, findings)


def run(
    make_target: Callable[[], Target],
    *,
    seed: int,
    count: int,
    processes: int,
    on_chunk: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Run cases 0..count-1.

    Raises:
        BrokenProcessPool: a case has killed its process.
        TimeoutError: a case hangs.
    """
    result = Result()
    numbers = (range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))
    with ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), _begin, (make_target,)
    ) as pool:
        for part in _in_turn(pool, numbers, seed, 2 * processes):
            result.add(part)
            on_chunk(result)
    return result


def _in_turn(
    pool: ProcessPoolExecutor, numbers: Iterator[range], seed: int, ahead: int
) -> Iterator[Chunk]:
    running: set[Future[Chunk]] = set()
    while True:
        while len(running) < ahead and (some := next(numbers, None)) is not None:
            running.add(pool.submit(_run_here, seed, some))
        if not running:
            return
        done, running = wait(running, HANG_S, FIRST_COMPLETED)
        if not done:
            raise TimeoutError(f"no chunk of {CHUNK} cases has ended within {HANG_S:.0f} s")
        yield from (future.result() for future in done)


_here: list[Target] = []  # a process of the pool has one target


def _begin(make_target: Callable[[], Target]) -> None:
    _here.append(make_target())


def _run_here(seed: int, numbers: range) -> Chunk:
    return chunk(_here[0], seed, numbers)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
