"""Following a state as a whole: what is loaded before the flip, and what if it cannot be."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medley.backbone import Backbone
from medley.bundle import Bundle
from service.errors import StorageError, UnavailableError
from service.registry.desired import LIVE, Desired, VersionRecord
from service.versions.live import Key
from tests.service.conftest import MakeBundle
from tests.service.residence import Residence, residence, truth

Made = tuple[Bundle, bytes]
A, B, C, D = ("a", "1"), ("b", "1"), ("c", "1"), ("a", "2")
KEYS = (A, B, C, D)
Story = Callable[[Residence], Awaitable[None]]


@pytest.fixture(scope="module")
def made(make: MakeBundle) -> dict[Key, Made]:
    """Three tasks, the first in two versions."""
    return {key: make(task=key[0], version=key[1], seed=n) for n, key in enumerate(KEYS)}


@pytest.fixture(scope="module")
def expected(made: dict[Key, Made], backbone: Backbone) -> dict[Key, Tensor]:
    """What each of them makes of an image, by a model that has it alone."""
    return truth(backbone, [bundle for bundle, _ in made.values()])


@pytest.fixture
def play(tmp_path: Path, backbone: Backbone, made: dict[Key, Made]) -> Callable[..., None]:
    """Run a story on a replica whose shared store has all the bundles."""

    def played(story: Story, **fields: object) -> None:
        async def main() -> None:
            shared = tmp_path / "shared"
            given = {"paths": 8, "shared": shared} | fields
            async with residence(tmp_path / "store", backbone, **given) as here:  # type: ignore[arg-type]
                for bundle, data in made.values():
                    publish(here, bundle, data)
                await story(here)

        asyncio.run(main())

    return played


def publish(here: Residence, bundle: Bundle, data: bytes) -> None:
    """Let the shared store have a bundle."""
    assert here.store.shared is not None
    path = here.store.folder / "upload"
    path.write_bytes(data)
    here.store.shared.publish(bundle.digest, path)


def record_of(made: Made) -> VersionRecord:
    manifest = made[0].manifest
    return VersionRecord(manifest.task, manifest.version, made[0].digest, "2026", len(made[1]))


def state(generation: int, made: dict[Key, Made], *keys: Key, live: bool = True) -> Desired:
    """A state with these versions, the last of each task live."""
    return Desired(
        generation,
        id=str(generation),
        versions=tuple(record_of(made[key]) for key in keys),
        aliases={task: {LIVE: version} for task, version in keys} if live else {},
    )


def test_until_all_is_loaded_the_old_state_answers_and_then_the_new_one_does(
    play: Callable[..., None], made: dict[Key, Made], expected: dict[Key, Tensor]
) -> None:
    async def story(here: Residence) -> None:
        live = here.residency.live
        await here.residency.follow(state(1, made, A))
        seen: list[tuple[int, set[Key]]] = []
        live.after_flip.append(
            lambda: seen.append((live.snapshot.desired.generation, set(live.snapshot.residents)))
        )
        entered, gate = threading.Event(), threading.Event()

        def hold() -> None:
            entered.set()
            gate.wait()

        here.engine.run(hold)
        following = asyncio.create_task(here.residency.follow(state(5, made, B, C, D)))
        await asyncio.to_thread(entered.wait)
        before = live.snapshot
        gate.set()
        await following
        assert before.desired.generation == 1
        assert seen == [(5, {B, C, D})]
        for key in (B, C, D):
            assert torch.equal(await here.ask(key), expected[key])

    play(story)


def test_while_a_bundle_cannot_be_had_the_old_state_stays_and_nothing_is_loaded_twice(
    play: Callable[..., None], made: dict[Key, Made], tmp_path: Path
) -> None:
    bundles = tmp_path / "shared" / "bundles"

    async def story(here: Residence) -> None:
        await here.residency.follow(state(1, made, A))
        await here.residency.follow(state(2, made, A, B, live=False))
        loads = here.metric("medley_bundle_loads_total", result="ok")
        await here.residency.bring(B)
        away = bundles.parent.rename(tmp_path / "away")
        for attempt in (1, 2):
            with pytest.raises((StorageError, UnavailableError)):
                await here.residency.follow(state(3, made, B, C))
            snapshot = here.residency.live.snapshot
            assert (snapshot.desired.generation, set(snapshot.residents)) == (2, {A, B})
            assert here.residency.lacking.keys() == {C}
            assert here.residency.attempts(C) == attempt
        away.rename(bundles.parent)
        await here.residency.follow(state(3, made, B, C))
        assert here.on_device == {"b@1", "c@1"}
        assert not here.residency.lacking
        assert here.residency.attempts(C) == 0
        assert here.metric("medley_bundle_loads_total", result="ok") == loads + 2

    play(story)


def test_what_was_loaded_before_a_failure_is_kept_for_the_next_try(
    play: Callable[..., None], made: dict[Key, Made], tmp_path: Path
) -> None:
    shared = tmp_path / "shared"

    async def story(here: Residence) -> None:
        here.store.fetch(made[A][0].digest)
        away = shared.rename(tmp_path / "away")
        with pytest.raises(StorageError):
            await here.residency.follow(state(1, made, A, B))
        assert here.residency.live.snapshot.residents == {}
        assert len(here.model.paths) == 1
        away.rename(shared)
        await here.residency.follow(state(1, made, A, B))
        assert here.metric("medley_bundle_loads_total", result="ok") == 2
        assert here.on_device == {"a@1", "b@1"}

    play(story)


def test_what_was_loaded_for_a_state_that_never_came_leaves_the_device(
    play: Callable[..., None], made: dict[Key, Made], tmp_path: Path
) -> None:
    async def story(here: Residence) -> None:
        here.store.fetch(made[A][0].digest)
        away = (tmp_path / "shared").rename(tmp_path / "away")
        with pytest.raises(StorageError):
            await here.residency.follow(state(1, made, A, B))
        away.rename(tmp_path / "shared")
        await here.residency.follow(state(2, made, C))
        await here.settled()
        assert here.on_device == {"c@1"}
        assert len(here.model.paths) == 1

    play(story)


@pytest.mark.parametrize("how", ["lost", "damaged", "another"])
def test_a_bundle_that_will_never_do_is_marked_and_the_others_are_served(
    play: Callable[..., None], made: dict[Key, Made], tmp_path: Path, how: str
) -> None:
    async def story(here: Residence) -> None:
        digest = made[B][0].digest.removeprefix("sha256:")
        path = tmp_path / "shared" / "bundles" / f"{digest}.safetensors"
        whole = path.read_bytes()
        if how == "lost":
            path.unlink()
        else:
            path.write_bytes(whole[:-1] if how == "damaged" else made[C][1])
        await here.residency.follow(state(1, made, A, B))
        snapshot = here.residency.live.snapshot
        assert (snapshot.desired.generation, here.on_device) == (1, {"a@1"})
        assert snapshot.failed.keys() == {B}
        assert str(tmp_path) not in snapshot.failed[B]
        assert here.residency.complete  # it is known not to work: not tried again and again

        path.write_bytes(whole)
        await here.residency.follow(state(2, made, A, B, C))
        assert here.residency.live.snapshot.failed.keys() == {B}
        await here.residency.bring(B, again=True)
        assert here.residency.live.snapshot.failed == {}

    play(story)


def test_a_version_that_failed_and_comes_back_as_another_bundle_is_tried(
    play: Callable[..., None], made: dict[Key, Made], make: MakeBundle, tmp_path: Path
) -> None:
    bundle, data = make(task="b", version="1", seed=7)
    other = made | {B: (bundle, data)}

    async def story(here: Residence) -> None:
        digest = made[B][0].digest.removeprefix("sha256:")
        (tmp_path / "shared" / "bundles" / f"{digest}.safetensors").unlink()
        await here.residency.follow(state(1, made, B))
        assert here.residency.live.snapshot.failed.keys() == {B}
        publish(here, bundle, data)
        await here.residency.follow(state(3, other, B))
        assert here.residency.live.snapshot.failed == {}
        assert here.residency.live.snapshot.residents[B].record.digest == bundle.digest

    play(story)


def test_where_old_and_new_do_not_fit_at_once_the_new_comes_after_the_flip(
    play: Callable[..., None], made: dict[Key, Made], expected: dict[Key, Tensor]
) -> None:
    async def story(here: Residence) -> None:
        await here.residency.follow(state(1, made, A, B))
        await here.residency.follow(state(2, made, B, C))
        assert here.on_device == {"b@1", "c@1"}
        assert here.residency.complete
        for key in (B, C):
            assert torch.equal(await here.ask(key), expected[key])
        await here.residency.follow(state(3, made, A, B, C))
        assert here.residency.live.snapshot.failed == {A: "all 2 paths are taken"}

    play(story, paths=2)


def test_what_the_new_state_protects_is_not_evicted_for_the_rest_of_it(
    play: Callable[..., None], made: dict[Key, Made]
) -> None:
    async def story(here: Residence) -> None:
        await here.residency.follow(state(1, made, A, B, live=False))
        for key in (A, B):
            await here.residency.bring(key)  # B was asked for last, so A would leave first
        after = replace(state(2, made, A, B, C), aliases={"a": {LIVE: "1"}, "c": {LIVE: "1"}})
        await here.residency.follow(after)
        assert here.on_device == {"a@1", "c@1"}

    play(story, paths=2)


STATES = st.lists(st.lists(st.sampled_from(KEYS), unique=True), max_size=6)


@settings(max_examples=25, deadline=None)
@given(states=STATES, away=st.sets(st.integers(0, 5)), paths=st.sampled_from([1, 2, 8]))
def test_whatever_states_come_all_that_is_live_is_there_or_known_not_to_fit(
    made: dict[Key, Made],
    expected: dict[Key, Tensor],
    backbone: Backbone,
    states: list[list[Key]],
    away: set[int],
    paths: int,
) -> None:
    async def story(folder: Path) -> None:
        shared, elsewhere = folder / "shared", folder / "away"
        async with residence(folder / "store", backbone, paths=paths, shared=shared) as here:
            for bundle, data in made.values():
                publish(here, bundle, data)
            for number, keys in enumerate(states):
                wanted, before = state(number + 1, made, *keys), here.residency.live.snapshot
                if number in away:
                    shared.rename(elsewhere)
                try:
                    await here.residency.follow(wanted)
                except (StorageError, UnavailableError):
                    assert number in away
                    after = here.residency.live.snapshot
                    assert after.desired in (before.desired, wanted)
                if number in away:
                    elsewhere.rename(shared)
                    await here.residency.follow(wanted)
                snapshot = here.residency.live.snapshot
                assert snapshot.desired is wanted
                live = set(wanted.live.items())
                assert live == (live & snapshot.residents.keys()) | (live & snapshot.failed.keys())
                assert not snapshot.failed or len(live) > paths
                for key in live & snapshot.residents.keys():
                    assert torch.equal(await here.ask(key), expected[key])
            await here.settled()
            assert len(here.model.paths) == len(here.on_device)

    with TemporaryDirectory() as folder:
        asyncio.run(story(Path(folder)))
