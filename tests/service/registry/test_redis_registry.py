"""The registry that replicas share: one order of changes, whatever happens to the Redis."""

import itertools
import random
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.bundles.blobs import ID_FILE
from service.errors import (
    PreconditionError,
    RegistryError,
    StorageError,
    UnavailableError,
)
from service.registry.desired import Desired, IfMatch
from service.registry.document import State
from service.registry.hints import listen
from service.registry.redis_client import connect
from service.registry.redis_registry import RedisRegistry
from tests.redis_server import RedisServer, wait_until
from tests.redis_server import redis_server as running_redis
from tests.service.shared import Cluster
from tests.service.stories import record

DURABLE = ("--appendonly", "yes", "--appendfsync", "always")
AT_ONCE = ("--repl-diskless-sync-delay", "0")  # a follower gets all without waiting for a second


@pytest.fixture
def cluster(redis_server: RedisServer, tmp_path: Path) -> Iterator[Cluster]:
    """A prefix and a store of the test's own, on the Redis that all share."""
    with closing(Cluster(redis_server, tmp_path / "store")) as made:
        yield made


@pytest.fixture
def lone(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster on a Redis of the test's own, which writes down every change."""
    with (
        running_redis(tmp_path / "redis", *DURABLE, *AT_ONCE) as server,
        closing(Cluster(server, tmp_path / "store")) as made,
    ):
        yield made


def register(registry: RedisRegistry, task: str) -> Desired:
    return registry.register(record(task, "1"), activate=True)


def calls(registry: RedisRegistry) -> list[Callable[[], Desired]]:
    return [registry.read, lambda: register(registry, "called")]


def test_what_one_replica_changes_all_read(cluster: Cluster) -> None:
    one, other, late = (cluster.replica() for _ in range(3))
    known = other.read()

    after = register(one, "a")

    assert other.read(known) == after == late.read()
    assert (after.generation, after.live) == (1, {"a": "1"})
    assert [registry.recoveries for registry in (one, other, late)] == [0, 0, 0]
    assert one.backup_generation == other.backup_generation == 1


def test_two_prefixes_on_one_redis_know_nothing_of_each_other(
    cluster: Cluster, redis_server: RedisServer, tmp_path: Path
) -> None:
    with closing(Cluster(redis_server, tmp_path / "other")) as second:
        register(cluster.replica(), "a")
        register(second.replica(), "b")

        assert set(cluster.replica().read().tasks) == {"a"}
        assert set(second.replica().read().tasks) == {"b"}
        hashtag = f"{{{cluster.prefix}}}:"
        found = cluster.redis.keys(f"*{cluster.prefix}*")
        assert all(str(name).startswith(hashtag) for name in found)


def test_many_that_change_at_once_all_have_their_change_and_in_one_order(
    cluster: Cluster,
) -> None:
    replicas = [cluster.replica() for _ in range(4)]
    start = threading.Barrier(4)

    def work(number: int) -> list[int]:
        start.wait()
        return [register(replicas[number], f"t{number}-{i}").generation for i in range(8)]

    with ThreadPoolExecutor(4) as threads:
        generations = list(threads.map(work, range(4)))

    assert sorted(itertools.chain(*generations)) == list(range(1, 33))
    assert all(told == sorted(told) for told in generations)
    assert len(replicas[0].read().tasks) == 32


def test_of_two_operators_with_the_same_tag_one_is_told_that_it_has_changed(
    cluster: Cluster,
) -> None:
    first = cluster.replica()
    for version in ("1", "2", "3"):
        first.register(record("a", version), activate=True)
    tag = IfMatch(frozenset({first.read().changed["a"]}))
    start = threading.Barrier(2)

    def change(version: str, if_match: IfMatch | None) -> str:
        replica = cluster.replica()
        replica.read()
        start.wait()
        try:
            return replica.set_alias("a", "best", version, if_match=if_match).aliases["a"]["best"]
        except PreconditionError:
            return "refused"

    with ThreadPoolExecutor(2) as threads:
        told = list(threads.map(change, "12", (tag, tag)))
        assert "refused" in told
        assert {first.read().aliases["a"]["best"], "refused"} == set(told)
        before = first.read()
        assert list(threads.map(change, "23", (None, None))) == ["2", "3"]
    assert first.read().generation >= before.generation + 1
    assert first.read().aliases["a"]["best"] in ("2", "3")


def test_who_listens_hears_of_changes_and_that_listening_has_begun(lone: Cluster) -> None:
    hints = threading.Semaphore(0)
    listener, other = lone.replica(), lone.replica()
    listener.listen(hints.release)

    assert hints.acquire(timeout=5)  # begun
    register(other, "a")
    assert hints.acquire(timeout=5)
    lone.server.restart()
    assert hints.acquire(timeout=5)  # begun anew: something may have been missed
    register(other, "b")
    assert hints.acquire(timeout=5)


def test_who_listens_to_a_silent_redis_listens_anew(lone: Cluster) -> None:
    """Nobody has said anything, and no connection broke: only its silence tells."""
    hints = threading.Semaphore(0)
    with closing(connect(lone.server.url, timeout_s=0.3)) as client:
        end = listen(client, "silence", hints.release, check_s=0.4)
        assert hints.acquire(timeout=5)
        assert not hints.acquire(timeout=1)  # it answers, and that is no hint
        lone.server.freeze()
        assert not hints.acquire(timeout=1.5)
        lone.server.thaw()
        assert hints.acquire(timeout=5)
        end()


@contextmanager
def losing_answers(port: int) -> Iterator[tuple[int, threading.Event]]:
    """A way to a Redis that breaks instead of giving the next answer, once the event is set."""
    armed, threads = threading.Event(), []

    def relay(near: socket.socket) -> None:
        with near, socket.create_connection(("127.0.0.1", port)) as far, suppress(OSError):
            while data := near.recv(1 << 20):
                far.sendall(data)
                answer = far.recv(1 << 20)
                if armed.is_set() and b"HDEL" in data:
                    armed.clear()
                    return
                near.sendall(answer)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threads.append(threading.Thread(target=relay, args=(door.accept()[0],)))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as door:
        threads.append(threading.Thread(target=accept))
        threads[-1].start()
        yield door.getsockname()[1], armed
        door.shutdown(socket.SHUT_RDWR)
    threads[0].join(5)


def test_a_change_whose_answer_got_lost_is_made_once(cluster: Cluster) -> None:
    with losing_answers(cluster.server.port) as (port, armed):
        replica = cluster.replica(url=f"redis://127.0.0.1:{port}/0")
        register(replica, "a")
        armed.set()

        after = register(replica, "b")

        assert not armed.is_set()
        cluster.close()
    assert (after.generation, set(after.tasks)) == (2, {"a", "b"})


LOSSES: dict[str, Callable[[Cluster], object]] = {
    "restarted with its data": lambda lone: lone.server.restart(),
    "restarted with nothing": lambda lone: lone.server.restart(empty=True),
    "emptied": lambda lone: lone.redis.flushall(),
    "the key deleted": lambda lone: lone.lose(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("who", ["the one that made them", "a stale one", "a new one"])
def test_nothing_is_lost_whoever_comes_first_after_a_loss(
    lone: Cluster, loss: str, who: str
) -> None:
    maker, stale = lone.replica(), lone.replica()
    register(stale, "a")
    for task in "bcd":
        before = register(maker, task)
    LOSSES[loss](lone)
    replica = {"the one that made them": maker, "a stale one": stale}.get(who) or lone.replica()

    after = register(replica, "e")

    assert set(after.tasks) == set("abcde")
    assert after.generation > before.generation
    assert replica.recoveries == 1
    assert maker.read() == stale.read() == lone.replica().read() == after
    assert sum(registry.recoveries for registry in (maker, stale)) <= 1


def test_an_older_dump_is_brought_up_to_what_was_acknowledged(lone: Cluster) -> None:
    maker = lone.replica()
    register(maker, "a")
    lone.server.kill()
    shutil.copytree(lone.server.folder, lone.folder / "dump")
    lone.server.start()
    before = register(maker, "b")
    lone.server.kill()
    shutil.rmtree(lone.server.folder)
    shutil.copytree(lone.folder / "dump", lone.server.folder)
    lone.server.start()

    found = lone.replica().read()

    assert set(found.tasks) == {"a", "b"}
    assert found.generation == before.generation + 1  # what was lost may have been one more
    assert maker.read() == found


def test_a_master_that_was_demoted_with_less_is_not_believed(lone: Cluster, tmp_path: Path) -> None:
    """It has the same process, and a state that was confirmed for it; only its line is another."""
    maker = lone.replica()
    register(maker, "a")
    with running_redis(tmp_path / "second", *AT_ONCE) as second, second.client() as there:
        there.replicaof("127.0.0.1", str(lone.server.port))
        wait_until(lambda: there.info("replication").get("master_sync_in_progress") == 0)
        wait_until(lambda: there.info("replication")["master_link_status"] == "up")
        there.replicaof("NO", "ONE")
        before = register(maker, "b")
        lone.redis.replicaof("127.0.0.1", str(second.port))
        wait_until(lambda: lone.redis.info("replication")["master_link_status"] == "up")
        lone.redis.replicaof("NO", "ONE")

        found = lone.replica().read()

    assert set(found.tasks) == {"a", "b"}
    assert found.generation == before.generation + 1


class Killed(BaseException):
    """As far as a thread can be killed."""


def die_at(step: str) -> Callable[[str], None]:
    def on_step(now: str) -> None:
        if now == step:
            raise Killed

    return on_step


@pytest.mark.parametrize("step", ["redis-changed", "backed-up"])
@pytest.mark.parametrize("lost", [False, True])
def test_a_replica_that_dies_in_a_change_leaves_before_or_after(
    cluster: Cluster, step: str, lost: bool
) -> None:
    register(cluster.replica(), "a")
    with pytest.raises(Killed):
        register(cluster.replica(on_step=die_at(step)), "b")
    if lost:
        cluster.lose()

    found = cluster.replica().read()

    made = step == "backed-up" or not lost
    assert set(found.tasks) == ({"a", "b"} if made else {"a"})
    assert State.from_json(cluster.copies[-1].read_text()).desired() == found
    assert set(register(cluster.replica(), "c").tasks) == {*found.tasks, "c"}


def test_a_change_that_was_never_acknowledged_does_not_come_back_over_one_that_was(
    lone: Cluster,
) -> None:
    """Redis had it, and no copy; then an older dump; then another change; then its own file."""
    register(lone.replica(), "a")
    with pytest.raises(Killed):
        register(lone.replica(on_step=die_at("redis-changed")), "never")
    lone.server.kill()
    shutil.move(lone.server.folder, lone.folder / "with-it")
    lone.server.folder.mkdir()
    lone.server.start()
    before = register(lone.replica(), "b")
    lone.server.kill()
    shutil.rmtree(lone.server.folder)
    shutil.move(lone.folder / "with-it", lone.server.folder)
    lone.server.start()

    assert set(lone.replica().read().tasks) == set(before.tasks) == {"a", "b"}


def test_without_the_store_no_change_is_acknowledged_and_nothing_unkept_is_told(
    cluster: Cluster,
) -> None:
    one, other = cluster.replica(), cluster.replica()
    before = register(one, "a")
    assert other.read() == before
    away = cluster.folder.rename(cluster.folder.with_name("away"))

    with pytest.raises(StorageError):
        register(one, "b")
    with pytest.raises(StorageError):
        other.read(before)
    away.rename(cluster.folder)

    after = other.read(before)
    assert set(after.tasks) == {"a", "b"}  # made all the same, and kept now
    assert one.read() == after
    assert State.from_json(cluster.copies[-1].read_text()).desired() == after


@pytest.mark.parametrize("lost", [False, True])
def test_a_damaged_copy_stands_in_nobodys_way(cluster: Cluster, lost: bool) -> None:
    maker = cluster.replica()
    for task in "ab":
        before = register(maker, task)
    cluster.copies[-1].write_bytes(b"{")
    if lost:
        cluster.lose()

    after = register(cluster.replica(), "c")

    assert set(after.tasks) == ({"a", "c"} if lost else {"a", "b", "c"})  # it was all there was
    assert after.generation > before.generation
    cluster.lose()
    assert cluster.replica().read().tasks == after.tasks


def test_a_frozen_redis_is_away_in_time_and_back_by_itself(lone: Cluster) -> None:
    replica = lone.replica(timeout_s=0.3)
    before = register(replica, "a")
    lone.server.freeze()
    for call in calls(replica):
        with pytest.raises(UnavailableError, match="did not answer in time") as caught:
            call()
        assert caught.value.code == "registry_unavailable"
        assert not replica.up
    lone.server.thaw()

    after = replica.read()  # it may have read what was sent to it meanwhile
    assert after.generation - before.generation in (0, 1)
    assert replica.up
    assert replica.recoveries == 0


def test_a_redis_that_is_away_is_said_to_be_and_used_again_when_it_is_back(lone: Cluster) -> None:
    replica = lone.replica()
    lone.server.kill()
    for _ in range(2):
        with pytest.raises(UnavailableError, match="cannot be reached") as caught:
            replica.read()
        assert not isinstance(caught.value, RegistryError)
        assert not replica.up
    lone.server.start()

    assert register(replica, "a").generation == 1
    assert replica.up


def test_a_redis_that_is_full_takes_no_change_and_answers_reads(lone: Cluster) -> None:
    replica = lone.replica()
    before = register(replica, "a")
    lone.redis.config_set("maxmemory", "1")
    with pytest.raises(UnavailableError, match="no memory left"):
        register(replica, "b")
    assert replica.read() == before
    lone.redis.config_set("maxmemory", "0")
    assert register(replica, "b").generation == before.generation + 1


def test_a_replica_of_another_store_is_refused_at_its_start(
    cluster: Cluster, tmp_path: Path
) -> None:
    before = register(cluster.replica(), "a")
    with closing(Cluster(cluster.server, tmp_path / "other")) as second:
        for _ in range(2):
            with pytest.raises(RegistryError, match="another bundle store") as caught:
                second.replica(prefix=cluster.prefix).read()
            assert caught.value.code == "registry_foreign"
        with pytest.raises(RegistryError):
            register(second.replica(prefix=cluster.prefix), "b")
        cluster.redis.hset(cluster.key, "confirmed", "another")
        with pytest.raises(RegistryError):  # before it recovers what is none of its own
            second.replica(prefix=cluster.prefix).read()
    assert cluster.replica().read() == before


def test_a_replica_with_another_backbone_is_refused_even_where_redis_has_lost_all(
    cluster: Cluster,
) -> None:
    before = register(cluster.replica(), "a")
    for _ in range(2):
        with pytest.raises(RegistryError, match="another backbone"):
            cluster.replica(backbone="sha256:" + "cd" * 32).read()
        cluster.lose()
    assert cluster.replica().read().tasks == before.tasks


FOREIGN: dict[str, tuple[Callable[[Cluster], object], str]] = {
    "a newer state": (
        lambda cluster: cluster.redis.hset(
            cluster.key, mapping={"id": "x", "document": '{"format": 99}'}
        ),
        "newer Medley: its format is 99",
    ),
    "garbage": (
        lambda cluster: cluster.redis.hset(cluster.key, mapping={"id": "x", "document": "{"}),
        "no state of one",
    ),
    "another type": (
        lambda cluster: cluster.redis.eval(
            "redis.call('DEL', KEYS[1]); redis.call('SET', KEYS[1], 'mine')", 1, cluster.key
        ),
        "another program's data",
    ),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_data_ends_a_start_and_is_an_outage_for_who_runs(
    cluster: Cluster, what: str
) -> None:
    make, said = FOREIGN[what]
    running = cluster.replica()
    before = register(running, "a")
    make(cluster)

    with pytest.raises(RegistryError, match=said) as caught:
        cluster.replica().read()
    assert "\n" not in str(caught.value)
    for call in calls(running):
        with pytest.raises(UnavailableError, match=said) as refused:
            call()
        assert refused.value.code == "registry_unavailable"
        assert not running.up

    cluster.lose()  # what an operator does about it
    assert running.read().tasks == before.tasks


def test_a_store_that_was_copied_to_another_place_brings_its_tasks_along(
    cluster: Cluster, redis_server: RedisServer, tmp_path: Path
) -> None:
    before = register(cluster.replica(), "a")
    moved = tmp_path / "moved"
    shutil.copytree(cluster.folder, moved, ignore=shutil.ignore_patterns(ID_FILE))
    with closing(Cluster(redis_server, moved)) as second:
        found = second.replica().read()
        assert found.tasks == before.tasks
        assert register(second.replica(), "b").generation == found.generation + 1


NOTHING = Desired(generation=-1)
ACTS = ("register", "read", "die in a change", "lose", "go back", "restart", "forget")


@settings(max_examples=25, deadline=None)
@given(
    acts=st.lists(st.tuples(st.sampled_from(ACTS), st.integers(0, 2)), min_size=4, max_size=25),
    seed=st.integers(0, 2**16),
)
def test_whatever_happens_to_redis_no_acknowledged_change_is_lost_and_nobody_goes_back(
    acts: list[tuple[str, int]],
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
    redis_server: RedisServer,
) -> None:
    """What a restart brings back is an older hash, confirmed for a Redis that is no more.

    Going back is what only a hand can do: an older hash that Redis believes. Who has not seen more
    reads it then, until anybody makes a change, or looks who has.
    """
    chance = random.Random(seed)
    acknowledged: set[str] = set()
    told = [NOTHING] * 3
    with closing(Cluster(redis_server, tmp_path_factory.mktemp("store"))) as cluster:
        replicas = [cluster.replica() for _ in range(3)]
        dumps: list[Any] = [{}]
        for number, (act, who) in enumerate(acts):
            dumps.append(cluster.redis.hgetall(cluster.key))
            match act:
                case "register":
                    found = register(replicas[who], f"t{number}")
                    acknowledged.add(f"t{number}")
                case "read":
                    found = replicas[who].read(told[who])
                case "die in a change":
                    step = chance.choice(["redis-changed", "backed-up"])
                    with suppress(Killed):
                        register(cluster.replica(on_step=die_at(step)), f"t{number}")
                    continue
                case "forget":  # a replica that begins anew
                    replicas[who], told[who] = cluster.replica(), NOTHING
                    continue
                case _:
                    _damage(cluster, act, chance.choice(dumps))
                    continue
            assert found.generation >= told[who].generation
            assert found.generation > told[who].generation or found == told[who]
            told[who] = found
            if "go back" not in {act for act, _ in acts}:
                assert acknowledged <= set(found.tasks)
        last = register(replicas[0], "last")
        assert acknowledged <= set(last.tasks)
        assert [replica.read() for replica in replicas] == [last] * 3


def _damage(cluster: Cluster, act: str, dump: Any) -> None:
    cluster.lose()
    if act != "lose" and dump:
        gone = {"confirmed": "a Redis that is no more"} if act == "restart" else {}
        cluster.redis.hset(cluster.key, mapping=dump | gone)
