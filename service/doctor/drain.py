"""The one check that ends a server: does it leave in order when it is told to?"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

from service.doctor.findings import Finding, judged
from service.doctor.poison import good_image
from service.doctor.site import OPTIONS, Reply, Site, read_reply

__all__ = ["check_drain"]

REQUESTS = 4
NOT_READY_S, GONE_S = 10.0, 90.0
EXPECT_S, ANSWER_S = 5.0, 30.0
LOOK_AGAIN_S = 0.05


def check_drain(site: Site, pid: int) -> Iterator[Finding]:
    """Send SIGTERM while requests are in flight.

    Args:
        site: the server.
        pid: of its process, on this machine.

    Raises:
        OSError: no such process, or not ours to stop.
    """
    with ExitStack() as stack:
        begun = [stack.enter_context(_begun(site)) for _ in range(REQUESTS)]
        os.kill(pid, signal.SIGTERM)
        last = _not_ready(site)
        yield judged(
            "drain: not ready at once",
            last.status == 503 or not last.status,
            expected=f"503, or no longer listening, within {NOT_READY_S:g} s",
            came=last.said,
            advice="balancers send requests to a server that leaves: is the signal its own?",
        )
        replies = [_completed(connection) for connection in begun]
        answered = sum(reply.prediction is not None for reply in replies)
        yield judged(
            "drain: requests in flight",
            answered == REQUESTS,
            expected=f"{REQUESTS} answers",
            came=f"{answered} answers" if answered == REQUESTS else _told(replies),
            advice="give it time: MEDLEY_DRAIN_S, and as long between SIGTERM and SIGKILL",
        )
    start_s = time.monotonic()
    gone = _gone(pid)
    yield judged(
        "drain: ends",
        gone,
        expected=f"the process has ended within {GONE_S:g} s",
        came=f"after {time.monotonic() - start_s:.1f} s" if gone else "it has not",
        advice="something in it hangs: look into its log, then kill it",
    )


def _begun(site: Site) -> socket.socket:
    """A request whose headers the server has taken: it asks for the body, which waits."""
    query = [f"model={OPTIONS['model']}", f"top_k={OPTIONS['top_k']}"]
    query += [f"labels={label.replace(' ', '+')}" for label in OPTIONS["labels"]]
    head = site.head(
        "POST",
        f"/v1/classify?{'&'.join(query)}",
        "Content-Type: image/png",
        f"Content-Length: {len(good_image())}",
        "Expect: 100-continue",
    )
    connection = site.connect(timeout_s=EXPECT_S)
    connection.sendall(head)
    with suppress(TimeoutError):
        connection.recv(4096)  # 100 Continue
    connection.settimeout(ANSWER_S)
    return connection


def _completed(connection: socket.socket) -> Reply:
    try:
        connection.sendall(good_image())
        return read_reply(connection)
    except OSError as error:
        return Reply(0, error=f"closed ({type(error).__name__})")


def _not_ready(site: Site) -> Reply:
    end_s = time.monotonic() + NOT_READY_S
    while (reply := site.ask("GET", "/readyz", bearer="")).status == 200:
        if time.monotonic() > end_s:
            break
        time.sleep(LOOK_AGAIN_S)
    return reply


def _gone(pid: int) -> bool:
    end_s = time.monotonic() + GONE_S
    while time.monotonic() < end_s:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(LOOK_AGAIN_S)
    return False


def _told(replies: list[Reply]) -> str:
    return ", ".join(reply.said for reply in replies)
