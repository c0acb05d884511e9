"""What the shared store forgets, and what it never does: with a real Redis, two replicas each."""

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from medley.sealed import pack
from service.bundles.blobs import Blobs
from service.bundles.collector import Collected, Collector
from service.bundles.ledger import ARRIVING_S, Ledger
from service.bundles.shared_store import SharedStore
from service.bundles.store import BundleStore
from service.errors import NotFoundError, StorageError, UnavailableError
from service.registry.backup import Backup
from service.registry.desired import VersionRecord
from service.registry.redis_client import connect, key
from service.registry.redis_registry import RedisRegistry
from service.signals.metrics import Metrics
from tests.redis_server import RedisServer

BUNDLES = [pack(f'{{"number":{number}}}', {}) for number in range(3)]
DIGESTS = ["sha256:" + data.split(b'seal\\":\\"')[1][:64].decode() for data in BUNDLES]


class Replica:
    """Registry, store and collector of one replica of a cluster."""

    def __init__(
        self,
        folder: Path,
        redis: RedisServer,
        *,
        url: str,
        prefix: str,
        keep_s: float = 0,
        arriving_s: float = 0,
        condemned_s: float = 5,
    ) -> None:
        self.client = connect(redis.url, timeout_s=2)
        self.prefix = prefix
        self.ledger = Ledger(
            self.client, prefix=prefix, arriving_s=arriving_s, condemned_s=condemned_s
        )
        self.blobs = Blobs(url, timeout_s=2)
        self.shared = SharedStore(self.blobs, announce=self.ledger.announce)
        self.store = BundleStore(folder, self.shared)
        self.registry = RedisRegistry(
            self.client, prefix=prefix, backup=Backup(self.blobs), backbone="b"
        )
        self.in_use: set[str] = set()
        self.between: Callable[[], object] = lambda: None  # called while it collects
        self.metrics = Metrics()
        self.keep_s = keep_s
        self.make_collector()

    def make_collector(self) -> None:
        self.collector = Collector(
            registry=self.registry,
            store=self.store,
            ledger=self.ledger,
            in_use=self._used,
            keep_s=self.keep_s,
            metrics=self.metrics,
        )

    def close(self) -> None:
        self.store.close()
        self.client.close()

    def keep(self, number: int) -> None:
        """Publish a bundle, as a registration does first."""
        with self.store.upload(10**6) as upload:
            upload.write(BUNDLES[number])
            upload.finish()
            self.store.keep(upload, DIGESTS[number])

    def commit(self, number: int, version: str = "1") -> None:
        """Name it, as a registration does next."""
        record = VersionRecord(f"task-{number}", version, DIGESTS[number], "now", 1)
        self.registry.register(record, activate=True)

    def commit_fused(self, number: int, unified: int) -> None:
        """Name a bundle and the unified model that it is a part of."""
        record = VersionRecord(
            f"task-{number}", "1", DIGESTS[number], "now", 1, "lora", DIGESTS[unified]
        )
        self.registry.register(record, activate=True)

    def register(self, number: int) -> None:
        self.keep(number)
        self.commit(number)

    def delete(self, number: int) -> None:
        self.registry.delete_task(f"task-{number}")

    def collect(self, *, dry_run: bool = False) -> Collected:
        found = self.collector.collect(dry_run=dry_run)
        assert found is not None
        return found

    def _used(self) -> set[str]:
        self.between()
        return self.in_use


Open = Callable[..., Replica]


@pytest.fixture
def opened(redis_server: RedisServer, tmp_path: Path) -> Iterator[Open]:
    """Open a replica of one cluster by a name."""
    prefix = secrets.token_hex(8)
    with ExitStack() as stack:

        def open_replica(name: str, **options: float) -> Replica:
            url = str(tmp_path / "shared")
            replica = Replica(tmp_path / name, redis_server, url=url, prefix=prefix, **options)
            stack.callback(replica.close)
            return replica

        yield open_replica


