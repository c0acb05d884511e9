"""A candidate version beside the live one on a share of a task's images, until somebody decides.

As a shadow the candidate only computes; as a canary it answers. Either way both versions see the
same image, so what is counted is how often they agree: on the label among each version's own
classes, and on whether the image is theirs at all. A candidate that disagrees or fails more often
than it may is taken out by itself, and the record says why. What is desired stands in the registry;
the counts are this server's own and begin anew when it starts.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from medley.classifier import Ask, logits
from medley.errors import MedleyError
from service.answers.engine import Answer
from service.answers.planning import Plan
from service.errors import (
    DeadlineError,
    EngineError,
    OutOfMemoryError,
    QueueFullError,
    UnavailableError,
)
from service.signals.metrics import Metrics
from service.versions.live import Live, Resident, Snapshot
from service.wire.rollout_schemas import Rollout, RolloutRecord, read_record

__all__ = ["Rollouts", "Tally", "takes"]

log = logging.getLogger(__name__)
MAX_SHADOWS = 64  # requests whose shadows are still computed; beyond, images go without one

Result = Literal["same", "different", "error"]
Submit = Callable[[Sequence[Tensor], Sequence[Ask]], list[asyncio.Future[Answer]]]
Stop = Callable[[str, "RolloutRecord"], Awaitable[None]]  # task, what is to stand in the registry


def takes(rollout: Rollout, pixels_CHW: Tensor) -> bool:
    """Whether this image is in the share of a rollout.

    By its content, so that a picture is always answered by the same version, on every replica, and
    a larger share keeps the pictures of a smaller one.
    """
    seed = zlib.crc32(rollout.version.encode())
    return zlib.crc32(pixels_CHW.contiguous().numpy().data, seed) < rollout.share * 2**32


@dataclass
class Tally:
    """What was seen of one rollout on this server."""

    same: int = 0
    different: int = 0
    error: int = 0

    def add(self, result: Result) -> None:
        """Count one image."""
        setattr(self, result, getattr(self, result) + 1)

    def reason_to_stop(self, rollout: Rollout) -> str | None:
        """Why the rollout must not go on, if so."""
        compared = self.same + self.different
        if self.error > rollout.max_errors:
            return f"{self.error} images failed, {rollout.max_errors} may"
        if compared >= rollout.min_images and self.different > rollout.max_disagreement * compared:
            share = f"{rollout.max_disagreement:.1%}"
            return f"{self.different} of {compared} labels differ, {share} may"
        return None


@dataclass(frozen=True)
class _Trial:
    """A task's live version and its candidate, of one snapshot."""

    record: RolloutRecord
    live: Resident
    candidate: Resident

    @property
    def task(self) -> str:
        return self.live.record.task

    @property
    def rollout(self) -> Rollout:
        return self.record.rollout


@dataclass
class _Seen:
    id: str  # of the record
    tally: Tally = field(default_factory=Tally)
    stopping: bool = False


