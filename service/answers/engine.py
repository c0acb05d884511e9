"""One thread that owns the model: a queue of images, batches, and jobs between batches.

Nothing else may touch the model while the thread runs. An image waits until a batch is full or
the oldest image has waited `max_wait_s`; lanes take turns (`queue.py`). One that is
cancelled or past its deadline gives its place up. A job (load, unload, encode texts) runs between
two batches, in the order in which jobs came, one per round, so that neither starves the other.

Where a device computes by itself one batch is in flight: the next is launched before the answers of
the one before are waited for. Where a launched batch is there at once, as on a CPU, none is.

A batch that finds no memory is tried again in halves, down to one image, with nothing beside it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from medley.classifier import Ask, Launched, Other, Routed
from medley.errors import MedleyError
from medley.routed import ZERO_SHOT
from service.answers.queue import FairQueue
from service.errors import (
    DeadlineError,
    EngineError,
    OutOfMemoryError,
    QueueFullError,
    UnavailableError,
)
from service.signals.metrics import Metrics

__all__ = ["Answer", "Engine", "Launch"]

log = logging.getLogger(__name__)
T = TypeVar("T")

STARVED = 3  # images in a row that find no memory even alone, before the process should end
MAX_RETRY_AFTER_S = 30
PACE_WEIGHT = 0.2  # of the latest batch
NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


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
    batch_images: int  # how many went together
    batch_rows: int  # the same, and the rows of their neighbours
    others: tuple[Other, ...] = ()  # neighbours that answer too, the nearest first


@dataclass(frozen=True, eq=False)
class _Item:
    pixels_CHW: Tensor
    ask: Ask
    lane: str
    submitted_s: float
    deadline_s: float
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
        self._queue: FairQueue[_Item] = FairQueue(queue_limit)
        self._jobs: deque[_Job] = deque()
        self._pace = _Pace()
        self._flight: _Flight | None = None  # this and the next are the engine's thread's own
        self._unfit: list[Sequence[_Item]] = []  # batches that found no memory
        self._starved = 0
        self._stopping = False
        self._last_success_s: float | None = None
        self._beat_due_s = float("-inf")
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        metrics.queue_depth.set_function(lambda: len(self._queue))
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

    def submit(
        self,
        pixels: Sequence[Tensor],
        ask: Ask | Sequence[Ask],
        *,
        lane: str = "",
        deadline_s: float | None = None,
    ) -> list[Future[Answer]]:
        """Queue the images of one request, all or none.

        A future that is cancelled before its batch is made gives its place up at once. One whose
        deadline passes before that ends with DeadlineError; one that finds no memory even alone,
        with OutOfMemoryError; one whose batch fails, with EngineError.

        Args:
            pixels: uint8, one image each.
            ask: for all of them, or one for each.
            lane: with whom they share their turn; lanes take turns, image by image.
            deadline_s: `time.monotonic()` (the engine's clock) from which on nobody wants them.

        Raises:
            QueueFullError: not all of them find room; see `FairQueue` for what a lane may take.
            UnavailableError: the engine has stopped.
            ValueError: there are more or fewer asks than images.
        """
        asks = [ask] * len(pixels) if isinstance(ask, Ask) else ask
        end_s = math.inf if deadline_s is None else deadline_s
        with self._changed:
            self._check_open()
            now_s = self._clock()
            items = [
                _Item(pixels_CHW, ask, lane, now_s, end_s)
                for pixels_CHW, ask in zip(pixels, asks, strict=True)
            ]
            late = self._queue.expire(now_s)
            found_room, waiting = self._queue.put(items), len(self._queue)
            self._changed.notify()
        _end_late(late)
        if not found_room:
            raise QueueFullError(
                f"{waiting} images wait, limit {self._queue_limit}",
                retry_after_s=self._pace.retry_after_s(waiting),
            )
        for item in items:
            item.future.add_done_callback(self._leave)
        return [item.future for item in items]

    def _leave(self, future: Future[Answer]) -> None:
        """Free the place of an image that nobody waits for; called in whoever cancels."""
        if future.cancelled():
            with self._changed:
                self._queue.remove(future)

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
            return self._clock() - self._queue.oldest_s if self._queue else 0.0

    def last_success_age_s(self) -> float:
        """Time since the last forward that succeeded; infinite before the first."""
        last_s = self._last_success_s
        return float("inf") if last_s is None else self._clock() - last_s

    @property
    def alive(self) -> bool:
        """Whether the thread runs and finds memory; if not, the process had better start anew."""
        return self._thread.is_alive() and self._starved < STARVED

    def _check_open(self) -> None:
        if self._stopping:
            raise UnavailableError("the server is shutting down", code="draining")

    def _loop(self) -> None:
        while self._turn():
            pass  # a turn keeps nothing: its images go with it

    def _turn(self) -> bool:
        """Wait until something is due and do it; whether there may be more to do."""
        with self._changed:
            while (wait_s := self._due_s() - self._clock()) > 0:
                self._changed.wait(wait_s)
            late = self._queue.expire(self._clock())
            ended = self._stopping and not self._queue and not self._jobs
            job = self._jobs.popleft() if self._jobs else None
            batch = self._take_batch() if self._batch_due_s() <= self._clock() else []
        _end_late(late)
        if job is not None:
            self._settle()
            self._do(job)
        if batch:
            self._launch(batch)
        elif self._flight is not None:
            self._settle()
        elif ended:
            return False
        elif job is None and self._beat_due_s <= self._clock():
            self._beat()
        self._retry()
        return True

    def _due_s(self) -> float:
        """When there is something to do: a batch, an end of waiting, or else a heartbeat."""
        if self._jobs or self._stopping or self._flight is not None:
            return float("-inf")
        idle_s = float("inf") if self._queue else self._beat_due_s
        return min(self._batch_due_s(), self._queue.expiry_s, idle_s)

    def _batch_due_s(self) -> float:
        if len(self._queue) >= self._max_batch or self._stopping:
            return float("-inf")
        return self._queue.oldest_s + self._max_wait_s

    def _take_batch(self) -> list[_Item]:
        """Up to a full batch; an image whose client has given up this moment is left out."""
        batch: list[_Item] = []
        while len(batch) < self._max_batch and (item := self._queue.pop()):
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

    def _settle(self) -> None:
        """Wait for the batch in flight, if there is one, and answer it."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        try:
            routed = flight.launched.wait()
        except Exception as error:  # outermost loop of a worker: the batch fails, the thread lives
            self._fail(flight.items, error)
            return
        self._last_success_s = now_s = self._clock()
        self._beat_due_s = now_s + self._heartbeat_s
        self._starved = 0
        self._answer(flight, routed, now_s)

    def _answer(self, flight: _Flight, routed: Routed, now_s: float) -> None:
        forward_s = now_s - flight.start_s
        if flight.items:
            self._pace.note(len(flight.items), flight.start_s, now_s)
            self._observe(flight, routed, forward_s)
        for row, item in enumerate(flight.items):
            queue_s = flight.start_s - item.submitted_s
            item.future.set_result(_answer_of(routed, row, queue_s, forward_s))

    def _fail(self, items: Sequence[_Item], error: Exception) -> None:
        """End a batch that failed; one that found no memory is kept for another try."""
        if _is_out_of_memory(error):
            self._note_no_memory(f"a batch of {len(items)} images", error)
            if items:
                self._unfit.append(items)
            else:
                self._starved += 1
            return
        self._metrics.batch_failures.inc()
        log.error("a batch of %d images failed", len(items), exc_info=error)
        for item in items:
            failure = EngineError("the batch failed")
            failure.__cause__ = error
            item.future.set_exception(failure)

    def _retry(self) -> None:
        """Compute in parts what found no memory, once nothing else is in flight."""
        if self._unfit:
            self._settle()
        batches, self._unfit = self._unfit, []
        for items in batches:
            self._compute_in_parts(items)

    def _compute_in_parts(self, items: Sequence[_Item]) -> None:
        """Compute halves one after the other; one image is tried once more, now alone."""
        for part in _halves(items):
            self._launch(part)
            self._settle()
            if not self._unfit:
                continue
            self._unfit.clear()
            if len(part) > 1:
                self._compute_in_parts(part)
            else:
                self._starved += 1
                part[0].future.set_exception(OutOfMemoryError("no memory for this image alone"))

    def _note_no_memory(self, who: str, error: Exception) -> None:
        """Count and log; the error itself is not kept, as its frames hold the batch's tensors."""
        self._metrics.out_of_memory.inc()
        log.warning("%s found no memory: %s", who, str(error).partition("\n")[0])

    def _beat(self) -> None:
        """Prove the engine with a blank image; if it fails, the next time is as far away."""
        self._beat_due_s = self._clock() + self._heartbeat_s
        self._flight = self._launched([], [self._blank_CHW], [Ask(ZERO_SHOT)])
        self._settle()

    def _do(self, job: _Job) -> None:
        if not job.future.set_running_or_notify_cancel():
            return
        try:
            result = job.run()
        except MedleyError as error:
            job.future.set_exception(error)
        except Exception as error:  # outermost loop of a worker: the job fails, the thread lives
            job.future.set_exception(self._job_failure(error))
        else:
            job.future.set_result(result)

    def _job_failure(self, error: Exception) -> Exception:
        if _is_out_of_memory(error):
            self._note_no_memory("a job", error)
            return OutOfMemoryError("no memory for this now")
        self._metrics.batch_failures.inc()
        log.error("a job failed", exc_info=error)
        return error

    def _observe(self, flight: _Flight, routed: Routed, forward_s: float) -> None:
        self._metrics.batch_images.observe(len(flight.items))
        beside = [other.path for others in routed.others for other in others]
        self._metrics.batch_distinct_tasks.observe(len({*routed.paths, *beside}))
        self._metrics.neighbour_rows.inc(len(beside))
        self._metrics.stage_duration_s.labels("forward").observe(forward_s)
        for item in flight.items:
            self._metrics.stage_duration_s.labels("queue").observe(
                flight.start_s - item.submitted_s
            )


class _Pace:
    """How long an image has taken lately, while there were images."""

    def __init__(self) -> None:
        self._image_s: float | None = None
        self._last_end_s = float("-inf")

    def note(self, images: int, start_s: float, end_s: float) -> None:
        """Add a batch; what it shared with the one before counts once."""
        image_s = (end_s - max(start_s, self._last_end_s)) / images
        before_s = image_s if self._image_s is None else self._image_s
        self._image_s = before_s + PACE_WEIGHT * (image_s - before_s)
        self._last_end_s = end_s

    def retry_after_s(self, waiting: int) -> int:
        """When so many will have been answered, in whole seconds for a Retry-After header."""
        return min(max(1, math.ceil((self._image_s or 0.0) * waiting)), MAX_RETRY_AFTER_S)


def _halves(items: Sequence[_Item]) -> list[Sequence[_Item]]:
    """Both halves, or the one that there is."""
    middle = (len(items) + 1) // 2
    return [half for half in (items[:middle], items[middle:]) if half]


def _end_late(late: Sequence[_Item]) -> None:
    """Answer images that were taken out of the queue since nobody waits for them any more."""
    for item in late:
        if item.future.set_running_or_notify_cancel():
            item.future.set_exception(DeadlineError("the deadline passed while the image waited"))


def _is_out_of_memory(error: Exception) -> bool:
    """Whether it is that; on a CPU, and for pinned memory, torch says so in words only."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY)


def _answer_of(routed: Routed, row: int, queue_s: float, forward_s: float) -> Answer:
    scores, accepted = routed.scores_BT[row].tolist(), routed.accepted_BT[row].tolist()
    return Answer(
        path=routed.paths[row],
        features_E=routed.features_BE[row],
        scores=dict(zip(routed.tasks, scores, strict=True)),
        accepted=dict(zip(routed.tasks, accepted, strict=True)),
        queue_s=queue_s,
        forward_s=forward_s,
        batch_images=len(routed.paths),
        batch_rows=len(routed.paths) + sum(map(len, routed.others)),
        others=routed.others[row],
    )