def test_a_unified_model_stays_until_the_last_version_that_names_it_is_gone(opened: Open) -> None:
    one, other = opened("one"), opened("other")
    for number in range(3):
        one.keep(number)
    one.commit_fused(0, 2)
    one.commit_fused(1, 2)
    assert one.collect().named == set(DIGESTS[:3])

    one.delete(0)
    assert one.collect().deleted == {DIGESTS[0]}
    one.shared.remove(DIGESTS[2])
    assert other.collect().lost == {DIGESTS[2]}
    assert one.collect().mended == {DIGESTS[2]}
    one.delete(1)

    assert one.collect().deleted == {DIGESTS[1], DIGESTS[2]}
    assert one.shared.digests() == set()


def test_a_file_that_is_about_to_be_named_again_is_spared(opened: Open) -> None:
    one, other = opened("one"), opened("other", arriving_s=60)
    one.keep(0)
    other.store.spare(DIGESTS[0])  # its bytes are there: nothing is put

    assert one.collect().deleted == set()
    one.commit_fused(1, 0)
    assert one.collect().named >= {DIGESTS[0]}


def test_a_bundle_that_nobody_needs_any_more_goes_and_no_other(opened: Open) -> None:
    one, other = opened("one"), opened("other")
    one.register(0)
    other.register(1)
    assert one.collect() == Collected(frozenset(DIGESTS[:2]), {}, frozenset())

    other.delete(0)
    found = one.collect()

    assert found.deleted == {DIGESTS[0]}
    assert found.named == {DIGESTS[1]}
    assert one.shared.digests() == {DIGESTS[1]}
    assert one.metrics.registry.get_sample_value("medley_store_collected_total") == 1
    for state, count in {"named": 1, "unused": 0, "lost": 0}.items():
        value = one.metrics.registry.get_sample_value("medley_store_bundles", {"state": state})
        assert value == count


def test_what_some_version_still_names_stays_when_another_goes(opened: Open) -> None:
    one = opened("one")
    one.register(0)
    one.registry.register(VersionRecord("same", "1", DIGESTS[0], "now", 1), activate=True)
    one.delete(0)

    assert one.collect().deleted == frozenset()
    assert one.shared.digests() == {DIGESTS[0]}


def test_what_a_replica_uses_stays_until_it_does_not(opened: Open) -> None:
    one = opened("one")
    one.register(0)
    one.delete(0)
    one.in_use = {DIGESTS[0]}
    assert one.collect().deleted == frozenset()

    one.in_use = set()
    assert one.collect().deleted == {DIGESTS[0]}


def test_what_is_unused_is_kept_for_a_while_by_the_clock_of_redis(opened: Open) -> None:
    one, other = opened("one", keep_s=100), opened("other", keep_s=100)
    one.register(0)
    one.delete(0)

    first, second = one.collect(), other.collect()
    assert not first.deleted | second.deleted
    assert second.unused_s[DIGESTS[0]] > first.unused_s[DIGESTS[0]] >= 0

    unused = key(one.prefix, "unused")
    one.client.zincrby(unused, -99, DIGESTS[0])
    assert not other.collect().deleted
    one.client.zincrby(unused, -2, DIGESTS[0])
    assert other.collect().deleted == {DIGESTS[0]}


def test_what_was_used_in_between_is_kept_from_the_beginning_again(opened: Open) -> None:
    one = opened("one", keep_s=100)
    one.register(0)
    one.delete(0)
    one.collect()
    one.client.zincrby(key(one.prefix, "unused"), -99, DIGESTS[0])
    one.keep(0)

    assert one.collect().unused_s[DIGESTS[0]] < 50


def test_what_arrives_is_spared_though_nobody_needs_it_yet(opened: Open) -> None:
    one, other = opened("one", arriving_s=100), opened("other")
    one.keep(0)

    found = other.collect()

    assert not found.deleted
    assert list(found.unused_s) == [DIGESTS[0]]
    one.commit(0)
    assert other.collect().named == {DIGESTS[0]}


