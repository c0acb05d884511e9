"""A registry that replicas share: one document in Redis, changed by compare-and-set.

Redis may lose what it has: it restarts with nothing or with an old dump, or another takes its
place. So a state counts only while it is *confirmed* for the very Redis that has it, and is
*kept*, which is a copy in the bundle store, before anybody is told of it. Where one of the two is
missing, the newest state that can be found is brought back first. Knows nothing of other replicas.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import cast
from uuid import uuid4

from service.errors import RegistryError, UnavailableError
from service.registry.backup import Backup
from service.registry.changes import Change
from service.registry.desired import Desired
from service.registry.document import State
from service.registry.epoch import EPOCH
from service.registry.hints import listen
from service.registry.redis_client import Client, key, redis_errors
from service.registry.registry import Registry

__all__ = ["RedisRegistry"]

log = logging.getLogger(__name__)
_TURNS = 100  # of one change that others are always faster than
_PAUSE_S = 0.005

_LOOK = (
    EPOCH
    + """
local function look(known)
  local found = redis.call('HMGET', KEYS[1], 'id', 'confirmed', 'kept')
  local document = false
  if found[1] and found[1] ~= known then document = redis.call('HGET', KEYS[1], 'document') end
  return {epoch(), found[1] or '', found[2] or '', found[3] or '', document}
end
"""
)
_READ = _LOOK + "return look(ARGV[1])"
_SWAP = (
    _LOOK
    + """
local seen = look(ARGV[1])
if seen[1] == ARGV[2] and seen[2] == ARGV[1] and seen[3] == ARGV[3] then
  redis.call('HSET', KEYS[1], 'id', ARGV[4], 'document', ARGV[5], 'confirmed', seen[1])
  redis.call('HDEL', KEYS[1], 'kept')
  redis.call('PUBLISH', ARGV[6], ARGV[4])
