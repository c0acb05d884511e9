from collections import Counter
from itertools import pairwise

import pytest

from service.bench.traffic import Mix, arrivals, choices


def test_arrivals_come_at_the_rate_that_was_asked_for_and_in_order() -> None:
    due_s = arrivals(50, 200, seed=3)
    assert due_s == sorted(due_s)
    assert due_s[0] > 0
    assert due_s[-1] < 200
    # 10,000 are expected; a Poisson count is off by 100 in two of three cases.
    assert len(due_s) == pytest.approx(10_000, abs=500)


def test_gaps_between_arrivals_are_as_those_of_independent_clients() -> None:
    gaps_s = [later - earlier for earlier, later in pairwise(arrivals(50, 200, seed=3))]
    mean_s = sum(gaps_s) / len(gaps_s)
    variance = sum((gap_s - mean_s) ** 2 for gap_s in gaps_s) / len(gaps_s)
    assert variance == pytest.approx(mean_s**2, rel=0.1)  # exponential; even ones would have none


def test_equal_seeds_give_equal_arrivals() -> None:
    assert arrivals(10, 5, seed=1) == arrivals(10, 5, seed=1) != arrivals(10, 5, seed=2)


@pytest.mark.parametrize("rate_hz", [0, -1])
def test_a_rate_of_nothing_is_refused(rate_hz: float) -> None:
    with pytest.raises(ValueError, match="rate"):
        arrivals(rate_hz, 1, seed=0)


def test_zipf_asks_for_the_second_task_half_as_often_as_for_the_first() -> None:
    counts = Counter(choices(100_000, 16, Mix.ZIPF, seed=0))
    assert counts[1] / counts[0] == pytest.approx(1 / 2, rel=0.05)
    assert counts[15] / counts[0] == pytest.approx(1 / 16, rel=0.1)


def test_uniform_asks_for_all_tasks_alike() -> None:
    counts = Counter(choices(100_000, 16, Mix.UNIFORM, seed=0))
    assert min(counts.values()) / max(counts.values()) > 0.9
    assert len(counts) == 16
