"""Work in a thread that may hang for good: it holds up neither others nor the end of the process.

A read from a dead network mount cannot be interrupted. Whoever waits for it gives up, and the
thread is left behind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

__all__ = ["run_apart"]

T = TypeVar("T")


def run_apart(work: Callable[[], T], *, name: str) -> Future[T]:
    """Run in a thread of its own; the future cannot be cancelled, only not waited for.

    Args:
        work: called without arguments; what it raises is the future's exception.
        name: of the thread.
    """
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # goes to whoever waits, as from any executor
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
