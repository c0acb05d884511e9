"""When so many replicas have a change: what counts, and what a moment's silence leaves."""

from __future__ import annotations

import asyncio

import pytest

from service.replicas.board import LocalBoard, Replica, State, VersionState
from service.replicas.quorum import Quorum, Reached, Wanted

VERSION = "pets@1"


def replica(name: str, state: State = "live") -> Replica:
    versions = {VERSION: VersionState("sha256:1", state, "device", reason="broken")}
    return Replica(name, name, "ready", 7, "1", "print", "now", versions)


def wait(board: LocalBoard, needed: int, *, timeout_s: float) -> Reached:
    quorum = Quorum(board, me=lambda: replica("me"))
    return asyncio.run(quorum.wait(needed, VERSION, generation=7, timeout_s=timeout_s))


@pytest.mark.parametrize(("state", "reached"), [("live", 2), ("ready", 2), ("loading", 1)])
def test_a_version_that_is_still_loading_is_not_had(state: State, reached: int) -> None:
    board = LocalBoard()
    board.beat(replica("other", state))

    assert wait(board, 2, timeout_s=0).reached == reached


def test_one_that_is_not_heard_of_for_a_moment_does_not_make_all_fewer() -> None:
    board = LocalBoard()
    board.beat(replica("other"))
    needed = asyncio.run(Quorum(board, me=lambda: replica("me")).needed(Wanted("all")))
    board.leave("other")

    reached = wait(board, needed, timeout_s=0.05)

    assert (reached.wanted, reached.reached, reached.enough) == (2, 1, False)
    assert not reached.hopeless


def test_a_refusal_is_not_waited_for() -> None:
    board = LocalBoard()
    board.beat(replica("other", "failed"))

    reached = wait(board, 2, timeout_s=600)

    assert reached.hopeless
    assert [one.name for one in reached.failed] == ["other"]
