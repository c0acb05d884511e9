"""What Redis remembers for the collector: which bundles are unused since when, and which arrive.

Time is Redis' own. A clock that a Redis brought back from an earlier life is not believed: with
every epoch all of them begin anew. What is deleted, and why, is for `collector.py`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import cast

from service.errors import StorageError, UnavailableError
from service.registry.desired import Desired
from service.registry.epoch import EPOCH
from service.registry.redis_client import Client, key, redis_errors

__all__ = ["ARRIVING_S", "Ledger"]

ARRIVING_S = 3600.0  # a registration takes less, from its bytes to the registry
_TURN_S = 600.0  # a turn whose collector has died ends by itself
_PAUSE_S = 0.05

_NOW = """
local function now()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1000000
end
"""
_ANNOUNCE = (  # unused, arriving, condemned; digest, arriving_s
    _NOW
    + """
if redis.call('EXISTS', KEYS[3]) == 1 then return 0 end
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now())
redis.call('ZADD', KEYS[2], 'GT', now() + tonumber(ARGV[2]), ARGV[1])
return 1
"""
)
_MARK = (  # unused, epoch; names
    EPOCH
    + _NOW
    + """
local since = {}
if redis.call('GET', KEYS[2]) == epoch() then
  local found = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
  for i = 1, #found, 2 do since[found[i]] = tonumber(found[i + 1]) end
end
redis.call('SET', KEYS[2], epoch())
redis.call('DEL', KEYS[1])
local ages = {}
for i = 1, #ARGV do
  local begun = since[ARGV[i]] or now()
  redis.call('ZADD', KEYS[1], begun, ARGV[i])
  ages[i] = string.format('%.6f', now() - begun)
end
return ages
"""
)
_CONDEMN = (  # state, unused, epoch, arriving, condemned; state's id, digest, keep_s, condemned_ms
    EPOCH
    + _NOW
    + """
local state = redis.call('HMGET', KEYS[1], 'id', 'confirmed')
if state[1] ~= ARGV[1] or state[2] ~= epoch() then return 0 end
if redis.call('GET', KEYS[3]) ~= epoch() then return 0 end
local arriving = redis.call('ZSCORE', KEYS[4], ARGV[2])
if arriving and tonumber(arriving) > now() then return 0 end
local since = redis.call('ZSCORE', KEYS[2], ARGV[2])
if not since or now() - tonumber(since) < tonumber(ARGV[3]) then return 0 end
if not redis.call('SET', KEYS[5], '', 'PX', ARGV[4], 'NX') then return 0 end
redis.call('ZREM', KEYS[2], ARGV[2])
return 1
"""
)


class Ledger:
    """Of one cluster, for all of its replicas. Calls block; each script is one atomic step.

    All methods raise UnavailableError if Redis is away: then nothing arrives and nothing goes.

    Args:
        client: of the registry's Redis.
        prefix: of its keys.
        arriving_s: how long an announced bundle is spared, whatever becomes of it.
        condemned_s: longer than any deletion takes; so long a bundle cannot arrive of which nobody
            knows whether it is gone.
    """

    def __init__(
        self, client: Client, *, prefix: str, condemned_s: float, arriving_s: float = ARRIVING_S
    ) -> None:
        self._client = client
        self._arriving_s = arriving_s
        self._condemned_s = condemned_s
        self._state = key(prefix, "state")  # the registry's
        self._unused = key(prefix, "unused")
        self._epoch = key(prefix, "unused-epoch")
        self._arriving = key(prefix, "arriving")
        self._condemned = key(prefix, "condemned")
        self._turn = key(prefix, "collecting")

    def announce(self, digest: str) -> None:
        """Say that a bundle is about to be put: nobody collects it for a while.

        Waits while that very bundle is being deleted.

        Raises:
            StorageError: it has been for too long (`store_unavailable`).
        """
        keys = (self._unused, self._arriving, self._condemned_key(digest))
        limit_s = time.monotonic() + self._condemned_s
        while not self._run(_ANNOUNCE, keys, digest, self._arriving_s):
            if time.monotonic() > limit_s:
                raise StorageError("the bundle is being deleted", code="store_unavailable")
            time.sleep(_PAUSE_S)

    def mark(self, unused: Collection[str]) -> dict[str, float]:
        """Take these names, and no others, as unused by now.

        Returns:
            for how many seconds each has been without a break.
        """
        names = sorted(unused)
        ages_s = cast(list[bytes], self._run(_MARK, (self._unused, self._epoch), *names))
        return {name: float(age_s) for name, age_s in zip(names, ages_s, strict=True)}

    def condemn(self, digest: str, *, desired: Desired, keep_s: float) -> bool:
        """Let a bundle be deleted that this state does not name; `release` it afterwards.

        Returns:
            False if it must not be: the state has changed, or Redis cannot vouch for it; the
            bundle arrives, has not been unused for that long, or is being deleted by somebody.
        """
        keys = (self._state, self._unused, self._epoch, self._arriving, self._condemned_key(digest))
        condemned_ms = int(self._condemned_s * 1000)
        return bool(self._run(_CONDEMN, keys, desired.id, digest, keep_s, condemned_ms))

    def release(self, digest: str) -> None:
        """Let a bundle arrive again whose deletion has come to its end."""
        with redis_errors():
            self._client.delete(self._condemned_key(digest))

    @contextmanager
    def turn(self) -> Iterator[bool]:
        """Collect alone: False if another replica does."""
        with redis_errors():
            lock = self._client.lock(self._turn, timeout=_TURN_S, blocking=False)
            ours = bool(lock.acquire())
        try:
            yield ours
        finally:
            with suppress(UnavailableError), redis_errors():  # then it ends by itself
                if ours:
                    lock.release()

    def _condemned_key(self, digest: str) -> str:
        return f"{self._condemned}:{digest}"

    def _run(self, script: str, keys: tuple[str, ...], *values: str | float) -> object:
        with redis_errors():
            return self._client.eval(script, len(keys), *keys, *values)
