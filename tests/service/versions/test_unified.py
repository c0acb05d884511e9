"""How versions come by their unified model: read once for several, fetched, missed, let go."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from medley.backbone import Backbone
from medley.errors import BundleError
from service.bundles.shared_store import bundle_name
from service.errors import StorageError
from service.registry.desired import LIVE, Desired, VersionRecord
from tests.service.conftest import MakeBundle
from tests.service.fused import Made, made_fusion
from tests.service.residence import Residence, residence

Story = Callable[[Residence], Awaitable[None]]


@pytest.fixture(scope="module")
def fusion(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> Made:
    """Three tasks with low-rank updates."""
    return made_fusion(tmp_path_factory.mktemp("fusion"), backbone, ("a", "b", "c"))


@pytest.fixture
def play(tmp_path: Path, backbone: Backbone) -> Callable[..., None]:
    """Run a story on a replica; its shared store is empty, if it is told to have one."""

    def played(story: Story, *, shared: bool = False, **room: int) -> None:
        async def main() -> None:
            place, own = tmp_path / "shared" if shared else None, tmp_path / "store"
            async with residence(own, backbone, paths=8, shared=place, **room) as here:
                await story(here)

        asyncio.run(main())

    return played


def record_of(made: Made, task: str) -> VersionRecord:
    data = made.file(task).read_bytes()
    bundle = made.bundles[task]
    method = bundle.manifest.method
    return VersionRecord(task, "1", bundle.digest, "2026", len(data), method, made.digest)


def state(generation: int, *records: VersionRecord) -> Desired:
    return Desired(
        generation,
        id=str(generation),
        versions=records,
        aliases={record.task: {LIVE: record.version} for record in records},
    )


def publish(here: Residence, made: Made, *, unified: bool = True) -> None:
    """Let the shared store have a fusion."""
    assert here.store.shared is not None
    for task, bundle in made.bundles.items():
        here.store.shared.publish(bundle.digest, made.file(task))
    if unified:
        here.store.shared.publish(made.digest, made.path)


def reads(here: Residence) -> float:
    """How many bundles and unified models have been read."""
    return here.metric("medley_bundle_load_seconds_count", phase="verify")


def test_one_reading_serves_all_versions_of_a_fusion_that_are_loaded_in_a_row(
    play: Callable[..., None], fusion: Made
) -> None:
    async def story(here: Residence) -> None:
        here.store.path(fusion.digest).write_bytes(fusion.path.read_bytes())
        for task in fusion.bundles:
            here.store.path(fusion.bundles[task].digest).write_bytes(fusion.file(task).read_bytes())
        await here.restore(state(1, *(record_of(fusion, task) for task in fusion.bundles)))
        assert here.on_device == {"a@1", "b@1", "c@1"}
        assert reads(here) == len(fusion.bundles) + 1

    play(story)


def test_versions_take_turns_in_the_room_of_their_kind_and_leave_others_alone(
    play: Callable[..., None], fusion: Made, make: MakeBundle, backbone: Backbone, tmp_path: Path
) -> None:
    whole = made_fusion(tmp_path / "whole", backbone, ("x", "y"), method="finetune")
    of = {task: made for made in (fusion, whole) for task in made.bundles}

    async def story(here: Residence) -> None:
        await here.register(make(task="pets")[1])
        for made in (fusion, whole):
            here.store.path(made.digest).write_bytes(made.path.read_bytes())
        records = [record_of(made, task) for task, made in of.items()]
        for task, made in of.items():
            here.keep(made.bundles[task], made.file(task).read_bytes())
        here.want(replace(here.desired, versions=(*here.desired.versions, *records)))
        first = {task: await here.ask((task, "1")) for task in of}
        assert here.on_device == {"pets@1", "c@1", "y@1"}
        for kind in ("low_rank", "model"):
            assert here.metric("medley_fused_slots", kind=kind, state="free") == 0
        again = {task: await here.ask((task, "1")) for task in reversed(of)}
        assert all(torch.equal(first[task], again[task]) for task in of)
        assert len({tuple(features.tolist()) for features in first.values()}) == len(of)
        assert here.on_device == {"pets@1", "a@1", "x@1"}

    play(story, low_rank_slots=1, models=1)


def test_one_that_is_in_memory_and_no_more_on_the_disk_is_missing(
    play: Callable[..., None], fusion: Made
) -> None:
    async def story(here: Residence) -> None:
        path = here.store.path(fusion.digest)
        path.write_bytes(fusion.path.read_bytes())
        await here.residency.admit(record_of(fusion, "a"), fusion.bundles["a"])
        path.unlink()
        with pytest.raises(BundleError) as caught:
            await here.residency.admit(record_of(fusion, "b"), fusion.bundles["b"])
        assert caught.value.code == "unified_missing"

    play(story)


def test_a_replica_that_follows_fetches_both(play: Callable[..., None], fusion: Made) -> None:
    async def story(here: Residence) -> None:
        publish(here, fusion)
        records = [record_of(fusion, task) for task in fusion.bundles]
        await here.residency.follow(state(1, *records))
        assert here.on_device == {"a@1", "b@1", "c@1"}
        assert all(here.store.path(digest).exists() for one in records for digest in one.files)
        features = [await here.ask((task, "1")) for task in fusion.bundles]
        assert not torch.equal(features[0], features[1])

        here.store.path(fusion.digest).write_bytes(b"damaged at rest")
        here.residency.publish(state(2))
        await here.settled()
        await here.residency.follow(state(3, *records))  # the cache gives way to the store
        assert torch.equal(await here.ask(("a", "1")), features[0])
        assert here.residency.live.snapshot.failed == {}

    play(story, shared=True)


def test_versions_whose_unified_model_is_lost_are_refused_and_the_rest_is_served(
    play: Callable[..., None], fusion: Made, make: MakeBundle
) -> None:
    async def story(here: Residence) -> None:
        publish(here, fusion, unified=False)
        bundle, data = make(task="pets")
        plain = VersionRecord("pets", "1", bundle.digest, "2026", len(data))
        here.keep(bundle, data)
        await here.residency.follow(state(1, record_of(fusion, "a"), plain))
        assert here.on_device == {"pets@1"}
        assert fusion.digest in here.residency.live.snapshot.failed["a", "1"]

        publish(here, fusion)
        await here.residency.bring(("a", "1"), again=True)
        assert here.on_device == {"a@1", "pets@1"}

    play(story, shared=True)


def test_while_the_store_is_away_a_replica_stays_where_it_is(
    play: Callable[..., None], fusion: Made, tmp_path: Path
) -> None:
    async def story(here: Residence) -> None:
        publish(here, fusion)
        record, shared = record_of(fusion, "a"), tmp_path / "shared"
        await asyncio.to_thread(here.store.fetch, record.digest)
        (shared / bundle_name(record.unified)).rename(tmp_path / "aside")
        (shared / "medley-store.json").rename(tmp_path / "whose")  # a mount that has fallen away
        with pytest.raises(StorageError):
            await here.residency.follow(state(1, record))
        assert here.residency.lacking.keys() == {("a", "1")}
        assert here.residency.live.snapshot.desired.generation == 0

        (tmp_path / "aside").rename(shared / bundle_name(record.unified))
        (tmp_path / "whose").rename(shared / "medley-store.json")
        await here.residency.follow(state(1, record))
        assert here.on_device == {"a@1"}

    play(story, shared=True)
