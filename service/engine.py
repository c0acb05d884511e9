"""One thread that owns the model: a queue of images, batches, and jobs between batches.

Nothing else may touch the model while the thread runs. An image waits until a batch is full or
the oldest image has waited `max_wait_s`. A job (load, unload, encode texts) runs between two
batches, in the order in which jobs came, one per round, so that neither starves the other.

Where a device computes by itself one batch is in flight: the next is launched before the answers of
the one before are waited for. Where a launched batch is there at once, as on a CPU, none is.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from medley.classifier import Ask, Launched, Routed
from medley.errors import MedleyError
from medley.routed import ZERO_SHOT
from service.errors import EngineError, QueueFullError, UnavailableError
from service.metrics import Metrics

__all__ = ["Answer", "Engine", "Launch"]

log = logging.getLogger(__name__)
T = TypeVar("T")


class Launch(Protocol):
    """What a batch goes through; `Classifier.launch` is the one."""

    def __call__(self, pixels_BCHW: Tensor, asks: Sequence[Ask]) -> Launched:
        """Start to decide and encode a batch of uint8 pixels."""


@dataclass(frozen=True)
class Answer:
    """What the model said of one image; tensors are on the host."""

    path: int
    features_E: Tensor
    scores: dict[int, float]  # DDAS score by path
    accepted: dict[int, bool]
    queue_s: float
    forward_s: float  # from its launch until its answers were there


@dataclass(frozen=True)
class _Item:
    pixels_CHW: Tensor
    ask: Ask
    submitted_s: float
    future: Future[Answer] = field(default_factory=Future)


@dataclass(frozen=True)
class _Flight:
    """A batch that has been launched, and who waits for it; nobody for a heartbeat's."""

    items: Sequence[_Item]
    launched: Launched
    start_s: float


@dataclass(frozen=True)
class _Job:
    run: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)


