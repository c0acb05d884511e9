import pytest

from service.bench.load import Visits
from service.bench.measure import Timing, outcome_of

TIMING = Timing(seconds=10.0, warm_up_s=1.0)


def visits(*rows: tuple[float, float, float, int]) -> Visits:
    due_s, sent_s, done_s, status = zip(*rows, strict=True)
    return Visits(due_s=due_s, sent_s=sent_s, done_s=done_s, status=status, cpu_s=0.0)


def test_latency_counts_from_when_a_visit_was_due_and_not_from_when_it_was_sent() -> None:
    outcome = outcome_of(visits((2.0, 4.5, 5.0, 200)), TIMING)
    assert outcome.latencies_s == (3.0,)
    assert outcome.values["p99_s"] == 3.0
    assert outcome.values["visitor_wait_s"] == 2.5


def test_in_a_closed_loop_it_counts_from_when_it_was_sent() -> None:
    assert outcome_of(visits((0.0, 4.5, 5.0, 200)), None).latencies_s == (0.5,)


def test_a_closed_loop_counts_all_answers_up_to_the_last_however_they_are_batched() -> None:
    batches = [(0.0, done_s - 0.4, done_s, 200) for done_s in (0.4, 0.8, 1.2) for _ in range(16)]
    outcome = outcome_of(visits(*batches, (0.0, 0.0, 1.2, 500)), None)
    assert outcome.throughput_hz == pytest.approx(16 / 0.4)
    assert (outcome.values["visits"], outcome.values["errors"]) == (49, 1)


def test_the_beginning_is_not_counted() -> None:
    outcome = outcome_of(visits((0.5, 0.5, 9.0, 503), (2.0, 2.0, 2.25, 200)), TIMING)
    assert outcome.latencies_s == (0.25,)
    assert (outcome.values["visits"], outcome.values["errors"]) == (1, 0)


def test_what_failed_is_counted_and_has_no_latency() -> None:
    rows = [(2.0, 2.0, 2.1, status) for status in (200, 429, 0)]
    outcome = outcome_of(visits(*rows), TIMING)
    assert len(outcome.latencies_s) == 1
    assert (outcome.values["visits"], outcome.values["errors"]) == (3, 2)


def test_throughput_is_what_was_answered_within_the_window() -> None:
    rows = [(1.5, 1.5, done_s, 200) for done_s in (0.9, 1.0, 5.0, 9.9, 10.0, 30.0)]
    outcome = outcome_of(visits(*rows), TIMING)
    assert outcome.throughput_hz == pytest.approx(3 / 9)


def test_nothing_answered_has_no_quantiles_rather_than_zeros() -> None:
    outcome = outcome_of(visits((2.0, 2.0, 3.0, 500)), TIMING)
    assert outcome.latencies_s == ()
    assert "p50_s" not in outcome.values
