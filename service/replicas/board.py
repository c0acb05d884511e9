"""What replicas tell each other: who is alive, which generation it serves, what it has.

Only news, kept by Redis for as long as they are fresh by Redis' own clock; nothing here decides
what is served. Calls block: they are for threads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from service.registry.redis_client import Client, key, redis_errors
from service.versions.live import Tier
from service.versions.operations import Operation

__all__ = [
    "Board",
    "Lacking",
    "LocalBoard",
    "Phase",
    "RedisBoard",
    "Replica",
    "State",
    "VersionState",
]

log = logging.getLogger(__name__)
KEPT_S = 3600  # operations, after they were last told of
State = Literal["live", "ready", "loading", "failed"]
Phase = Literal["starting", "ready", "not_ready", "draining"]
T = TypeVar("T")


@dataclass(frozen=True)
class VersionState:
    """One version on one replica."""

    digest: str
    state: State
    tier: Tier
    reason: str | None = None  # why it failed
    attempts: int = 0  # that failed
    retry_s: float | None = None  # until it is tried again by itself; None: only if asked
    unified: str = ""  # digest of the unified model that it is loaded from, if it is from one


@dataclass(frozen=True)
class Lacking:
    """A version that a replica cannot have now, which keeps it at its generation."""

    version: str  # task@version
    reason: str
    attempts: int
    retry_s: float | None = None


@dataclass(frozen=True)
class Replica:
    """One server process as it tells of itself."""

    id: str  # of this process; `name` may be that of several
    name: str
    phase: Phase
    generation: int  # that it answers from
    version: str  # of Medley
    fingerprint: str
    since: str  # informs people
    versions: dict[str, VersionState] = field(default_factory=dict)  # by task@version
    lacking: tuple[Lacking, ...] = ()

    @property
    def ready(self) -> bool:
        """Whether traffic should go there."""
        return self.phase == "ready"

    @property
    def joined(self) -> bool:
        """Whether it has begun to answer."""
        return self.phase != "starting"

    def holds(self, version: str) -> bool:
        """Whether it can answer with a version (task@version)."""
        found = self.versions.get(version)
        return found is not None and found.state in ("live", "ready")


class Board(Protocol):
    """All raise UnavailableError where the registry is away."""

    def beat(self, replica: Replica) -> int:
        """Tell of oneself; how many are alive then."""

    def leave(self, replica: str) -> None:
        """Be gone at once."""

    def replicas(self) -> Sequence[Replica]:
        """All that are alive, by name."""

    def files(self) -> frozenset[str]:
        """Digests of what any of them serves from."""

    def tell(self, operation: Operation) -> None:
        """Let others know of an operation."""

    def operation(self, operation: str) -> Operation | None:
        """One that somebody has told of."""


class LocalBoard:
    """Of a server that is alone."""

    def __init__(self) -> None:
        self._replicas: dict[str, Replica] = {}

    def beat(self, replica: Replica) -> int:
        """Remember it."""
        self._replicas[replica.id] = replica
        return len(self._replicas)

    def leave(self, replica: str) -> None:
        """Forget it."""
        self._replicas.pop(replica, None)

    def replicas(self) -> Sequence[Replica]:
        """The one."""
        return list(self._replicas.values())

    def files(self) -> frozenset[str]:
        """Those of this one."""
        return _files(self.replicas())

    def tell(self, operation: Operation) -> None:
        """Nobody is there to hear it."""

    def operation(self, operation: str) -> Operation | None:
        """Nobody else has any."""
        return None


_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""
_BEAT = (
    _NOW
    + """
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[2], now + ARGV[3], ARGV[1])
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now)) do
  redis.call('HDEL', KEYS[1], gone)
  redis.call('ZREM', KEYS[2], gone)
end
for _, name in ipairs(KEYS) do
  if redis.call('PTTL', name) < tonumber(ARGV[3]) then redis.call('PEXPIRE', name, ARGV[3]) end
end
return redis.call('ZCARD', KEYS[2])
"""
)
_ALIVE = (
    _NOW
    + """
local alive = redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. now, '+inf')
if #alive == 0 then return {} end
return redis.call('HMGET', KEYS[1], unpack(alive))
"""
)
_replica: TypeAdapter[Replica] = TypeAdapter(Replica)
_operation: TypeAdapter[Operation] = TypeAdapter(Operation)


class RedisBoard:
    """A hash of what replicas say, and until when each of them counts as alive.

    Args:
        client: of the Redis that replicas share.
        prefix: of its keys.
        ttl_s: how long a replica counts that is not heard of.
    """

    def __init__(self, client: Client, *, prefix: str, ttl_s: float) -> None:
        self._client = client
        self._keys = key(prefix, "replicas"), key(prefix, "alive")
        self._operation_key: Callable[[str], str] = lambda id: key(prefix, f"operation:{id}")
        self._ttl_ms = round(1000 * ttl_s)

    def beat(self, replica: Replica) -> int:
        """Tell of oneself, and take down who has not been heard of for too long."""
        said = _replica.dump_json(replica)
        with redis_errors():
            alive = self._client.eval(_BEAT, 2, *self._keys, replica.id, said, self._ttl_ms)
        return int(cast(int, alive))

    def leave(self, replica: str) -> None:
        """Be gone at once."""
        with redis_errors():
            self._client.zrem(self._keys[1], replica)
            self._client.hdel(self._keys[0], replica)

    def replicas(self) -> Sequence[Replica]:
        """All that are alive; one whose words are not understood is left out."""
        with redis_errors():
            found = cast(list[bytes | str | None], self._client.eval(_ALIVE, 2, *self._keys))
        read = (_read(_replica, said) for said in found if said is not None)
        return sorted((one for one in read if one is not None), key=lambda r: (r.name, r.id))

    def files(self) -> frozenset[str]:
        """Those of any that is alive."""
        return _files(self.replicas())

    def tell(self, operation: Operation) -> None:
        """Keep it for an hour."""
        said = _operation.dump_json(operation)
        with redis_errors():
            self._client.set(self._operation_key(operation.id), said, ex=KEPT_S)

    def operation(self, operation: str) -> Operation | None:
        """One that somebody has told of within the last hour."""
        with redis_errors():
            found = self._client.get(self._operation_key(operation))
        return None if found is None else _read(_operation, found)


def _files(replicas: Sequence[Replica]) -> frozenset[str]:
    states = [state for one in replicas for state in one.versions.values()]
    digests = {state.digest for state in states} | {state.unified for state in states}
    return frozenset(digests - {""})


def _read(kind: TypeAdapter[T], said: bytes | str) -> T | None:
    try:
        return kind.validate_json(said)
    except ValidationError as error:  # of another Medley, in the middle of an update
        log.warning("what a replica says is not understood: %d errors", error.error_count())
        return None