def test_a_bundle_that_arrives_while_it_is_looked_at_is_spared(opened: Open) -> None:
    one, other = opened("one", arriving_s=100), opened("other")
    other.register(0)
    other.delete(0)
    other.between = partial(one.keep, 0)

    assert not other.collect().deleted


def test_nothing_goes_if_the_state_has_changed_since_it_was_looked_at(opened: Open) -> None:
    one, other = opened("one"), opened("other")
    other.register(0)
    other.delete(0)
    other.between = partial(one.register, 1)
    assert not other.collect().deleted

    other.between = lambda: None
    assert other.collect().deleted == {DIGESTS[0]}


def test_a_bundle_that_is_being_deleted_arrives_after_that(opened: Open) -> None:
    one, other = opened("one"), opened("other", condemned_s=0.2)
    one.register(0)
    one.delete(0)
    desired = one.registry.read()
    one.ledger.mark(DIGESTS[:1])
    assert one.ledger.condemn(DIGESTS[0], desired=desired, keep_s=0)

    with pytest.raises(StorageError) as caught:
        other.ledger.announce(DIGESTS[0])
    assert caught.value.code == "store_unavailable"

    one.ledger.release(DIGESTS[0])
    other.ledger.announce(DIGESTS[0])


def test_a_deletion_that_nobody_ended_ends_by_itself(opened: Open) -> None:
    one, other = opened("one", condemned_s=0.2), opened("other")
    one.register(0)
    one.delete(0)
    one.ledger.mark(DIGESTS[:1])
    assert one.ledger.condemn(DIGESTS[0], desired=one.registry.read(), keep_s=0)

    other.ledger.announce(DIGESTS[0])


def test_one_replica_at_a_time_collects(opened: Open) -> None:
    one, other = opened("one"), opened("other")
    found: list[Collected | None] = []
    one.between = lambda: found.append(other.collector.collect())

    one.collect()

    assert found == [None]
    other.collect()


def test_without_redis_nothing_goes(redis_server: RedisServer, tmp_path: Path) -> None:
    """A server of its own, as it is killed."""
    own = RedisServer(tmp_path / "redis")
    own.start()
    replica = Replica(tmp_path / "one", own, url=str(tmp_path / "shared"), prefix="medley")
    try:
        replica.register(0)
        replica.delete(0)
        own.kill()
        with pytest.raises(UnavailableError):
            replica.collector.collect()
        assert replica.shared.digests() == {DIGESTS[0]}

        own.start()  # with nothing, or with what it wrote: either way another life
        replica.ledger.mark(DIGESTS[:1])
        found = replica.collect()
        assert replica.registry.recoveries == 1
        assert found.deleted == {DIGESTS[0]}
    finally:
        replica.close()
        own.kill()


def test_a_clock_of_an_earlier_life_of_redis_is_not_believed(opened: Open) -> None:
    one = opened("one", keep_s=100)
    one.register(0)
    one.delete(0)
    one.collect()
    one.client.zincrby(key(one.prefix, "unused"), -1000, DIGESTS[0])
    one.client.set(key(one.prefix, "unused-epoch"), "another")

    found = one.collect()

    assert not found.deleted
    assert found.unused_s[DIGESTS[0]] < 50


def test_a_store_that_is_away_is_not_taken_for_an_empty_one(opened: Open, tmp_path: Path) -> None:
    one = opened("one")
    one.register(0)
    (tmp_path / "shared").rename(tmp_path / "away")

    with pytest.raises(StorageError):
        one.collector.collect()

    (tmp_path / "away").rename(tmp_path / "shared")
    assert one.collect().named == {DIGESTS[0]}


