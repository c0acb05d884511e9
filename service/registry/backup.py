"""Copies of the desired state in the store that replicas share: what a Redis may lose.

One small file for each generation, written before a change is acknowledged. Says what the newest
copy is; what becomes of it is for `redis_registry.py`.
"""

from __future__ import annotations

import logging
import re
from contextlib import suppress

from service.bundles.blobs import Blobs
from service.errors import NotFoundError, RegistryError, StorageError
from service.registry.document import State

__all__ = ["FOLDER", "KEPT", "Backup", "is_copy"]

log = logging.getLogger(__name__)
FOLDER = "registry"
KEPT = 20  # the newest; a few more where cleaning failed
_NAME = re.compile(rf"{FOLDER}/\d{{20}}-[0-9a-f]+\.json")


class Backup:
    """The copies in one store; all methods raise StorageError where it cannot be used."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self.generation = -1  # of the newest copy that is known to be there

    @property
    def store_id(self) -> str:
        """Whose bundles a state names that is kept here."""
        return self._blobs.id

    def keep(self, state: State) -> bool:
        """Write a state's copy; durable when this returns.

        False, and nothing is written, where another state of that generation or a later one has a
        copy: two were made from one, so that one of them was made by who was not up to date.
        """
        others = self._others(state)
        if _highest(others) >= state.generation:
            return False
        self._blobs.put(_name(state), state.to_json().encode())
        self.generation = state.generation
        with suppress(StorageError):  # the state is kept; the next cleaning has more to do
            for old in others[: 1 - KEPT]:
                self._blobs.delete(old)
        return True

    def newest(self) -> State | None:
        """The copy of the highest generation that can be read; None if there is none.

        Raises:
            RegistryError: a newer Medley wrote it.
        """
        for name in reversed(self._names()):
            with suppress(NotFoundError):  # somebody cleaned it away: there are newer ones
                state = self._read(name)
                if state is not None:
                    return state
        return None

    def highest(self, *, but: State | None = None) -> int:
        """The highest generation that a copy is named by, read or not, `but` apart; or -1."""
        return _highest(self._others(but))

    def _others(self, state: State | None) -> list[str]:
        return [name for name in self._names() if state is None or name != _name(state)]

    def _read(self, name: str) -> State | None:
        try:
            return State.from_json(self._blobs.read(name))
        except RegistryError as error:
            if error.code != "registry_damaged":
                raise
            log.error("the copy %s of the registry is damaged", name)
            return None

    def _names(self) -> list[str]:
        """Copies, the oldest first; other files are none of ours."""
        return [name for name in self._blobs.names(f"{FOLDER}/") if is_copy(name)]


def is_copy(name: str) -> bool:
    """Whether a file of that name is one of ours."""
    return _NAME.fullmatch(name) is not None


def _name(state: State) -> str:
    return f"{FOLDER}/{state.generation:020}-{state.id}.json"


def _highest(names: list[str]) -> int:
    return int(names[-1].removeprefix(f"{FOLDER}/").partition("-")[0]) if names else -1
