"""What every registry does alike: against a plain model of it, and what is refused."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings

from medley.errors import MedleyError
from service.errors import ConflictError, NotFoundError, PreconditionError
from service.registry.desired import Desired, IfMatch, VersionRecord
from service.registry.local_registry import LocalRegistry
from service.registry.registry import Registry
from tests.redis_server import RedisServer
from tests.service.shared import Cluster
from tests.service.stories import CHANGES, STORIES, Memory, Told, apply, record


@pytest.fixture(params=["local", "shared"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Registry]:
    """A new registry of either kind."""
    if request.param == "local":
        with closing(LocalRegistry(tmp_path / "registry.sqlite")) as local:
            yield local
    else:
        server: RedisServer = request.getfixturevalue("redis_server")
        with closing(Cluster(server, tmp_path / "store")) as cluster:
            yield cluster.replica()


@settings(max_examples=12, deadline=None)
@given(story=STORIES)
def test_any_story_leaves_the_same_in_every_registry(
    story: list[Told], tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer
) -> None:
    folder, memory = tmp_path_factory.mktemp("registry"), Memory()
    path = folder / "registry.sqlite"
    with closing(LocalRegistry(path)) as local, closing(Cluster(redis_server, folder)) as cluster:
        shared = cluster.replica()
        shared.read()
        for change in story:
            told = [outcome(registry, change) for registry in (memory, local, shared)]
            assert told == [told[0]] * 3, change
        here = local.read()
        assert cluster.replica().read() == shared.read()
    with closing(LocalRegistry(path)) as again:
        assert again.read() == here


def outcome(registry: Registry, change: Told) -> Desired | tuple[str, str]:
    """What a registry makes of a change, ids apart: no two changes have the same."""
    try:
        return replace(apply(registry, change), id="")
    except MedleyError as error:
        return error.code, str(error)


def test_a_reader_who_knows_it_already_gets_the_very_same(registry: Registry) -> None:
    known = apply(registry, ("register", "a", "1"))

    assert registry.read(known) is known
    assert apply(registry, ("activate", "a", "1")) == known  # it is so already
    after = apply(registry, ("pin", "a", "1"))
    assert registry.read(known) == after != known


@pytest.mark.parametrize("name", [name for name in CHANGES if name not in ("register", "wait")])
def test_a_change_goes_only_by_the_tag_it_was_told(registry: Registry, name: str) -> None:
    for change in (("register", "a", "1"), ("register", "a", "2"), ("alias", "a", "1")):
        apply(registry, change)
    if name == "unpin":
        apply(registry, ("pin", "a", "2"))
    if name == "delete_version":
        apply(registry, ("wait", "a", "3"))
    before = registry.read()
    apply(registry, ("register", "b", "1"))  # another task's change is none of a's
    change = (name, "a", "3" if name == "delete_version" else "2")

    with pytest.raises(PreconditionError):
        apply(registry, change, IfMatch(frozenset({before.generation - 1, 99})))
    after = apply(registry, change, IfMatch(frozenset({before.generation, 99})))

    assert after.generation == registry.read().generation
    with pytest.raises(NotFoundError):
        apply(registry, (name, "nobody", "1"), IfMatch(any=True))


def test_a_registration_can_ask_for_a_task_that_is_there_and_unchanged(registry: Registry) -> None:
    for nobody in (IfMatch(any=True), IfMatch(frozenset({0}))):
        with pytest.raises(PreconditionError):
            registry.register(record("a", "1"), activate=True, if_match=nobody)
    registry.register(record("a", "1"), activate=True)
    registry.register(record("a", "2"), activate=True, if_match=IfMatch(any=True))

    with pytest.raises(PreconditionError):
        registry.register(record("a", "3"), activate=True, if_match=IfMatch(frozenset({1})))
    after = registry.register(record("a", "3"), activate=True, if_match=IfMatch(frozenset({2})))

    assert after.live == {"a": "3"}


def test_an_alias_and_a_version_are_never_called_the_same(registry: Registry) -> None:
    registry.register(record("a", "1"), activate=True)
    registry.register(record("a", "2"), activate=True)
    before = registry.set_alias("a", "best", "1")

    with pytest.raises(ConflictError, match="has a version 2"):
        registry.set_alias("a", "2", "1")
    for taken in ("best", "live"):
        with pytest.raises(ConflictError, match=f"has an alias {taken}"):
            registry.register(record("a", taken), activate=True)

    assert registry.read() == before


def test_a_refused_change_says_why_and_leaves_the_generation(registry: Registry) -> None:
    registry.register(record("a", "1"), activate=True)
    registry.register(record("a", "2"), activate=False)
    before = registry.set_alias("a", "canary", "2")

    with pytest.raises(ConflictError, match="exists"):
        registry.register(record("a", "1"), activate=True)
    with pytest.raises(ConflictError, match="live before"):
        registry.rollback("a")
    with pytest.raises(ConflictError, match="is live"):
        registry.delete_version("a", "1")
    with pytest.raises(ConflictError, match="canary"):
        registry.delete_version("a", "2")
    with pytest.raises(NotFoundError, match="no task b"):
        registry.delete_task("b")
    with pytest.raises(NotFoundError, match="no version 3"):
        registry.set_alias("a", "live", "3")
    with pytest.raises(NotFoundError, match="no alias best"):
        registry.delete_alias("a", "best")

    assert registry.read() == before


def test_versions_are_in_the_order_in_which_they_came_whatever_the_clock_says(
    registry: Registry,
) -> None:
    for version, time in (("9", "2026"), ("1", "1970"), ("5", "2001")):
        registry.register(VersionRecord("a", version, f"sha256:{version}", time), activate=True)

    after = registry.rollback("a")

    assert [r.version for r in after.tasks["a"]] == ["9", "1", "5"]
    assert after.live == {"a": "1"}
