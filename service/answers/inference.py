"""Images to answers, for every route: fetch, decode, queue, forward, and what a route makes of it.

What became of each image is told to the signals here and nowhere else. Knows nothing of labels or
of HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from medley.classifier import Ask
from medley.errors import ImageError
from service.answers.engine import Answer, Engine
from service.answers.planning import Plan, make_plan
from service.answers.rollouts import Rollouts
from service.errors import DeadlineError, FetchError, QueueFullError
from service.intake.call import Call
from service.intake.decoding import Decoding
from service.intake.fetch import Fetching
from service.intake.forms import ImageSource, Url
from service.intake.room import Room
from service.signals.notes import noted
from service.signals.signals import Became, Signals
from service.versions.residency import Residency

__all__ = ["Inference", "Outcome"]

T = TypeVar("T")
Head = Callable[[Answer], Awaitable[T]]


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What a route's head made of each image, in their order, and how long the stages took."""

    results: list[T | ImageError]
    stages_s: dict[str, float]  # decode, queue, forward, head

    def raise_alone(self) -> None:
        """Let the error of an only image be the request's.

        Raises:
            ImageError: that one.
        """
        if len(self.results) == 1 and isinstance(self.results[0], ImageError):
            raise self.results[0]


class Inference:
    """What all routes share between an image's bytes and its answer."""

    def __init__(
        self,
        *,
        engine: Engine,
        residency: Residency,
        decoding: Decoding,
        fetching: Fetching | None,
        room: Room,
        rollouts: Rollouts,
        signals: Signals,
    ) -> None:
        """Take the parts.

        Args:
            engine: owns the model.
            residency: what is served, and what can be brought.
            decoding: files to pixels.
            fetching: URLs to files; without it they are refused.
            room: for images that have been taken in and are not yet answered.
            rollouts: candidates that are tried beside live versions.
            signals: hear what became of them.
        """
        self._engine = engine
        self._residency = residency
        self._decoding = decoding
        self._fetching = fetching
        self._room = room
        self._rollouts = rollouts
        self._signals = signals

    @asynccontextmanager
    async def planned(
        self,
        model: str,
        call: Call,
        *,
        labels: tuple[str, ...] | None = None,
        nearest: int = 0,
    ) -> AsyncIterator[Plan]:
        """Decide what to ask, and keep what is asked loaded until the `with` block ends.

        A version that is not on the device is brought there first.

        Raises:
            NotFoundError, UnavailableError, CapacityError: the model cannot be had.
            DeadlineError: it cannot be had in time.
        """
        key = self._residency.live.snapshot.key_of(model)
        async with AsyncExitStack() as stack:
            async with call.in_time():
                lease = self._residency.lease(key, holder=call.request_id)
                snapshot = await stack.enter_async_context(lease)
            noted().generation = snapshot.desired.generation
            yield make_plan(snapshot, model, labels, nearest=nearest)

    async def run(
        self, images: Sequence[ImageSource], plan: Plan, call: Call, head: Head[T]
    ) -> Outcome[T]:
        """Answer the images of one request.

        A bad image fails alone: its error stands where its result would. Everything else that goes
        wrong fails the request. Cancelling this leaves nothing behind that waits.

        Args:
            images: at least one.
            plan: what to ask for each of them; its lease must last until this returns.
            call: whose request it is; at its deadline everything here is cancelled.
            head: makes a result of an answer; runs on the event loop.

        Raises:
            DeadlineError: the deadline passed.
            QueueFullError, BusyError: too many images wait, or are being answered.
            EngineError: the batch failed.
        """
        try:
            with self._room.share() as take:
                take(len(images))
                async with call.in_time():
                    return await self._run(images, plan, call, head)
        except (Exception, asyncio.CancelledError) as error:  # counted and passed on
            self._signals.failed(plan, _became(error), images=len(images))
            raise

    async def _run(
        self, images: Sequence[ImageSource], plan: Plan, call: Call, head: Head[T]
    ) -> Outcome[T]:
        stages_s: dict[str, float] = {}
        with self._signals.stage("decode", stages_s):
            pixels = await asyncio.gather(*[self._pixels(image) for image in images])
        answers = await self._ask([p for p in pixels if isinstance(p, Tensor)], plan, call)
        self._signals.computed(answers, stages_s)
        with self._signals.stage("head", stages_s):
            made = iter([await head(answer) for answer in answers])
        results = [p if isinstance(p, ImageError) else next(made) for p in pixels]
        answered = (i for i, p in zip(images, pixels, strict=True) if isinstance(p, Tensor))
        for image, answer in zip(answered, answers, strict=True):
            self._signals.answered(answer, plan, image)
        for error in (p for p in pixels if isinstance(p, ImageError)):
            self._signals.refused(error, plan, alone=len(images) == 1)
        return Outcome(results, stages_s)

    async def _pixels(self, image: ImageSource) -> Tensor | ImageError:
        try:
            if not isinstance(image, Url):
                return await self._decoding.pixels(image)
            if self._fetching is None:
                raise FetchError("this server fetches no URLs", code="url_refused")
            start_s = time.monotonic()
            async with self._fetching.image(image.text) as data:
                self._signals.fetched(time.monotonic() - start_s)
                return await self._decoding.pixels(data)
        except ImageError as error:
            return error

    async def _ask(self, pixels: Sequence[Tensor], plan: Plan, call: Call) -> list[Answer]:
        """Whatever ends this, no image of it is left in the queue but those of a shadow."""

        def submit(pixels: Sequence[Tensor], asks: Sequence[Ask]) -> list[asyncio.Future[Answer]]:
            queued = self._engine.submit(pixels, asks, lane=plan.lane, deadline_s=call.deadline_s)
            return [asyncio.wrap_future(future) for future in queued]

        return await self._rollouts.answers(pixels, plan, submit)


def _became(error: BaseException) -> Became:
    """What an error that ended a whole request makes of its images."""
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    if isinstance(error, DeadlineError):
        return "deadline"
    return "rejected" if isinstance(error, QueueFullError) else "error"
