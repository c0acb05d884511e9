"""What replicas share, opened at a start: the Redis of their registry, and their bundle store.

Either may be away for a while when a server starts, and is waited for; what will never do is told
at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from service.bundles.blobs import ID_FILE, Blobs
from service.bundles.ledger import Ledger
from service.bundles.shared_store import SharedStore
from service.errors import RegistryError, ServiceError, StorageError, UnavailableError
from service.registry.redis_client import Client, connect, redis_errors
from service.settings import Settings

__all__ = ["Shared", "open_shared", "watch"]

PAUSE_S = 0.5  # between two tries
T = TypeVar("T")


@dataclass(frozen=True)
class Shared:
    """Both, able to answer when the server started."""

    client: Client
    blobs: Blobs
    ledger: Ledger  # of what is on its way to the store, and from it
    store: SharedStore


async def open_shared(settings: Settings, *, at: Callable[[str], None]) -> Shared | None:
    """Open what the settings name, if they name any.

    Args:
        settings: where it is, and how long a start waits for it.
        at: hears what is waited for.

    Raises:
        RegistryError, StorageError: it is none for this server.
        ServiceError: it did not answer in all that time.
    """
    if settings.registry is None:
        return None
    until_s = time.monotonic() + settings.registry_wait_s
    at("waiting for the registry")
    client = await _patiently(lambda: _connect(settings), until_s, at)
    at("waiting for the bundle store")
    timeout_s = settings.bundle_store_timeout_s
    blobs = await _patiently(lambda: Blobs(settings.bundle_store, timeout_s=timeout_s), until_s, at)
    ledger = Ledger(client, prefix=settings.registry_prefix, condemned_s=10 + 3 * timeout_s)
    return Shared(client, blobs, ledger, SharedStore(blobs, announce=ledger.announce))


def _connect(settings: Settings) -> Client:
    """A client that has been answered."""
    assert settings.registry is not None
    password = settings.registry_password
    client = connect(
        settings.registry.get_secret_value(),
        password=None if password is None else password.get_secret_value(),
        timeout_s=settings.registry_timeout_s,
    )
    try:
        with redis_errors():
            client.ping()
    except BaseException:
        client.close()
        raise
    return client


async def _patiently(make: Callable[[], T], until_s: float, at: Callable[[str], None]) -> T:
    """Try again while it is away, until the time is over."""
    while True:
        try:
            return await asyncio.to_thread(make)
        except RegistryError:
            raise
        except (UnavailableError, StorageError) as error:
            if error.code == "store_refused":
                raise
            if time.monotonic() + PAUSE_S > until_s:
                raise ServiceError(str(error)) from error
            at(f"waiting: {error}")
        await asyncio.sleep(PAUSE_S)


async def watch(blobs: Blobs, *, every_s: float) -> None:
    """Look again and again whether the bundle store can be used: nobody may need it for hours."""
    while True:
        await asyncio.sleep(every_s)
        with suppress(StorageError):  # `up` says so
            await asyncio.to_thread(blobs.has, ID_FILE)