end
return look(ARGV[4])
"""
)


@dataclass(frozen=True)
class _Seen:
    """What Redis had at one moment."""

    epoch: str
    id: str
    confirmed: str  # the epoch that its state was last written in
    kept: str  # the id of a state that the store has a copy of
    state: State | None
    floor: State | None  # what was known before: nothing older can be right

    @property
    def is_trusted(self) -> bool:
        """Whether its state is the last one that anybody was told of, or a later one."""
        older = self.state and self.floor and self.state.generation < self.floor.generation
        return self.state is not None and self.confirmed == self.epoch and not older


class RedisRegistry(Registry):
    """See `Registry`. Threads may use it at the same time; its calls block.

    A registry that is none for this server (another store's, another backbone's, a newer Medley's)
    is a RegistryError until the first state has been read, and UnavailableError after that: what
    is served goes on. Nothing is asked before the first call. `on_step` hears where a change is;
    tests die there.
    """

    def __init__(
        self,
        client: Client,
        *,
        prefix: str,
        backup: Backup,
        backbone: str,
        on_step: Callable[[str], None] = lambda step: None,
    ) -> None:
        self.recoveries = 0  # how often this one has confirmed or brought back a state
        self._client = client
        self._key, self._channel = key(prefix, "state"), key(prefix, "changed")
        self._backup = backup
        self._backbone = backbone
        self._on_step = on_step
        self._last: State | None = None
        self._remembering = threading.Lock()
        self._ends: list[Callable[[], None]] = []

    @property
    def backup_generation(self) -> int:
        """The newest generation that is known to have a copy in the store; -1 if none is."""
        return self._backup.generation

    def close(self) -> None:
        """End what listens; the client is whose it was."""
        for end in self._ends:
            end()

    def read(self, known: Desired | None = None) -> Desired:
        """What is desired now; one round trip where nothing has changed."""
        with self._watching():
            _, state = self._settle(self._look())
        return known if known is not None and known.id == state.id else state.desired()

    def change(self, change: Change) -> Desired:
        """Make a change of what is there by then; tried again if somebody else was faster."""
        tried: set[str] = set()
        with self._watching():
            seen = self._look()
            for turn in range(_TURNS):
                seen, state = self._settle(seen)
                if not tried.isdisjoint(state.ids):  # made, and the answer was lost on its way
                    return state.desired()
                after = change.apply(state)
                if after is state:
                    return state.desired()
                tried.add(after.id)
                if turn:
                    time.sleep(random.uniform(0, turn * _PAUSE_S))
                seen = self._swap(seen, after)
                if seen.id == after.id:
                    self._on_step("redis-changed")
        raise UnavailableError(
            "the registry is changed by others all the time", code="registry_unavailable"
        )

    def listen(self, on_hint: Callable[[], None]) -> Callable[[], None]:
        """Have `on_hint` called after each change, and whenever changes may have been missed."""
        end = listen(self._client, self._channel, on_hint)
        self._ends.append(end)
        return end

    def _settle(self, seen: _Seen) -> tuple[_Seen, State]:
        """Have a state that is confirmed and kept, and remember it."""
        for _ in range(_TURNS):
            self._check(seen.state)
            if seen.state is not None and seen.is_trusted and self._keep(seen, seen.state):
                self._remember(seen.state)
                return seen, seen.state
            seen = self._recover(seen)
        raise UnavailableError("the registry does not settle", code="registry_unavailable")

    def _recover(self, seen: _Seen) -> _Seen:
        """Write back the newest state that can be shown, unless Redis has changed meanwhile."""
        copy = self._backup.newest()
        self._check(copy, adopted=True)
        # Of two with one generation, that of the store was acknowledged, if one was.
        known = [state for state in (copy, seen.floor, seen.state) if state is not None]
        best = max(known, key=lambda state: state.generation, default=None)
        if best is None:
            chosen = State(ids=(uuid4().hex,), store=self._backup.store_id, backbone=self._backbone)
        elif seen.state is not None and best.id == seen.state.id and self._is_alone(best):
            chosen = seen.state
        else:  # a generation of its own: what Redis or the store had lost may have had the next one
            above = self._backup.highest()
            chosen = best.after(best.tasks, store=self._backup.store_id, above=above)
        seen = self._swap(seen, chosen)
        if best is not None and seen.id == chosen.id:
            self.recoveries += 1
            log.warning("the registry was recovered at generation %d", chosen.generation)
        return seen

    def _is_alone(self, state: State) -> bool:
        """Whether no other state has a copy that says to be as new."""
        return self._backup.highest(but=state) < state.generation

    def _keep(self, seen: _Seen, state: State) -> bool:
        """See that the store has a copy before anybody is told of this state.

        False if it has one of another state that came after the same: somebody put an old one into
        Redis, or two Redis are written to.
        """
        if seen.kept != state.id:
            if not self._backup.keep(state):
                return False
            self._on_step("backed-up")
            with suppress(UnavailableError), redis_errors():  # others look into the store, then
                self._client.hset(self._key, "kept", state.id)
        self._backup.generation = state.generation
        return True

    def _check(self, state: State | None, *, adopted: bool = False) -> None:
        """Refuse a state that is not of this cluster; a copy is of the store that it lies in."""
        if state is None:
            return
        if state.backbone != self._backbone:
            raise RegistryError("the registry is of replicas with another backbone")
        if state.store != self._backup.store_id and not adopted:
            raise RegistryError(
                "the registry is of replicas with another bundle store: give each cluster"
                " a prefix of its own"
            )

    def _look(self) -> _Seen:
        floor = self._last
        reply = self._client.eval(_READ, 1, self._key, floor.id if floor else "")
        return _seen(reply, floor, floor)

    def _swap(self, seen: _Seen, state: State) -> _Seen:
        """Write a state if Redis is as it was seen; either way, what it has now."""
        floor = self._last
        guard = (seen.id, seen.epoch, seen.confirmed)
        reply = self._client.eval(
            _SWAP, 1, self._key, *guard, state.id, state.to_json(), self._channel
        )
        return _seen(reply, state, floor)

    def _remember(self, state: State) -> None:
        with self._remembering:
            if self._last is None or state.generation >= self._last.generation:
                self._last = state

    @contextmanager
    def _watching(self) -> Iterator[None]:
        try:
            with redis_errors():
                yield
        except RegistryError as error:
            self.up = False
            if self._last is None:
                raise
            raise UnavailableError(str(error), code="registry_unavailable") from error
        except UnavailableError:
            self.up = False
            raise
        self.up = True


def _seen(reply: object, known: State | None, floor: State | None) -> _Seen:
    """Read a script's answer; where it leaves out the document, that is `known`'s."""
    found = cast(list[bytes | str | None], reply)
    epoch, change, confirmed, kept = (_text(part) for part in found[:4])
    document = found[4]
    if document is not None:
        state: State | None = State.from_json(document)
    else:
        state = known if change and known is not None and known.id == change else None
    return _Seen(epoch, change, confirmed, kept, state, floor)


def _text(part: bytes | str | None) -> str:
    return part.decode() if isinstance(part, bytes) else part or ""
