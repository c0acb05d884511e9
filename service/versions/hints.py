"""Hints by Redis' publish/subscribe: look now. They may be lost, and nothing depends on them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from service.errors import UnavailableError
from service.versions.redis_client import Client, redis_errors

__all__ = ["listen"]

log = logging.getLogger(__name__)
_WAIT_S = 0.25  # of one look at the connection; as long it takes to end
_PAUSES_S = (0.1, 0.5, 1.0, 2.0, 5.0)  # between tries to listen again


def listen(client: Client, channel: str, on_hint: Callable[[], None]) -> Callable[[], None]:
    """Call `on_hint` from a thread for each message, and each time that listening has begun.

    Returns what ends it; it may be called more than once.
    """
    over = threading.Event()
    thread = threading.Thread(
        target=_listen, args=(client, channel, on_hint, over), name="hints", daemon=True
    )
    thread.start()

    def end() -> None:
        over.set()
        thread.join(2 * _WAIT_S)

    return end


def _listen(
    client: Client, channel: str, on_hint: Callable[[], None], over: threading.Event
) -> None:
    failures = 0
    while not over.is_set():
        try:
            with redis_errors(), client.pubsub() as hints:  # type: ignore[no-untyped-call]
                hints.subscribe(channel)
                while not over.is_set():
                    if hints.get_message(timeout=_WAIT_S) is not None:  # the first: it has begun
                        failures = 0
                        on_hint()
        except UnavailableError as error:
            log.debug("no hints for now: %s", error)
            over.wait(_PAUSES_S[min(failures, len(_PAUSES_S) - 1)])
            failures += 1