class Engine:
    """A worker thread with a bounded queue; every method may be called from any thread."""

    def __init__(
        self,
        launch: Launch,
        *,
        blank_CHW: Tensor,
        metrics: Metrics,
        max_batch: int,
        max_wait_s: float,
        queue_limit: int,
        heartbeat_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._launch_model = launch
        self._blank_CHW = blank_CHW
        self._metrics = metrics
        self._max_batch = max_batch
        self._max_wait_s = max_wait_s
        self._queue_limit = queue_limit
        self._heartbeat_s = heartbeat_s
        self._clock = clock
        self._changed = threading.Condition()
        self._items: deque[_Item] = deque()
        self._jobs: deque[_Job] = deque()
        self._flight: _Flight | None = None  # the engine's thread's own
        self._stopping = False
        self._last_success_s: float | None = None
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        metrics.queue_depth.set_function(lambda: len(self._items))
        metrics.queue_oldest_s.set_function(self.oldest_wait_s)
        metrics.last_forward_age_s.set_function(self.last_success_age_s)

    def start(self) -> None:
        """Start the thread; its first act is a forward that proves that it can."""
        self._thread.start()

    def stop(self) -> None:
        """Answer what waits, then end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, pixels: Sequence[Tensor], ask: Ask) -> list[Future[Answer]]:
        """Queue the images of one request, all or none.

        Raises:
            QueueFullError: not all of them find room.
            UnavailableError: the engine has stopped.
        """
        now_s = self._clock()
        items = [_Item(pixels_CHW, ask, now_s) for pixels_CHW in pixels]
        with self._changed:
            self._check_open()
            if len(self._items) + len(items) > self._queue_limit:
                raise QueueFullError(f"{len(self._items)} images wait, limit {self._queue_limit}")
            self._items.extend(items)
            self._changed.notify()
        return [item.future for item in items]

    def prove(self) -> Future[Answer]:
        """Send a blank image through, as zero-shot."""
        return self.submit([self._blank_CHW], Ask(ZERO_SHOT))[0]

    def run(self, job: Callable[[], T]) -> Future[T]:
        """Run `job` on the engine's thread between two batches; for changes of what is served."""
        return self._enqueue([job])[0]

    def run_all(self, jobs: Sequence[Callable[[], T]]) -> list[Future[T]]:
        """Queue the jobs of one request, all or none.

        Raises:
            QueueFullError: other jobs wait, and with these it would be too many.
            UnavailableError: the engine has stopped.
        """
        if self._jobs and len(self._jobs) + len(jobs) > self._queue_limit:
            raise QueueFullError(f"{len(self._jobs)} jobs wait, limit {self._queue_limit}")
        return self._enqueue(jobs)

    def _enqueue(self, jobs: Sequence[Callable[[], T]]) -> list[Future[T]]:
        queued = [_Job(job) for job in jobs]
        with self._changed:
            self._check_open()
            self._jobs.extend(queued)
            self._changed.notify()
        return [job.future for job in queued]

    def oldest_wait_s(self) -> float:
        """How long the oldest waiting image has waited; 0 if none waits."""
        with self._changed:
            return self._clock() - self._items[0].submitted_s if self._items else 0.0

    def last_success_age_s(self) -> float:
        """Time since the last forward that succeeded; infinite before the first."""
        last_s = self._last_success_s
        return float("inf") if last_s is None else self._clock() - last_s

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def _check_open(self) -> None:
        if self._stopping:
            raise UnavailableError("the server is shutting down", code="draining")

    def _loop(self) -> None:
        while True:
            with self._changed:
                wait_s = self._wait_s()
                while wait_s > 0:
                    self._changed.wait(wait_s)
                    wait_s = self._wait_s()
                ended = self._stopping and not self._items and not self._jobs
                job = self._jobs.popleft() if self._jobs else None
                batch = self._take_batch() if self._batch_wait_s() <= 0 else []
            if job is not None:
                self._settle()
                self._do(job)
            if batch:
                self._launch(batch)
            elif self._flight is not None:
                self._settle()
            elif ended:
                return
            elif job is None:
                self._beat()

    def _wait_s(self) -> float:
        """How long there is nothing to do: until a batch is due, or else a heartbeat."""
        if self._jobs or self._stopping or self._flight is not None:
            return 0.0
        if self._items:
            return self._batch_wait_s()
        return self._heartbeat_s - self.last_success_age_s()

    def _batch_wait_s(self) -> float:
        if not self._items:
            return float("inf")
        if len(self._items) >= self._max_batch or self._stopping:
            return 0.0
        return self._items[0].submitted_s + self._max_wait_s - self._clock()

    def _take_batch(self) -> list[_Item]:
        """Up to a full batch; an image whose client has given up is left out."""
        batch: list[_Item] = []
        while self._items and len(batch) < self._max_batch:
            item = self._items.popleft()
            if item.future.set_running_or_notify_cancel():
                batch.append(item)
        return batch

    def _launch(self, batch: Sequence[_Item]) -> None:
        """Launch a batch, then settle the one before, and this one too if it is there at once."""
        flight = self._launched(batch, [i.pixels_CHW for i in batch], [i.ask for i in batch])
        self._settle()
        self._flight = flight
        if flight is not None and flight.launched.ready:
            self._settle()

    def _launched(
        self, items: Sequence[_Item], pixels: list[Tensor], asks: list[Ask]
    ) -> _Flight | None:
        start_s = self._clock()
        try:
            return _Flight(items, self._launch_model(torch.stack(pixels), asks), start_s)
        except Exception as error:  # outermost loop of a worker: the batch fails, the thread lives
            self._fail(items, error)
            return None

    def _settle(self) -> bool:
        """Wait for the batch in flight, if there is one, and answer it; whether it succeeded."""
        flight, self._flight = self._flight, None
        if flight is None:
            return False
        try:
            routed = flight.launched.wait()
        except Exception as error:  # outermost loop of a worker: the batch fails, the thread lives
            self._fail(flight.items, error)
            return False
        self._last_success_s = self._clock()
        self._answer(flight, routed, self._last_success_s - flight.start_s)
        return True

    def _answer(self, flight: _Flight, routed: Routed, forward_s: float) -> None:
        if flight.items:
            self._observe(flight, routed, forward_s)
        for row, item in enumerate(flight.items):
            queue_s = flight.start_s - item.submitted_s
            item.future.set_result(_answer_of(routed, row, queue_s, forward_s))

    def _fail(self, items: Sequence[_Item], error: Exception) -> None:
        self._metrics.batch_failures.inc()
        log.error("a batch of %d images failed", len(items), exc_info=error)
        failure = EngineError("the batch failed")
        failure.__cause__ = error
        for item in items:
            item.future.set_exception(failure)

    def _beat(self) -> None:
        """Prove the engine with a blank image; wait for the next turn if it fails."""
        self._flight = self._launched([], [self._blank_CHW], [Ask(ZERO_SHOT)])
        if not self._settle():
            with self._changed:
                self._changed.wait_for(
                    lambda: bool(self._jobs or self._items or self._stopping), self._heartbeat_s
                )

    def _do(self, job: _Job) -> None:
        if not job.future.set_running_or_notify_cancel():
            return
        try:
            result = job.run()
        except MedleyError as error:
            job.future.set_exception(error)
        except Exception as error:  # outermost loop of a worker: the job fails, the thread lives
            self._metrics.batch_failures.inc()
            log.exception("a job failed")
            job.future.set_exception(error)
        else:
            job.future.set_result(result)

    def _observe(self, flight: _Flight, routed: Routed, forward_s: float) -> None:
        self._metrics.batch_images.observe(len(flight.items))
        self._metrics.batch_distinct_tasks.observe(len(set(routed.paths)))
        self._metrics.stage_duration_s.labels("forward").observe(forward_s)
        for item in flight.items:
            self._metrics.stage_duration_s.labels("queue").observe(
                flight.start_s - item.submitted_s
            )


def _answer_of(routed: Routed, row: int, queue_s: float, forward_s: float) -> Answer:
    scores, accepted = routed.scores_BT[row].tolist(), routed.accepted_BT[row].tolist()
    return Answer(
        path=routed.paths[row],
        features_E=routed.features_BE[row],
        scores=dict(zip(routed.tasks, scores, strict=True)),
        accepted=dict(zip(routed.tasks, accepted, strict=True)),
        queue_s=queue_s,
        forward_s=forward_s,
    )
