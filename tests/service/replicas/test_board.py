"""The board: who is alive by Redis' clock, and words that nobody understands."""

import asyncio
import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from medley.backbone import Backbone
from service.errors import UnavailableError
from service.registry.redis_client import connect, key
from service.replicas.board import LocalBoard, Phase, RedisBoard, Replica, VersionState
from service.replicas.heartbeat import Heartbeat
from service.signals.metrics import Metrics
from service.versions.operations import Operation
from tests.redis_server import RedisServer, free_port
from tests.service.residence import residence

ONE = Replica(
    "1", "a", "ready", 3, "0.1", "sha256:0", "2026", {"t@1": VersionState("d", "live", "device")}
)
TWO = replace(
    ONE,
    id="2",
    name="b",
    versions={"t@2": VersionState("e", "failed", "disk", "why", 2, unified="u")},
)


@pytest.fixture
def prefix() -> str:
    return uuid.uuid4().hex


def board_on(redis: RedisServer, prefix: str, ttl_s: float = 60.0) -> RedisBoard:
    return RedisBoard(connect(redis.url, timeout_s=5), prefix=prefix, ttl_s=ttl_s)


def test_what_replicas_say_is_what_others_read(redis_server: RedisServer, prefix: str) -> None:
    board, other = board_on(redis_server, prefix), board_on(redis_server, prefix)
    assert board.replicas() == []
    assert (board.beat(TWO), other.beat(ONE)) == (1, 2)
    assert other.replicas() == [ONE, TWO]
    assert board.files() == {"d", "e", "u"}
    assert board.beat(replace(ONE, generation=4)) == 2
    assert [one.generation for one in board.replicas()] == [4, 3]
    board.leave("1")
    assert board.replicas() == [TWO]
    assert board_on(redis_server, uuid.uuid4().hex).replicas() == []


def test_who_is_not_heard_of_for_its_time_is_gone(redis_server: RedisServer, prefix: str) -> None:
    lasting, brief = board_on(redis_server, prefix), board_on(redis_server, prefix, ttl_s=0.001)
    lasting.beat(ONE)
    brief.beat(TWO)
    until_at = time.monotonic() + 20
    while len(lasting.replicas()) > 1:  # a millisecond by Redis' clock
        assert time.monotonic() < until_at
    assert lasting.replicas() == [ONE]
    assert lasting.beat(ONE) == 1
    with redis_server.client() as redis:
        assert redis.hkeys(key(prefix, "replicas")) == ["1"]
        assert redis.pttl(key(prefix, "replicas")) > 50_000


def test_words_that_are_not_understood_are_left_out(
    redis_server: RedisServer, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    board = board_on(redis_server, prefix)
    for one in (ONE, TWO):
        board.beat(one)
    with redis_server.client() as redis:
        redis.hset(key(prefix, "replicas"), "2", '{"id": "2", "of": "a newer one"}')
    assert board.replicas() == [ONE]
    assert "not understood" in caplog.text


def test_operations_are_known_by_their_id(redis_server: RedisServer, prefix: str) -> None:
    board = board_on(redis_server, prefix)
    told = Operation("7", "register", "t", "1", "2026", replica="1", replicas={"wanted": 2})
    assert board.operation("7") is None
    board.tell(told)
    assert board_on(redis_server, prefix).operation("7") == told
    with redis_server.client() as redis:
        assert 0 < redis.ttl(key(prefix, "operation:7")) <= 3600


def test_a_board_that_is_away_says_so() -> None:
    board = RedisBoard(
        connect(f"redis://127.0.0.1:{free_port()}/0", timeout_s=1), prefix="x", ttl_s=1
    )
    with pytest.raises(UnavailableError) as caught:
        board.beat(ONE)
    assert caught.value.code == "registry_unavailable"


def test_a_stop_in_the_moment_of_news_ends(tmp_path: Path, backbone: Backbone) -> None:
    """A cancellation that meets what is waited for must not be lost."""

    async def story() -> None:
        async with residence(tmp_path / "store", backbone) as here:
            for _ in range(20):
                board, phases = LocalBoard(), Phases("starting", "ready")
                heartbeat = Heartbeat(
                    board,
                    here.residency,
                    name="a",
                    fingerprint="",
                    phase=phases,
                    ttl_s=60.0,
                    metrics=Metrics(),
                )
                heartbeat.start()
                await asyncio.sleep(0.03)  # it has beaten, and waits for news
                phases.go_on()
                heartbeat.look()
                async with asyncio.timeout(20):
                    await heartbeat.close()
                assert board.replicas() == []

    asyncio.run(story())


class Phases:
    """Phases, one after the other as it is told."""

    def __init__(self, *phases: Phase) -> None:
        self._phases = list(phases)

    def go_on(self) -> None:
        self._phases.pop(0)

    def __call__(self) -> Phase:
        return self._phases[0]
