"""The engine's thread, with plain functions as its model: batches, jobs, failures, the end."""

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, zip_longest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medley.classifier import Ask, Launched
from service.answers.engine import Answer, Engine, Launch
from service.errors import (
    DeadlineError,
    EngineError,
    OutOfMemoryError,
    QueueFullError,
    UnavailableError,
)
from service.signals.metrics import Metrics
from tests.service.models import (
    BAD,
    CrampedModel,
    DeadModel,
    DeviceModel,
    HostModel,
    ask_too_much,
)

BLANK = torch.zeros(3, 2, 2, dtype=torch.uint8)
LONG_S = 3600.0


@dataclass
class Clock:
    """Time that passes when it is told to."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@contextmanager
def running(
    model: HostModel | DeviceModel | DeadModel | CrampedModel,
    *,
    launch: Launch | None = None,
    metrics: Metrics | None = None,
    max_batch: int = 4,
    max_wait_s: float = 0.0,
    queue_limit: int = 8,
    heartbeat_s: float = LONG_S,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Engine]:
    engine = Engine(
        launch or model.launch,
        blank_CHW=BLANK,
        metrics=metrics or Metrics(),
        max_batch=max_batch,
        max_wait_s=max_wait_s,
        queue_limit=queue_limit,
        heartbeat_s=heartbeat_s,
        clock=clock,
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


def ask_all(engine: Engine, values: Sequence[int], lane: str = "") -> list[Future[Answer]]:
    return engine.submit([image(value) for value in values], Ask(), lane=lane)


def turn(engine: Engine) -> None:
    """Let the engine see the time, and finish the turn in which it did."""
    for _ in range(2):
        engine.run(lambda: None).result(10)


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
        with pytest.raises(QueueFullError) as full:
            engine.submit([image(3), image(4)], Ask())
        assert full.value.retry_after_s == 1  # no batch has been timed yet
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


def test_lanes_take_turns_within_a_batch_and_keep_their_own_order() -> None:
    model = HostModel()
    with running(model, max_batch=4, queue_limit=16) as engine:
        let_go = hold(model, engine)
        futures = ask_all(engine, [1, 2, 3, 4, 5], "many")
        futures += ask_all(engine, [11, 12], "few") + ask_all(engine, [21], "one")
        let_go()
        firsts(futures)

    assert model.batches == [[99], [1, 11, 21, 2], [12, 3, 4, 5]]


def test_each_image_of_a_request_may_be_asked_for_something_else() -> None:
    asked: list[Ask] = []

    def launch(pixels_BCHW: Tensor, asks: Sequence[Ask]) -> Launched:
        asked.extend(asks)
        return model.launch(pixels_BCHW, asks)

    model = HostModel()
    with running(model, launch=launch) as engine:
        firsts(engine.submit([image(1), image(2)], [Ask(path=5), Ask(path=6)]))
        with pytest.raises(ValueError, match="shorter"):
            engine.submit([image(1), image(2)], [Ask()])

    assert asked[-2:] == [Ask(path=5), Ask(path=6)]


def test_an_answer_says_how_many_went_together() -> None:
    with running(HostModel(), max_wait_s=LONG_S) as engine:
        futures = ask_all(engine, [1, 2, 3, 4])

        assert [future.result(10).batch_images for future in futures] == [4] * 4


def test_a_cancelled_image_gives_its_place_up_at_once() -> None:
    model = HostModel()
    with running(model, queue_limit=3) as engine:
        let_go = hold(model, engine)
        gone = ask_all(engine, [1, 2, 3])
        with pytest.raises(QueueFullError):
            ask_all(engine, [4])
        gone[1].cancel()
        kept = ask_all(engine, [4])
        let_go()

        assert firsts([gone[0], gone[2], *kept]) == [1, 3, 4]


def test_the_oldest_wait_is_that_of_an_image_that_somebody_waits_for() -> None:
    model, clock, metrics = HostModel(), Clock(), Metrics()
    with running(model, clock=clock, metrics=metrics) as engine:
        let_go = hold(model, engine)
        (gone,) = ask_all(engine, [1])
        clock.now_s = 3.0
        (kept,) = ask_all(engine, [2])
        clock.now_s = 5.0
        assert engine.oldest_wait_s() == 5.0
        gone.cancel()
        assert engine.oldest_wait_s() == 2.0
        assert metrics.registry.get_sample_value("medley_queue_depth") == 1
        kept.cancel()
        assert engine.oldest_wait_s() == 0.0
        let_go()


def test_a_batch_is_due_by_its_oldest_living_image() -> None:
    model, clock = HostModel(), Clock()
    with running(model, clock=clock, max_wait_s=10.0) as engine:
        (gone,) = ask_all(engine, [1])
        clock.now_s = 6.0
        (kept,) = ask_all(engine, [2])
        gone.cancel()
        clock.now_s = 15.0
        turn(engine)
        assert model.batches == []
        clock.now_s = 16.0
        turn(engine)

        assert firsts([kept]) == [2]


def test_an_image_past_its_deadline_is_not_computed() -> None:
    model, clock = HostModel(), Clock()
    with running(model, clock=clock) as engine:
        let_go = hold(model, engine)
        (late,) = engine.submit([image(1)], Ask(), deadline_s=2.0)
        (kept,) = engine.submit([image(2)], Ask(), deadline_s=2.5)
        clock.now_s = 2.0
        let_go()
        with pytest.raises(DeadlineError):
            late.result(10)

        assert firsts([kept]) == [2]
    assert model.batches == [[99], [2]]


def test_images_past_their_deadline_give_their_places_up_while_the_model_computes() -> None:
    model, clock = HostModel(), Clock()
    with running(model, clock=clock, queue_limit=4) as engine:
        let_go = hold(model, engine)
        late = engine.submit([image(v) for v in (1, 2, 3, 4)], Ask(), deadline_s=1.0)
        with pytest.raises(QueueFullError):
            ask_all(engine, [5], "other")
        clock.now_s = 1.0
        kept = ask_all(engine, [5, 6, 7, 8], "other")
        assert all(isinstance(future.exception(0), DeadlineError) for future in late)
        let_go()

        assert firsts(kept) == [5, 6, 7, 8]


def test_a_deadline_ends_the_wait_for_company() -> None:
    with running(HostModel(), max_wait_s=LONG_S) as engine:
        (late,) = engine.submit([image(1)], Ask(), deadline_s=time.monotonic() + 0.01)
        with pytest.raises(DeadlineError):
            late.result(10)


def test_a_busy_lane_leaves_the_last_eighth_to_another() -> None:
    model = HostModel()
    with running(model, queue_limit=16) as engine:
        let_go = hold(model, engine)
        kept = ask_all(engine, range(1, 15), "busy")
        with pytest.raises(QueueFullError):
            ask_all(engine, [15], "busy")
        kept += ask_all(engine, [16, 17], "other")
        let_go()

        assert firsts(kept) == [*range(1, 15), 16, 17]


@pytest.mark.parametrize(("image_s", "told_s"), [(0.01, 1), (2.0, 16), (100.0, 30)])
def test_who_finds_the_queue_full_is_told_when_it_will_have_gone(
    image_s: float, told_s: int
) -> None:
    model, clock = HostModel(), Clock()

    def launch(pixels_BCHW: Tensor, asks: Sequence[Ask]) -> Launched:
        clock.now_s += image_s * len(asks)
        return model.launch(pixels_BCHW, asks)

    with running(model, launch=launch, clock=clock, heartbeat_s=1e6) as engine:
        firsts(ask_all(engine, [1, 2]))
        model.entered.acquire()
        let_go = hold(model, engine)
        ask_all(engine, range(1, 9))
        with pytest.raises(QueueFullError) as full:
            ask_all(engine, [9])
        let_go()

    assert full.value.retry_after_s == told_s


def test_time_that_two_batches_share_counts_once_for_the_pace() -> None:
    model, clock = DeviceModel(), Clock()
    with running(model, clock=clock, max_batch=2, heartbeat_s=1e6) as engine:
        futures = fly(model, engine, 4)
        for place in range(2):
            clock.now_s += 4.0
            model.flights[place].finished.set()
            firsts(futures[2 * place : 2 * place + 2])
        fly(model, engine, 4)
        ask_all(engine, range(1, 9))
        with pytest.raises(QueueFullError) as full:
            ask_all(engine, [9])
        model.finish_all()

    assert full.value.retry_after_s == 16


def test_an_image_that_is_late_costs_no_forward_at_all() -> None:
    model = HostModel()
    with running(model) as engine:
        assert model.beats.acquire(timeout=10)
        (late,) = engine.submit([image(1)], Ask(), deadline_s=time.monotonic())
        with pytest.raises(DeadlineError):
            late.result(10)
        turn(engine)

        assert not model.beats.acquire(blocking=False)


def test_an_image_cancelled_in_the_moment_it_is_found_late_harms_nobody() -> None:
    """A request reads the clock under the lock, so the canceller is too late to take it out."""
    model, clock = HostModel(), Clock()

    def now_s() -> float:
        if threading.current_thread() is canceller_of:
            clock.now_s = 5.0
            canceller.start()
            while not gone.cancelled():
                time.sleep(0)
        return clock.now_s

    canceller_of: threading.Thread | None = None
    with running(model, clock=now_s) as engine:
        let_go = hold(model, engine)
        (gone,) = engine.submit([image(1)], Ask(), deadline_s=5.0)
        canceller = threading.Thread(target=gone.cancel)
        canceller_of = threading.current_thread()
        kept = ask_all(engine, [2])
        canceller_of = None
        canceller.join()
        let_go()

        assert end_of(gone) is CancelledError
        assert firsts(kept) == [2]


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["kept", "gone", "late"])), max_size=40
    )
)
@settings(deadline=None, max_examples=60)
def test_every_image_ends_once_and_as_it_should(images: list[tuple[str, str]]) -> None:
    """Its own answer, or cancelled, or late; the model sees what is kept, lane by lane in turn."""
    model, clock = HostModel(), Clock()
    lines: dict[str, list[int]] = {}
    with running(model, clock=clock, queue_limit=64, max_batch=8) as engine:
        let_go = hold(model, engine, 255)
        futures = []
        for value, (lane, fate) in enumerate(images, start=100):
            end_s = 1.0 if fate == "late" else None
            futures += engine.submit([image(value)], Ask(), lane=lane, deadline_s=end_s)
        clock.now_s = 1.0
        for value, (future, (lane, fate)) in enumerate(zip(futures, images, strict=True), 100):
            if fate == "gone":
                future.cancel()
            elif fate == "kept":
                lines.setdefault(lane, []).append(value)
        let_go()
        ends = [end_of(future) for future in futures]

    wanted = {"gone": CancelledError, "late": DeadlineError}
    assert ends == [wanted.get(fate, value) for value, (_, fate) in enumerate(images, 100)]
    computed = list(chain.from_iterable(model.batches[1:]))
    assert sorted(computed) == sorted(chain.from_iterable(lines.values()))
    assert {lane: [v for v in computed if v in line] for lane, line in lines.items()} == lines
    assert {frozenset(turns) for turns in rounds(computed, images)} == {
        frozenset(set(row) - {None}) for row in zip_longest(*lines.values())
    }


def rounds(computed: list[int], images: list[tuple[str, str]]) -> Iterator[list[int]]:
    """Cut what was computed where a lane comes again."""
    turns: list[int] = []
    lanes: set[str] = set()
    for value in computed:
        lane = images[value - 100][0]
        if lane in lanes:
            yield turns
            turns, lanes = [], set()
        turns.append(value)
        lanes.add(lane)
    if turns:
        yield turns


def end_of(future: Future[Answer]) -> object:
    """The image that was answered, or the class of what it ended with."""
    try:
        return int(future.result(10).features_E[0].item())
    except (CancelledError, DeadlineError, OutOfMemoryError) as error:
        return type(error)


def test_many_threads_that_come_and_go_lose_nothing() -> None:
    model, ends = HostModel(), dict[int, object]()

    def client(first: int) -> None:
        for value in range(first, first + 50):
            (future,) = engine.submit([image(value)], Ask(), lane=str(first))
            if value % 3 == 0:
                future.cancel()
            ends[value] = end_of(future)

    with running(model, max_batch=2) as engine:
        clients = [threading.Thread(target=client, args=(first,)) for first in (1, 70, 140)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        assert len(engine._queue) == 0

    assert len(ends) == 150
    assert all(end in (value, CancelledError) for value, end in ends.items())
    assert all(ends[value] == value for value in ends if value % 3)


def test_the_pixels_of_an_answered_image_are_let_go_at_once() -> None:
    with running(HostModel()) as engine:
        pixels_CHW = image(1)
        gone = weakref.ref(pixels_CHW)
        gc.disable()
        try:
            (future,) = engine.submit([pixels_CHW], Ask(), deadline_s=time.monotonic() + LONG_S)
            future.result(10)
            del pixels_CHW
            turn(engine)

            assert gone() is None
        finally:
            gc.enable()


@given(
    st.lists(st.sampled_from(range(1, 5)), max_size=24),
    st.integers(1, 8),
    st.sampled_from([1, 2, 4, 8]),
    st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_no_image_is_lost_to_the_memory_that_another_one_takes(
    kinds: list[int], fits: int, max_batch: int, late: bool
) -> None:
    """One in four kinds is heavy; whatever fits alone is answered once, whoever it came with."""
    values = list(range(1, len(kinds) + 1))
    heavy = {value for value, kind in zip(values, kinds, strict=True) if kind == 4}
    model, gate = CrampedModel(fits=fits, heavy=heavy, late=late), threading.Event()
    with running(model, max_batch=max_batch, queue_limit=32) as engine:
        engine.run(gate.wait)
        futures = ask_all(engine, values)
        gate.set()
        ends = [end_of(future) for future in futures]

    assert ends == [OutOfMemoryError if value in heavy else value for value in values]
    assert sorted(v for v in model.computed if v) == [v for v in values if v not in heavy]
    assert model.used == 0


def test_a_batch_is_halved_until_it_fits_and_each_time_is_counted() -> None:
    metrics = Metrics()
    with running(CrampedModel(fits=2), max_wait_s=LONG_S, max_batch=8, metrics=metrics) as engine:
        answers = [future.result(10) for future in ask_all(engine, range(1, 9))]

    assert [answer.batch_images for answer in answers] == [2] * 8
    assert metrics.registry.get_sample_value("medley_out_of_memory_total") == 3  # 8, 4 and 4
    assert metrics.registry.get_sample_value("medley_batch_failures_total") == 0


def test_what_a_batch_could_not_allocate_is_not_held_while_it_is_tried_again() -> None:
    """The error's frames would hold the tensors that there was no room for."""
    model, seen = CrampedModel(fits=1), list[weakref.ref[Tensor]]()
    held: list[bool] = []

    def launch(pixels_BCHW: Tensor, asks: Sequence[Ask]) -> Launched:
        held.extend(ref() is not None for ref in seen)
        seen[:] = [weakref.ref(pixels_BCHW)] if len(asks) > 1 else []
        return model.launch(pixels_BCHW, asks)

    with running(model, launch=launch, max_wait_s=LONG_S, max_batch=2) as engine:
        firsts(ask_all(engine, [1, 2]))

    assert held == [False]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_memory_is_known_to_be_short_by_any_name(error: Exception) -> None:
    def launch(pixels_BCHW: Tensor, asks: Sequence[Ask]) -> Launched:
        if len(asks) > 1:
            raise error
        return model.launch(pixels_BCHW, asks)

    model = HostModel()
    with running(model, launch=launch, max_wait_s=LONG_S) as engine:
        assert firsts(ask_all(engine, [1, 2, 3, 4])) == [1, 2, 3, 4]


