"""The desired state as one document, and that document as JSON.

`Desired` is what the rest of the server reads from it. A state is never edited: `changes.py`
makes the next one. The JSON is what SQLite, Redis and the copies in the bundle store hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from uuid import uuid4

from pydantic import TypeAdapter

from service.errors import RegistryError
from service.registry.desired import LIVE, Desired, VersionRecord

__all__ = ["FORMAT", "State", "TaskState"]

FORMAT = 2  # the newest that is read
_REMEMBERED = 32  # ids of earlier changes: who lost the answer to its own finds it here


@dataclass(frozen=True)
class TaskState:
    """All about one task; `activations` is a stack whose last version is live."""

    versions: tuple[VersionRecord, ...] = ()  # oldest first
    activations: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)  # without `live`
    pinned: tuple[str, ...] = ()
    rollout: str | None = None
    changed: int = 0  # the generation of its last change

    @property
    def live(self) -> str | None:
        """The version that is live, if one is."""
        return self.activations[-1] if self.activations else None

    @property
    def names(self) -> dict[str, str]:
        """Every alias and what it names, `live` among them."""
        live = {} if self.live is None else {LIVE: self.live}
        return dict(self.aliases) | live

    def has(self, version: str) -> bool:
        """Whether there is such a version."""
        return any(record.version == version for record in self.versions)


@dataclass(frozen=True)
class State:
    """The whole document; `store` and `backbone` say whose it is, where replicas share it."""

    generation: int = 0
    ids: tuple[str, ...] = ()  # of the changes that led here, the last one first
    tasks: Mapping[str, TaskState] = field(default_factory=dict)
    store: str = ""  # id of the bundle store that has the bytes
    backbone: str = ""  # fingerprint

    @property
    def id(self) -> str:
        """The id of the change that made this state: no two states have the same."""
        return self.ids[0] if self.ids else ""

    def after(
        self, tasks: Mapping[str, TaskState], *, store: str | None = None, above: int = -1
    ) -> State:
        """The next state, with these tasks.

        `store`: if its bytes have another place since; `above`: a generation that may be taken.
        """
        return replace(
            self,
            generation=max(self.generation, above) + 1,
            ids=(uuid4().hex, *self.ids[: _REMEMBERED - 1]),
            tasks=tasks,
            store=self.store if store is None else store,
        )

    def desired(self) -> Desired:
        """What it means for those who serve by it."""
        tasks = dict(sorted(self.tasks.items()))
        return Desired(
            generation=self.generation,
            id=self.id,
            versions=tuple(record for task in tasks.values() for record in task.versions),
            aliases={name: names for name, task in tasks.items() if (names := task.names)},
            previous={n: t.activations[-2] for n, t in tasks.items() if len(t.activations) > 1},
            pinned=frozenset((n, version) for n, t in tasks.items() for version in t.pinned),
            rollouts={n: t.rollout for n, t in tasks.items() if t.rollout is not None},
            changed={name: task.changed for name, task in tasks.items()},
        )

    def to_json(self) -> str:
        """The document as text, in the oldest format that has all of it."""
        return _document.dump_json(_Document(state=self, format=_format_of(self))).decode()

    @staticmethod
    def from_json(text: str | bytes) -> State:
        """Read what `to_json` wrote.

        Raises:
            RegistryError: a newer Medley wrote it, or it is something else (`registry_damaged`).
        """
        try:
            found = _format.validate_json(text).format
            if found <= FORMAT:
                return _document.validate_json(text).state
        except ValueError as error:
            raise RegistryError(
                "what lies in the registry is no state of one", code="registry_damaged"
            ) from error
        raise RegistryError(
            f"the registry was written by a newer Medley: its format is {found},"
            f" this one knows up to {FORMAT}"
        )


@dataclass(frozen=True)
class _Document:
    state: State
    format: int


@dataclass(frozen=True)
class _Format:
    format: int


def _format_of(state: State) -> int:
    """Format 1 had no unified models: who knows no other would drop their names, then the files."""
    records = (record for task in state.tasks.values() for record in task.versions)
    return 2 if any(record.unified for record in records) else 1


_document = TypeAdapter(_Document)
_format = TypeAdapter(_Format)  # what else is there is for the next one to read
