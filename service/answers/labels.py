"""Text features of label sets that requests bring along: encoded once, kept while there is room.

A key says all that the features depend on: whose text experts (by bundle digest), the labels, the
templates. Requests that want the same set at once share one encoding.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from medley.prompts import DEFAULT_TEMPLATES
from medley.routed import ZERO_SHOT
from service.answers.engine import Engine
from service.versions.live import LabelSet, Resident

__all__ = ["LabelCache"]

CHUNK = 64  # prompts per job, so that batches run in between

Encode = Callable[[tuple[str, ...], tuple[str, ...], int], Tensor]  # names, templates, path
Key = tuple[str, tuple[str, ...], tuple[str, ...]]


class LabelCache:
    """The most recently used label sets, bounded in number and bytes. Belongs to the event loop."""

    def __init__(self, encode: Encode, engine: Engine, *, max_sets: int, max_bytes: int) -> None:
        self.used_bytes = 0
        self._encode = encode
        self._engine = engine
        self._max_sets = max_sets
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Key, asyncio.Future[Tensor]] = OrderedDict()
        self._bytes: dict[Key, int] = {}

    async def get(
        self, resident: Resident | None, labels: tuple[str, ...], templates: tuple[str, ...] | None
    ) -> LabelSet:
        """Labels as a task's text experts encode them, or as zero-shot does if it is None.

        Without templates, labels that are all classes of the task take the features of its bundle.
        """
        if resident is not None and templates is None:
            own = _own_rows(resident.own, labels)
            if own is not None:
                return LabelSet("request", labels, own)
        templates = templates or (resident.templates if resident else DEFAULT_TEMPLATES)
        return LabelSet("request", labels, await self.features(resident, labels, templates))

    async def features(
        self, resident: Resident | None, labels: tuple[str, ...], templates: tuple[str, ...]
    ) -> Tensor:
        """Text features, (C, E) on the host, whatever the resident's own classes are."""
        key = (resident.record.digest if resident else "zero_shot", labels, templates)
        kept = self._kept.get(key)
        if kept is None:
            path = resident.path if resident else ZERO_SHOT
            kept = self._kept[key] = self._start(labels, templates, path)
            kept.add_done_callback(lambda done: self._settle(key, done))
        self._kept.move_to_end(key)
        self._make_room()
        return await asyncio.shield(kept)

    def _start(
        self, labels: tuple[str, ...], templates: tuple[str, ...], path: int
    ) -> asyncio.Future[Tensor]:
        """Queue all jobs at once, so that they run before `path` can be unloaded."""
        size = max(1, CHUNK // len(templates))
        parts = [labels[i : i + size] for i in range(0, len(labels), size)]
        jobs = self._engine.run_all([partial(self._encode, p, templates, path) for p in parts])
        return asyncio.ensure_future(_concatenated([asyncio.wrap_future(job) for job in jobs]))

    def _settle(self, key: Key, done: asyncio.Future[Tensor]) -> None:
        """Keep no failure: the next request tries again."""
        if self._kept.get(key) is not done:
            return  # it has been pushed out meanwhile
        if done.cancelled() or done.exception() is not None:
            del self._kept[key]
            return
        self._bytes[key] = done.result().nbytes
        self.used_bytes += self._bytes[key]
        self._make_room()

    def _make_room(self) -> None:
        """Let the least recently used go; a set that is being encoded weighs nothing yet."""
        while len(self._kept) > self._max_sets or self.used_bytes > self._max_bytes:
            key, _ = self._kept.popitem(last=False)
            self.used_bytes -= self._bytes.pop(key, 0)


async def _concatenated(jobs: list[asyncio.Future[Tensor]]) -> Tensor:
    return torch.cat(await asyncio.gather(*jobs)).cpu()


def _own_rows(own: LabelSet, labels: tuple[str, ...]) -> Tensor | None:
    rows = [own.row_of.get(label.casefold()) for label in labels]
    known = [row for row in rows if row is not None]
    return own.features_CE[known] if len(known) == len(rows) else None
