"""Hints by Redis' publish/subscribe: look now. They may be lost, and nothing depends on them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator

from redis.client import PubSub

from service.registry.redis_client import Client

__all__ = ["listen"]

log = logging.getLogger(__name__)
CHECK_S = 10.0  # how often a silent connection is tried: a network may lose it without a word
_WAIT_S = 0.25  # of one look at the connection; as long it takes to end
_PAUSES_S = (0.1, 0.5, 1.0, 2.0, 5.0)  # between tries to listen again


def listen(
    client: Client, channel: str, on_hint: Callable[[], None], *, check_s: float = CHECK_S
) -> Callable[[], None]:
    """Call `on_hint` from a thread for each message, and each time that listening has begun.

    Returns what ends it; it may be called more than once.
    """
    over = threading.Event()

    def run() -> None:
        failures = 0
        while not over.is_set():
            try:
                with client.pubsub() as hints:  # type: ignore[no-untyped-call]
                    hints.subscribe(channel)
                    for _ in _messages(hints, over, check_s):  # the first: it has begun
                        failures = 0
                        on_hint()
            except Exception as error:  # the outermost loop: a lost hint is nothing, this thread is
                log.debug("no hints for now: %r", error)
                over.wait(_PAUSES_S[min(failures, len(_PAUSES_S) - 1)])
                failures += 1

    thread = threading.Thread(target=run, name="hints", daemon=True)
    thread.start()

    def end() -> None:
        over.set()
        thread.join(2 * _WAIT_S)

    return end


def _messages(hints: PubSub, over: threading.Event, check_s: float) -> Iterator[object]:
    """What comes, until it is over; TimeoutError if not even an answer does."""
    heard_s = asked_s = time.monotonic()
    while not over.is_set():
        message = hints.get_message(timeout=_WAIT_S)
        now_s = time.monotonic()
        if message is not None:
            heard_s = asked_s = now_s
            if message["type"] != "pong":
                yield message
        elif now_s - heard_s > 2 * check_s:
            raise TimeoutError("the hints have fallen silent")
        elif now_s - asked_s > check_s:
            asked_s = now_s
            hints.ping()