def test_a_deletion_that_fails_is_tried_again_and_nothing_arrives_meanwhile(
    opened: Open, tmp_path: Path
) -> None:
    one, other = opened("one", condemned_s=60), opened("other", condemned_s=0.1)
    one.register(0)
    one.delete(0)
    one.between = lambda: (tmp_path / "shared").rename(tmp_path / "away")
    with pytest.raises(StorageError):
        one.collector.collect()
    (tmp_path / "away").rename(tmp_path / "shared")
    one.between = lambda: None
    with pytest.raises(StorageError, match="being deleted"):
        other.ledger.announce(DIGESTS[0])

    one.client.delete(f"{key(one.prefix, 'condemned')}:{DIGESTS[0]}")  # as if a minute had passed
    assert one.collect().deleted == {DIGESTS[0]}


def test_a_lost_bundle_is_put_back_by_whoever_has_it(opened: Open, tmp_path: Path) -> None:
    one, other = opened("one"), opened("other")
    one.register(0)
    one.shared.remove(DIGESTS[0])

    assert other.collect().lost == {DIGESTS[0]}
    assert one.collect().mended == {DIGESTS[0]}
    assert other.collect() == Collected(frozenset(DIGESTS[:1]), {}, frozenset())


class Stale(SharedStore):
    """Lists what was there a while ago, as a mounted folder may."""

    def digests(self) -> frozenset[str]:
        return frozenset()


def test_a_listing_that_is_a_little_old_loses_nothing(opened: Open) -> None:
    one = opened("one")
    one.register(0)
    one.store.shared = Stale(one.blobs, announce=one.ledger.announce)
    one.make_collector()

    assert one.collect() == Collected(frozenset(), {}, frozenset())


def test_a_dry_run_changes_nothing(opened: Open) -> None:
    one = opened("one")
    one.register(0)
    one.register(1)
    one.delete(0)
    one.shared.remove(DIGESTS[1])

    found = one.collect(dry_run=True)

    assert list(found.unused_s) == [DIGESTS[0]]
    assert found.lost == {DIGESTS[1]}
    assert one.shared.digests() == {DIGESTS[0]}


def test_foreign_files_stay_and_halves_go_when_nobody_can_be_writing_them(
    opened: Open, tmp_path: Path
) -> None:
    one = opened("one")
    one.register(0)
    for name in ("bundles/README", "registry/x", "incoming/half", "mine"):
        (tmp_path / "shared" / name).write_bytes(b"x")
    one.collect()
    assert (tmp_path / "shared" / "incoming" / "half").exists()

    one.client.zincrby(key(one.prefix, "unused"), -ARRIVING_S, "incoming/half")
    one.collect()

    assert not (tmp_path / "shared" / "incoming" / "half").exists()
    for name in ("bundles/README", "registry/x", "mine"):
        assert (tmp_path / "shared" / name).exists()


def test_collecting_goes_on_after_a_failure_until_it_is_stopped(opened: Open) -> None:
    one = opened("one")
    one.register(0)
    one.delete(0)

    async def collect_thrice() -> None:
        loop, third = asyncio.get_running_loop(), asyncio.Event()
        passes = iter(["fails", "deletes"])

        def between() -> None:
            match next(passes, None):
                case "fails":
                    raise UnavailableError("the board is away")
                case None:
                    loop.call_soon_threadsafe(third.set)

        one.between = between
        running = asyncio.create_task(one.collector.run(first_s=0, every_s=0.01))
        async with asyncio.timeout(10):
            await third.wait()
        running.cancel()
        await asyncio.wait([running])
        assert running.cancelled()

    asyncio.run(collect_thrice())
    assert one.shared.digests() == set()


class Deleting(SharedStore):
    """Lets something else happen before and after each deletion."""

    around: Callable[[str], None] = staticmethod(lambda digest: None)

    def remove(self, digest: str) -> None:
        self.around(digest)
        super().remove(digest)
        self.around(digest)


