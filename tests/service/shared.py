"""What replicas share, for tests of one process: a registry in the shared Redis, and a store."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

from service.bundles.blobs import Blobs
from service.registry.backup import Backup
from service.registry.redis_client import connect
from service.registry.redis_registry import RedisRegistry
from tests.redis_server import RedisServer

__all__ = ["BACKBONE", "Cluster"]

BACKBONE = "sha256:" + "ab" * 32


class Cluster:
    """A prefix of its own in a Redis, and a store in `folder`; makes the registries of replicas."""

    def __init__(self, server: RedisServer, folder: Path) -> None:
        self.server, self.folder, self.prefix = server, folder, f"test-{uuid4().hex}"
        self.redis = server.client()
        self._opened = ExitStack()
        self._opened.callback(self.redis.close)

    @property
    def key(self) -> str:
        """Where the state is."""
        return f"{{{self.prefix}}}:state"

    @property
    def copies(self) -> list[Path]:
        """The copies of the state in the store, the oldest first."""
        return sorted((self.folder / "registry").glob("*.json"))

    def replica(
        self,
        *,
        prefix: str | None = None,
        backbone: str = BACKBONE,
        timeout_s: float = 5.0,
        url: str | None = None,
        on_step: Callable[[str], None] = lambda step: None,
    ) -> RedisRegistry:
        """The registry as one more replica has it, with a client of its own."""
        client = connect(url or self.server.url, timeout_s=timeout_s)
        registry = RedisRegistry(
            client,
            prefix=prefix or self.prefix,
            backup=Backup(Blobs(str(self.folder), timeout_s=5.0)),
            backbone=backbone,
            on_step=on_step,
        )
        self._opened.callback(client.close)
        self._opened.callback(registry.close)
        return registry

    def lose(self) -> None:
        """Let Redis forget this cluster's state, and only that."""
        self.redis.delete(self.key)

    def close(self) -> None:
        """Close what was opened; the Redis stays."""
        self._opened.close()