def test_an_engine_without_memory_is_dead_after_three_images_until_one_fits() -> None:
    with running(CrampedModel(fits=4, heavy=[1, 2, 3])) as engine:
        for value in (1, 2):
            assert end_of(*ask_all(engine, [value])) is OutOfMemoryError
        firsts(ask_all(engine, [9]))
        for value in (1, 2):
            assert end_of(*ask_all(engine, [value])) is OutOfMemoryError
            assert engine.alive
        assert end_of(*ask_all(engine, [3])) is OutOfMemoryError
        assert not engine.alive
        firsts(ask_all(engine, [9]))
        assert engine.alive


def test_an_idle_engine_without_memory_is_found_dead() -> None:
    beats = threading.Semaphore(0)

    def launch(pixels_BCHW: Tensor, asks: Sequence[Ask]) -> Launched:
        beats.release()
        return model.launch(pixels_BCHW, asks)

    model = CrampedModel(fits=0)
    with running(model, launch=launch, heartbeat_s=0.001) as engine:
        for _ in range(4):
            assert beats.acquire(timeout=10)
        assert not engine.alive
        assert engine.last_success_age_s() == float("inf")


def test_a_job_without_memory_says_so_and_the_thread_lives() -> None:
    with running(HostModel()) as engine:
        with pytest.raises(OutOfMemoryError):
            engine.run(ask_too_much).result(10)

        assert engine.run(lambda: 7).result(10) == 7
        assert engine.alive