Act = tuple[str, int, int]  # what, by which replica, with which bundle


class Play:
    """Acts of two replicas, one after the other or one within another.

    While one collects, the next acts happen between its reading and its judging, and before and
    after each deletion. Nothing is kept longer than it must be: an announcement ends as soon as no
    registration is on its way.
    """

    def __init__(self, replicas: list[Replica], acts: Iterable[Act]) -> None:
        self.replicas = replicas
        self.coming = iter(acts)
        self.condemned: str | None = None
        self.arriving: Counter[int] = Counter()
        self.collected: list[str] = []
        for replica in replicas:
            shared = Deleting(replica.blobs, announce=replica.ledger.announce)
            shared.around = self.deleting
            replica.store.shared = shared
            replica.between = self.next_act
            replica.make_collector()

    def play(self) -> None:
        while self.next_act():
            pass

    def next_act(self) -> bool:
        act = next(self.coming, None)
        if act is not None:
            what, who, number = act
            getattr(self, what)(self.replicas[who], number)
            named = {record.digest for record in self.replicas[0].registry.read().versions}
            assert named <= self.replicas[0].shared.digests()
        return act is not None

    def deleting(self, digest: str) -> None:
        self.condemned = digest
        self.next_act()
        self.condemned = None

    def keep(self, replica: Replica, number: int) -> None:
        if DIGESTS[number] != self.condemned:  # it would wait for the end of this
            replica.keep(number)
            self.arriving[number] += 1

    def commit(self, replica: Replica, number: int) -> None:
        if self.arriving[number]:
            replica.commit(number, version=secrets.token_hex(4))
            self.give_up(replica, number)

    def give_up(self, replica: Replica, number: int) -> None:
        self.arriving -= Counter([number])
        if not self.arriving[number]:
            replica.client.zrem(key(replica.prefix, "arriving"), DIGESTS[number])

    def delete(self, replica: Replica, number: int) -> None:
        with suppress(NotFoundError):
            replica.delete(number)

    def collect(self, replica: Replica, number: int) -> None:
        found = replica.collector.collect()
        self.collected += [] if found is None else sorted(found.deleted)


@contextmanager
def on_stage(redis: RedisServer, folder: Path, acts: Iterable[Act]) -> Iterator[Play]:
    prefix = secrets.token_hex(8)
    url = f"memory://{prefix}/store"
    with ExitStack() as stack:
        replicas = [
            Replica(folder / prefix / name, redis, url=url, prefix=prefix, arriving_s=1000)
            for name in ("one", "other")
        ]
        for replica in replicas:
            stack.callback(replica.close)
        yield Play(replicas, acts)


def test_a_play_collects_what_is_deleted_or_given_up(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    """Else the next test would show nothing."""
    acts = [("keep", 0, 0), ("commit", 0, 0), ("keep", 1, 1), ("delete", 1, 0), ("give_up", 1, 1)]
    with on_stage(redis_server, tmp_path, [*acts, ("collect", 0, 0)]) as play:
        play.play()

        assert play.collected == sorted(DIGESTS[:2])
        assert play.replicas[0].shared.digests() == set()


@example(acts=[("keep", 0, 0), ("collect", 0, 0), ("commit", 0, 0)])  # between look and judgement
@example(acts=[("keep", 0, 0), ("collect", 0, 0), ("keep", 1, 0), ("give_up", 0, 0)])
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    acts=st.lists(
        st.tuples(
            st.sampled_from(["keep", "commit", "give_up", "delete", "collect", "collect"]),
            st.integers(0, 1),
            st.integers(0, len(BUNDLES) - 1),
        ),
        max_size=30,
    )
)
def test_no_bundle_that_a_state_names_is_ever_lost(
    redis_server: RedisServer, tmp_path: Path, acts: list[Act]
) -> None:
    with on_stage(redis_server, tmp_path, acts) as play:
        play.play()
