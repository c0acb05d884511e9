"""When requests arrive and which task each is for, drawn from a seed. No clock, no network."""

from __future__ import annotations

import random
from enum import StrEnum

__all__ = ["Mix", "arrivals", "choices"]


class Mix(StrEnum):
    """How requests are spread over tasks; Zipf asks for the k-th 1/k as often as for the first."""

    UNIFORM = "uniform"
    ZIPF = "zipf"


def arrivals(rate_hz: float, seconds: float, *, seed: int) -> list[float]:
    """Draw the times of a Poisson process: independent clients, at a rate that is fixed.

    Raises:
        ValueError: the rate is not positive.
    """
    if rate_hz <= 0:
        raise ValueError(f"a rate of {rate_hz} requests a second")
    chance, due_s, now_s = random.Random(seed), [], 0.0
    while (now_s := now_s + chance.expovariate(rate_hz)) < seconds:
        due_s.append(now_s)
    return due_s


def choices(count: int, tasks: int, mix: Mix, *, seed: int) -> list[int]:
    """Draw the task of each of `count` requests."""
    weights = [1 / rank if mix is Mix.ZIPF else 1.0 for rank in range(1, tasks + 1)]
    return random.Random(seed).choices(range(tasks), weights, k=count)