class Rollouts:
    """Runs candidates beside the live versions of a server. Belongs to the event loop.

    Args:
        live: what is served, and leases on it.
        metrics: counts what was seen.
        stop: writes a stopped rollout's record to the registry.
    """

    def __init__(self, live: Live, metrics: Metrics, *, stop: Stop) -> None:
        self._live = live
        self._metrics = metrics
        self._stop = stop
        self._seen: dict[str, _Seen] = {}
        self._running: set[asyncio.Task[None]] = set()

    def tally(self, task: str, record: RolloutRecord) -> Tally:
        """What was seen of this very rollout here."""
        seen = self._seen.get(task)
        return seen.tally if seen is not None and seen.id == record.id else Tally()

    async def close(self) -> None:
        """Let what still runs end."""
        await asyncio.gather(*self._running, return_exceptions=True)

    async def answers(self, pixels: Sequence[Tensor], plan: Plan, submit: Submit) -> list[Answer]:
        """Ask for the images of one request, and for some of them a candidate as well.

        Where the path is known beforehand both versions' rows go to the queue together, and meet in
        one batch; where DDAS decides, the candidate's row follows. A candidate never fails a
        request, and a shadow never delays one.

        Args:
            pixels: of the images.
            plan: of the request; its lease must last until this returns.
            submit: queues images, all or none, and gives their futures.

        Raises:
            QueueFullError, EngineError, DeadlineError: the live versions' rows could not be had.
        """
        trials = self._trials(plan, pixels, [plan.ask.path] * len(pixels))
        futures, beside = self._submit(pixels, plan, trials, submit)
        try:
            try:
                answers = await asyncio.gather(*futures)
            except EngineError as error:
                if not beside or isinstance(error, OutOfMemoryError):
                    raise
                await self._blame(trials, beside)
                futures, beside = submit(pixels, [plan.ask] * len(pixels)), {}
                answers = await asyncio.gather(*futures)
            if plan.ask.path is None:
                trials = self._trials(plan, pixels, [answer.path for answer in answers])
                beside = _submit_beside(pixels, trials, submit)
            for row, future in list(beside.items()):
                trial = trials[row]
                self._count_acceptance(trial, answers[row])
                if trial.rollout.mode == "shadow":
                    self._compare_later(trial, answers[row], beside.pop(row))
                else:
                    answers[row] = await self._compare(trial, answers[row], future)
            return answers
        finally:
            for future in (*futures, *beside.values()):
                future.cancel()

    def _trials(
        self, plan: Plan, pixels: Sequence[Tensor], paths: Sequence[int | None]
    ) -> dict[int, _Trial]:
        """The images, by row, that a live version with a candidate answers and the share takes."""
        if not plan.follows_live or not plan.snapshot.desired.rollouts:
            return {}
        trial_of = {path: self._trial(plan.snapshot, path) for path in set(paths)}
        found = ((row, trial_of[path]) for row, path in enumerate(paths))
        return {row: t for row, t in found if t is not None and takes(t.rollout, pixels[row])}

    def _trial(self, snapshot: Snapshot, path: int | None) -> _Trial | None:
        live = None if path is None else snapshot.by_path.get(path)
        text = None if live is None else snapshot.desired.rollouts.get(live.record.task)
        if live is None or text is None:
            return None
        record = read_record(text)
        candidate = snapshot.residents.get((live.record.task, record.rollout.version))
        if record.stopped is not None or candidate is None or candidate is live:
            return None
        return _Trial(record, live, candidate)

    def _submit(
        self,
        pixels: Sequence[Tensor],
        plan: Plan,
        trials: dict[int, _Trial],
        submit: Submit,
    ) -> tuple[list[asyncio.Future[Answer]], dict[int, asyncio.Future[Answer]]]:
        """Queue the images, with the rows of their trials if there is room for those."""
        asks = [plan.ask] * len(pixels)
        if not trials:
            return submit(pixels, asks), {}
        more = [pixels[row] for row in trials], [Ask(t.candidate.path) for t in trials.values()]
        try:
            futures = submit([*pixels, *more[0]], [*asks, *more[1]])
        except QueueFullError:
            return submit(pixels, asks), {}
        beside = dict(zip(trials, futures[len(pixels) :], strict=True))
        return futures[: len(pixels)], beside

    def _compare_later(self, trial: _Trial, answer: Answer, future: asyncio.Future[Answer]) -> None:
        """Compare when the candidate has answered, under a lease of its own."""
        key = (trial.task, trial.rollout.version)
        with ExitStack() as stack:
            snapshot = stack.enter_context(self._live.lease())
            if (
                len(self._running) >= MAX_SHADOWS
                or snapshot.residents.get(key) is not trial.candidate
            ):
                future.cancel()
                return
            task = asyncio.create_task(self._compare_under(stack.pop_all(), trial, answer, future))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _compare_under(
        self, lease: ExitStack, trial: _Trial, answer: Answer, future: asyncio.Future[Answer]
    ) -> None:
        with lease:
            await self._compare(trial, answer, future)

    async def _compare(
        self, trial: _Trial, answer: Answer, future: asyncio.Future[Answer]
    ) -> Answer:
        """Count whether the candidate agrees; its answer, or the live version's if it has none."""
        try:
            theirs = await future
        except (DeadlineError, OutOfMemoryError, UnavailableError):
            return answer  # not the candidate's fault
        except EngineError:
            self._saw(trial, "error")
            return answer
        if not theirs.features_E.isfinite().all():
            self._saw(trial, "error")
            return answer
        agree = _label(answer, trial.live) == _label(theirs, trial.candidate)
        self._saw(trial, "same" if agree else "different")
        return theirs

    async def _blame(
        self, trials: dict[int, _Trial], beside: dict[int, asyncio.Future[Answer]]
    ) -> None:
        """Count a failed batch against the candidates whose rows shared it."""
        await asyncio.gather(*beside.values(), return_exceptions=True)  # they have failed too
        for trial in trials.values():
            self._saw(trial, "error")

    def _saw(self, trial: _Trial, result: Result) -> None:
        rollout, task = trial.rollout, trial.task
        seen = self._seen.get(task)
        if seen is None or seen.id != trial.record.id:
            seen = self._seen[task] = _Seen(trial.record.id)
        seen.tally.add(result)
        self._metrics.rollout_images.labels(self._metrics.task_label(task), result).inc()
        reason = seen.tally.reason_to_stop(rollout)
        if reason is not None and not seen.stopping:
            seen.stopping = True
            log.warning("%s@%s is taken out: %s", task, rollout.version, reason)
            self._metrics.rollout_stops.labels(self._metrics.task_label(task)).inc()
            stopping = asyncio.create_task(
                self._stopped(seen, task, trial.record.model_copy(update={"stopped": reason}))
            )
            self._running.add(stopping)
            stopping.add_done_callback(self._running.discard)

    async def _stopped(self, seen: _Seen, task: str, record: RolloutRecord) -> None:
        try:
            await self._stop(task, record)
        except MedleyError as error:
            log.error("the rollout of %s could not be stopped: %s", task, error)
            seen.stopping = False  # the next image tries again

    def _count_acceptance(self, trial: _Trial, answer: Answer) -> None:
        """What both selectors say of an image, which one forward has told of all tasks."""
        ours = answer.accepted.get(trial.live.path, False)
        theirs = answer.accepted.get(trial.candidate.path, False)
        who = {(True, True): "both", (True, False): "live", (False, True): "candidate"}
        task = self._metrics.task_label(trial.task)
        self._metrics.rollout_acceptance.labels(task, who.get((ours, theirs), "none")).inc()


def _submit_beside(
    pixels: Sequence[Tensor], trials: dict[int, _Trial], submit: Submit
) -> dict[int, asyncio.Future[Answer]]:
    """Queue the candidates' rows alone; none if there is no room."""
    if not trials:
        return {}
    asks = [Ask(trial.candidate.path) for trial in trials.values()]
    try:
        return dict(zip(trials, submit([pixels[row] for row in trials], asks), strict=True))
    except QueueFullError:
        return {}


def _label(answer: Answer, resident: Resident) -> str:
    """The likeliest of a version's own classes; the scale of the logits does not matter here."""
    own = resident.own
    return own.names[int(logits(answer.features_E, own.features_CE, 1.0).argmax())].casefold()
