"""The engine's thread, with plain functions as its model: batches, jobs, failures, the end."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from medley.classifier import Ask
from service.engine import Answer, Engine
from service.errors import EngineError, QueueFullError, UnavailableError
from service.metrics import Metrics
from tests.service.models import BAD, DeadModel, DeviceModel, HostModel

BLANK = torch.zeros(3, 2, 2, dtype=torch.uint8)
LONG_S = 3600.0


@contextmanager
def running(
    model: HostModel | DeviceModel | DeadModel,
    *,
    max_batch: int = 4,
    max_wait_s: float = 0.0,
    queue_limit: int = 8,
    heartbeat_s: float = LONG_S,
) -> Iterator[Engine]:
    engine = Engine(
        model.launch,
        blank_CHW=BLANK,
        metrics=Metrics(),
        max_batch=max_batch,
        max_wait_s=max_wait_s,
        queue_limit=queue_limit,
        heartbeat_s=heartbeat_s,
    )
    engine.start()
    try:
        yield engine
    finally:
        model.let_go()
        engine.stop()


def image(value: int) -> Tensor:
    return torch.full((3, 2, 2), value, dtype=torch.uint8)


def hold(model: HostModel, engine: Engine, *values: int) -> Callable[[], None]:
    """Let one batch into the model and keep it there; returns how to let go."""
    model.gate.clear()
    engine.submit([image(value) for value in values or (99,)], Ask())
    model.entered.acquire()
    return model.let_go


def firsts(futures: list[Future[Answer]]) -> list[float]:
    """The first feature of each answer, once it is there."""
    return [future.result(10).features_E[0].item() for future in futures]


def test_each_image_gets_its_own_answer() -> None:
    with running(HostModel()) as engine:
        futures = engine.submit([image(v) for v in range(1, 8)], Ask())

        assert firsts(futures) == list(range(1, 8))


def test_a_batch_closes_when_it_is_full() -> None:
    model = HostModel()
    with running(model, max_wait_s=LONG_S) as engine:
        futures = engine.submit([image(v) for v in (1, 2, 3, 4)], Ask())
        assert len([future.result(10) for future in futures]) == 4

    assert model.batches == [[1, 2, 3, 4]]


def test_a_batch_closes_when_the_oldest_has_waited_enough() -> None:
    model = HostModel()
    with running(model, max_wait_s=0.001) as engine:
        (future,) = engine.submit([image(1)], Ask())
        assert future.result(10).queue_s >= 0.001


def test_what_waits_goes_together_whoever_asked() -> None:
    model = HostModel()
    with running(model) as engine:
        let_go = hold(model, engine)
        futures = [engine.submit([image(v)], Ask(path=v))[0] for v in (1, 2, 3)]
        let_go()
        assert all(future.result(10) for future in futures)

    assert model.batches == [[99], [1, 2, 3]]


def test_a_full_queue_takes_all_images_of_a_request_or_none() -> None:
    model = HostModel()
    with running(model, queue_limit=3) as engine:
        let_go = hold(model, engine)
        kept = engine.submit([image(1), image(2)], Ask())
        with pytest.raises(QueueFullError):
            engine.submit([image(3), image(4)], Ask())
        kept += engine.submit([image(5)], Ask())
        let_go()
        assert all(future.result(10) for future in kept)

    assert model.batches == [[99], [1, 2, 5]]


def test_a_failing_batch_fails_alone_and_the_thread_lives() -> None:
    model = HostModel()
    with running(model) as engine:
        (bad,) = engine.submit([image(BAD)], Ask())
        with pytest.raises(EngineError):
            bad.result(10)
        (good,) = engine.submit([image(1)], Ask())

        assert good.result(10).features_E[0] == 1
        assert engine.alive


def test_an_image_whose_client_has_gone_is_not_computed() -> None:
    model = HostModel()
    with running(model) as engine:
        let_go = hold(model, engine)
        (gone,) = engine.submit([image(1)], Ask())
        (kept,) = engine.submit([image(2)], Ask())
        gone.cancel()
        let_go()
        kept.result(10)
        with pytest.raises(CancelledError):
            gone.result(10)

    assert model.batches == [[99], [2]]


def test_jobs_and_batches_take_turns_in_order() -> None:
    model, order = HostModel(), []
    with running(model, max_batch=1) as engine:
        let_go = hold(model, engine)
        jobs = [engine.run(lambda n=n: order.append((n, len(model.batches)))) for n in range(3)]  # type: ignore[misc]
        futures = engine.submit([image(v) for v in (1, 2, 3)], Ask())
        let_go()
        for future in futures:
            future.result(10)
        for job in jobs:
            job.result(10)

    assert [n for n, _ in order] == [0, 1, 2]
    assert [batches for _, batches in order] == [1, 2, 3]


def test_a_failing_job_tells_who_asked_and_the_thread_lives() -> None:
    with running(HostModel()) as engine:
        with pytest.raises(ZeroDivisionError):
            engine.run(lambda: 1 / 0).result(10)

        assert engine.run(lambda: 7).result(10) == 7


def test_everything_that_waits_is_answered_before_the_end() -> None:
    model = HostModel()
    with running(model, max_batch=2, max_wait_s=LONG_S) as engine:
        let_go = hold(model, engine, 98, 99)
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


@pytest.mark.parametrize("device", [False, True])
def test_an_idle_engine_proves_itself(device: bool) -> None:
    model = DeviceModel() if device else HostModel()
    with running(model, heartbeat_s=0.01) as engine:
        for _ in range(3):
            assert model.beats.acquire(timeout=10)
    assert engine.last_success_age_s() < 10


def test_an_engine_that_cannot_compute_is_not_fresh() -> None:
    model = DeadModel()
    with running(model, heartbeat_s=0.01) as engine:
        for _ in range(2):
            assert model.entered.acquire(timeout=10)
    assert engine.last_success_age_s() == float("inf")


def fly(model: DeviceModel, engine: Engine, count: int) -> list[Future[Answer]]:
    """Submit images 1..count, and see their first two batches in flight at once."""
    futures = engine.submit([image(v) for v in range(1, count + 1)], Ask())
    for _ in range(2):
        assert model.launched.acquire(timeout=10)
    return futures


def test_the_next_batch_is_launched_before_the_one_before_is_there() -> None:
    model = DeviceModel()
    with running(model, max_batch=2) as engine:
        futures = fly(model, engine, 4)
        assert not any(future.done() for future in futures)
        model.flights[1].finished.set()
        model.flights[0].finished.set()

        assert firsts(futures) == [1, 2, 3, 4]
    assert model.batches == [[1, 2], [3, 4]]


def test_a_batch_is_answered_while_the_next_one_is_in_flight() -> None:
    model = DeviceModel()
    with running(model, max_batch=2) as engine:
        futures = fly(model, engine, 4)
        model.flights[0].finished.set()

        assert firsts(futures[:2]) == [1, 2]
        assert not any(future.done() for future in futures[2:])


def test_no_more_than_two_batches_are_ever_in_flight() -> None:
    model = DeviceModel()
    with running(model, max_batch=1) as engine:
        futures = fly(model, engine, 4)
        assert model.waiting.acquire(timeout=10)  # for the first
        assert model.batches == [[1], [2]]
        for place in range(4):
            model.flights[place].finished.set()
            futures[place].result(10)
            assert len(model.flights) <= place + 3
            if place < 2:
                assert model.launched.acquire(timeout=10)

        assert firsts(futures) == [1, 2, 3, 4]


@pytest.mark.parametrize("fail_at_launch", [False, True])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_batch_that_fails_in_flight_fails_alone(place: int, fail_at_launch: bool) -> None:
    model = DeviceModel(fail_at_launch=fail_at_launch)
    model.finish_all()
    values = [BAD if n == place else n + 1 for n in range(3)]
    with running(model, max_batch=1) as engine:
        futures = engine.submit([image(value) for value in values], Ask())
        with pytest.raises(EngineError):
            futures.pop(place).result(10)

        assert firsts(futures) == [value for value in values if value != BAD]
        assert engine.alive


def test_a_job_waits_for_the_batch_in_flight() -> None:
    """Two jobs and two images wait: a round is a job and a batch, so the second job meets one."""
    model, begun, gate = DeviceModel(), threading.Event(), threading.Event()
    model.finish_all()

    def hold_thread() -> None:
        begun.set()
        gate.wait()

    with running(model, max_batch=1) as engine:
        engine.run(hold_thread)
        assert begun.wait(10)
        futures = engine.submit([image(1), image(2)], Ask())
        jobs = [engine.run(lambda: futures[0].done()) for _ in range(2)]
        gate.set()

        assert [job.result(10) for job in jobs] == [False, True]
        assert firsts(futures) == [1, 2]


def test_a_batch_that_is_there_is_answered_before_the_next_is_computed() -> None:
    model, gate = HostModel(), threading.Event()
    computed: list[int] = []
    with running(model, max_batch=1) as engine:
        engine.run(gate.wait)
        futures = engine.submit([image(v) for v in (1, 2, 3)], Ask())
        for future in futures:
            future.add_done_callback(lambda _: computed.append(len(model.batches)))
        gate.set()
        firsts(futures)

    assert computed == [1, 2, 3]


def test_batches_in_flight_are_answered_before_the_end() -> None:
    model = DeviceModel()
    with running(model, max_batch=2) as engine:
        futures = fly(model, engine, 5)
        stopper = threading.Thread(target=engine.stop)
        stopper.start()
        model.finish_all()
        stopper.join()

        assert [future.result(0).features_E[0].item() for future in futures] == [1, 2, 3, 4, 5]
        assert not engine.alive
