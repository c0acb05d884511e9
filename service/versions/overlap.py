"""Would a new version take images of other tasks, or they its? Asked once, at its registration.

A bundle carries a few inputs for its self-test: pictures of the task. Who claims them among all
live tasks is what DDAS would decide, so it is asked as any client would, in a lane of its own,
beside the traffic. It only warns: two tasks may well be meant to share pictures. Few images and
little time, so that nothing warned of is no proof.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from medley.classifier import Ask
from medley.errors import MedleyError
from service.answers.engine import Answer, Engine
from service.signals.metrics import Metrics
from service.versions.live import Key, Live, Resident

__all__ = ["Overlap"]

log = logging.getLogger(__name__)
LANE = "@overlap"  # no task can be called so
MAX_TASKS = 16  # whose images are tried: those that know the new task's images best
MAX_IMAGES = 4  # of each of them
MAX_OWN = 8  # of the new one
LONGEST_S = 2.0  # then what is known by then is all


@dataclass(frozen=True)
class _Contest:
    """A new version among the tasks that are live beside it."""

    new: Resident
    others: dict[int, Resident]  # by path

    @property
    def ask(self) -> Ask:
        """Let DDAS decide among all of them."""
        return Ask(eligible=frozenset({self.new.path, *self.others}))

    def nearest(self, answers: Sequence[Answer]) -> list[Resident]:
        """The other tasks, those first that know these images best."""
        known = {
            path: sum(answer.scores.get(path, math.inf) for answer in answers)
            for path in self.others
        }
        return [self.others[path] for path in sorted(known, key=lambda path: (known[path], path))]


class Overlap:
    """Asks the engine; belongs to the event loop's thread.

    Args:
        engine: decides.
        live: what is served.
        bundle: where the bundle with a digest is.
        metrics: count the warnings.
    """

    def __init__(
        self, *, engine: Engine, live: Live, bundle: Callable[[str], Path], metrics: Metrics
    ) -> None:
        self._engine = engine
        self._live = live
        self._bundle = bundle
        self._metrics = metrics

    async def warnings(self, key: Key, pixels_NCHW: Tensor) -> tuple[str, ...]:
        """What a version and the live tasks would take of each other's images.

        Args:
            key: a version that is on the device, live or not.
            pixels_NCHW: its self-test's inputs.

        Returns:
            one sentence for each overlap; none where nothing was found, or nothing could be asked.
        """
        with self._live.lease(LANE) as snapshot:  # nothing that is asked about is unloaded
            new = snapshot.residents.get(key)
            others = {r.path: r for task, r in snapshot.live.items() if task != key[0]}
            if new is None or not others:
                return ()
            found = await self._found(_Contest(new, others), pixels_NCHW)
        for text in found:
            log.warning("%s@%s overlaps: %s", *key, text)
        self._metrics.overlap_warnings.inc(len(found))
        return tuple(found)

    async def _found(self, contest: _Contest, pixels_NCHW: Tensor) -> list[str]:
        end_s = time.monotonic() + LONGEST_S
        own = await self._answers(pixels_NCHW[:MAX_OWN], contest.ask, end_s)
        taken = Counter(answer.path for answer in own)
        found = [
            f"task {other.record.task} takes {taken[path]} of its {len(own)} self-test images"
            for path, other in contest.others.items()
            if taken[path]
        ]
        nearest = contest.nearest(own)[:MAX_TASKS]
        claims = await asyncio.gather(*[self._claims(contest, one, end_s) for one in nearest])
        for other, (count, of) in zip(nearest, claims, strict=True):
            if count:
                task = other.record.task
                found.append(f"it takes {count} of {of} self-test images of task {task}")
        return found

    async def _claims(self, contest: _Contest, other: Resident, end_s: float) -> tuple[int, int]:
        """How many images of another task the new one takes, and of how many."""
        path = self._bundle(other.record.digest)
        try:
            pixels_NCHW = await asyncio.to_thread(_first_images, path)
        except (OSError, SafetensorError):
            return 0, 0  # deleted meanwhile
        answers = await self._answers(pixels_NCHW, contest.ask, end_s)
        return sum(answer.path == contest.new.path for answer in answers), len(answers)

    async def _answers(self, pixels_NCHW: Tensor, ask: Ask, end_s: float) -> list[Answer]:
        """The answers that come in time."""
        try:
            queued = self._engine.submit(list(pixels_NCHW), ask, lane=LANE, deadline_s=end_s)
        except MedleyError as error:  # too much to do, or about to end
            log.info("an overlap was not looked for: %s", error)
            return []
        waiting = [asyncio.wrap_future(future) for future in queued]
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        return [answer for answer in ended if isinstance(answer, Answer)]


def _first_images(path: Path) -> Tensor:
    """The first inputs of a bundle's self-test; nothing else of the file is read."""
    with safe_open(path, framework="pt") as file:
        return file.get_slice("self_test.pixels")[:MAX_IMAGES]
