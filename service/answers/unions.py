"""The classes of all live tasks as the text experts of one of them see them.

Zero-shot's union is in the snapshot; this is the same question in the words of a task that answers
beside it. Encoded when first asked for and kept by (who encodes, whose classes), so that a task
that is new, or has changed, costs only its own rows. What a bundle says of its own classes is taken
as it is.
"""

from __future__ import annotations

from torch import Tensor

from service.answers.labels import LabelCache
from service.versions.live import LabelSet, Resident, Snapshot

__all__ = ["Unions"]


class Unions:
    """Label sets of a snapshot's live tasks. Belongs to the event loop."""

    def __init__(self, parts: LabelCache) -> None:
        """Take what encodes and keeps the parts: not that of requests, which would push them out.

        Args:
            parts: has a place for each pair of live tasks.
        """
        self._parts = parts

    async def get(self, resident: Resident, snapshot: Snapshot) -> LabelSet:
        """The union of a snapshot that is leased, as one of its versions encodes it.

        One part after the other: who gives up has not queued the rest, and who comes again finds
        what was encoded for the one before.
        """
        tasks = snapshot.live.values()
        return snapshot.union_of([await self._part(resident, task) for task in tasks])

    async def _part(self, resident: Resident, task: Resident) -> Tensor:
        if task.path == resident.path:
            return task.own.features_CE
        return await self._parts.features(resident, task.own.names, task.templates)
