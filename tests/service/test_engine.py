"""The engine's thread, with plain functions as its model: batches, jobs, failures, the end."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from medley.classifier import Ask, Routed
from service.engine import Engine
from service.errors import EngineError, QueueFullError, UnavailableError
from service.metrics import Metrics

BLANK = torch.zeros(3, 2, 2, dtype=torch.uint8)
LONG_S = 3600.0


class Route:
    """Answers each image with its first pixel; keeps the size of every batch that is not a beat."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def __call__(self, pixels_BCHW: Tensor, asks: Sequence[Ask]) -> Routed:
        values = pixels_BCHW[:, 0, 0, 0].tolist()
        if values != [0]:
            self.batches.append(values)
            self.entered.release()
            self.gate.wait()
            if 66 in values:
                raise RuntimeError("a bad batch")
        empty = torch.zeros(len(asks), 0)
        return Routed(pixels_BCHW[:, 0, 0].float(), [-1] * len(asks), [], empty, empty.bool())


@contextmanager
def running(route: Route, **options: float) -> Iterator[Engine]:
    values = {"max_batch": 4, "max_wait_s": 0.0, "queue_limit": 8, "heartbeat_s": LONG_S}
    engine = Engine(route, blank_CHW=BLANK, metrics=Metrics(), **(values | options))  # type: ignore[arg-type]
    engine.start()
    try:
        yield engine
    finally:
        route.gate.set()
        engine.stop()


def image(value: int) -> Tensor:
    return torch.full((3, 2, 2), value, dtype=torch.uint8)


def hold(route: Route, engine: Engine) -> Callable[[], None]:
    """Let one image into the route and keep it there; returns how to let go."""
    route.gate.clear()
    engine.submit([image(99)], Ask())
    route.entered.acquire()
    return route.gate.set


def test_each_image_gets_its_own_answer() -> None:
    route = Route()
    with running(route) as engine:
        futures = engine.submit([image(v) for v in range(1, 8)], Ask())
        answers = [future.result(10) for future in futures]

    assert [answer.features_E[0].item() for answer in answers] == list(range(1, 8))


def test_a_batch_closes_when_it_is_full() -> None:
    route = Route()
    with running(route, max_wait_s=LONG_S) as engine:
        futures = engine.submit([image(v) for v in (1, 2, 3, 4)], Ask())
        assert len([future.result(10) for future in futures]) == 4

    assert route.batches == [[1, 2, 3, 4]]


def test_a_batch_closes_when_the_oldest_has_waited_enough() -> None:
    route = Route()
    with running(route, max_wait_s=0.001) as engine:
        (future,) = engine.submit([image(1)], Ask())
        assert future.result(10).queue_s >= 0.001


def test_what_waits_goes_together_whoever_asked() -> None:
    route = Route()
    with running(route) as engine:
        let_go = hold(route, engine)
        futures = [engine.submit([image(v)], Ask(path=v))[0] for v in (1, 2, 3)]
        let_go()
        assert all(future.result(10) for future in futures)

    assert route.batches == [[99], [1, 2, 3]]


def test_a_full_queue_takes_all_images_of_a_request_or_none() -> None:
    route = Route()
    with running(route, queue_limit=3) as engine:
        let_go = hold(route, engine)
        kept = engine.submit([image(1), image(2)], Ask())
        with pytest.raises(QueueFullError):
            engine.submit([image(3), image(4)], Ask())
        kept += engine.submit([image(5)], Ask())
        let_go()
        assert all(future.result(10) for future in kept)

    assert route.batches == [[99], [1, 2, 5]]


def test_a_failing_batch_fails_alone_and_the_thread_lives() -> None:
    route = Route()
    with running(route) as engine:
        (bad,) = engine.submit([image(66)], Ask())
        with pytest.raises(EngineError):
            bad.result(10)
        (good,) = engine.submit([image(1)], Ask())

        assert good.result(10).features_E[0] == 1
        assert engine.alive


def test_an_image_whose_client_has_gone_is_not_computed() -> None:
    route = Route()
    with running(route) as engine:
        let_go = hold(route, engine)
        (gone,) = engine.submit([image(1)], Ask())
        (kept,) = engine.submit([image(2)], Ask())
        gone.cancel()
        let_go()
        kept.result(10)
        with pytest.raises(CancelledError):
            gone.result(10)

    assert route.batches == [[99], [2]]


def test_jobs_and_batches_take_turns_in_order() -> None:
    route, order = Route(), []
    with running(route, max_batch=1) as engine:
        let_go = hold(route, engine)
        jobs = [engine.run(lambda n=n: order.append((n, len(route.batches)))) for n in range(3)]  # type: ignore[misc]
        futures = engine.submit([image(v) for v in (1, 2, 3)], Ask())
        let_go()
        for future in futures:
            future.result(10)
        for job in jobs:
            job.result(10)

    assert [n for n, _ in order] == [0, 1, 2]
    assert [batches for _, batches in order] == [1, 2, 3]


def test_a_failing_job_tells_who_asked_and_the_thread_lives() -> None:
    with running(Route()) as engine:
        with pytest.raises(ZeroDivisionError):
            engine.run(lambda: 1 / 0).result(10)

        assert engine.run(lambda: 7).result(10) == 7


def test_everything_that_waits_is_answered_before_the_end() -> None:
    route = Route()
    with running(route, max_batch=2, max_wait_s=LONG_S) as engine:
        let_go = hold_waiting(route, engine)
        futures = engine.submit([image(v) for v in (1, 2, 3)], Ask())
        job = engine.run(lambda: 5)
        stopper = threading.Thread(target=engine.stop)
        stopper.start()
        let_go()
        stopper.join()

        assert [future.result(0).features_E[0].item() for future in futures] == [1, 2, 3]
        assert job.result(0) == 5
        assert not engine.alive
        with pytest.raises(UnavailableError):
            engine.submit([image(1)], Ask())
        with pytest.raises(UnavailableError):
            engine.run(lambda: 0)


def hold_waiting(route: Route, engine: Engine) -> Callable[[], None]:
    """As `hold`, for an engine that waits for full batches of two."""
    route.gate.clear()
    engine.submit([image(98), image(99)], Ask())
    route.entered.acquire()
    return route.gate.set


def test_an_idle_engine_proves_itself() -> None:
    beats = threading.Semaphore(0)

    def route(pixels_BCHW: Tensor, asks: Sequence[Ask]) -> Routed:
        beats.release()
        empty = torch.zeros(1, 0)
        return Routed(torch.zeros(1, 2), [-1], [], empty, empty.bool())

    engine = Engine(
        route,
        blank_CHW=BLANK,
        metrics=Metrics(),
        max_batch=1,
        max_wait_s=0,
        queue_limit=1,
        heartbeat_s=0.01,
    )
    assert engine.last_success_age_s() == float("inf")
    engine.start()
    for _ in range(3):
        assert beats.acquire(timeout=10)
    engine.stop()
    assert engine.last_success_age_s() < 10


def test_an_engine_that_cannot_compute_is_not_fresh() -> None:
    tried = threading.Semaphore(0)

    def route(pixels_BCHW: Tensor, asks: Sequence[Ask]) -> Routed:
        tried.release()
        raise RuntimeError("no device")

    engine = Engine(
        route,
        blank_CHW=BLANK,
        metrics=Metrics(),
        max_batch=1,
        max_wait_s=0,
        queue_limit=1,
        heartbeat_s=0.01,
    )
    engine.start()
    for _ in range(2):
        assert tried.acquire(timeout=10)
    engine.stop()
    assert engine.last_success_age_s() == float("inf")
