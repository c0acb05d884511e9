"""All live tasks' classes in the words of one of them: what is encoded, and how often."""

import asyncio

import pytest
import torch

from service.answers.unions import Unions
from service.registry.desired import Desired, VersionRecord
from service.versions.live import LabelSet, Resident, Snapshot
from tests.service.answers.test_labels import WIDTH, Encoder, cache


def resident(task: str, path: int, *names: str, version: str = "1") -> Resident:
    record = VersionRecord(task, version, f"sha256:{task}{version}", "2026")
    own = LabelSet("task", names, torch.full((len(names), WIDTH), float(path)))
    plain = LabelSet("task", names, torch.full((len(names), WIDTH), -1.0))
    return Resident(record, path, (f"{task} {{}}",), own, plain, threshold=0.0)


def snapshot(*residents: Resident) -> Snapshot:
    aliases = {r.record.task: {"live": r.record.version} for r in residents}
    desired = Desired(1, "", tuple(r.record for r in residents), aliases)
    return Snapshot(desired, {r.key: r for r in residents})


PETS = resident("pets", 3, "cat", "dog")
TOOLS = resident("tools", 5, "saw", "Dog", "plane")
BIRDS = resident("birds", 7, "owl")


def test_the_names_are_those_of_zero_shot_s_union_and_a_task_s_own_rows_its_bundle_s() -> None:
    shot = snapshot(PETS, TOOLS, BIRDS)
    with cache(Encoder()) as parts:
        union = asyncio.run(Unions(parts).get(TOOLS, shot))

    assert shot.union is not None
    assert (union.kind, union.names) == ("union", shot.union.names)
    assert union.names == ("owl", "cat", "dog", "saw", "plane")
    assert union.features_CE[:, 0].tolist() == [1, 1, 1, 5, 5]  # 1 is the encoder's


def test_a_new_task_costs_its_own_names_only() -> None:
    async def run() -> list[tuple[str, ...]]:
        await unions.get(PETS, snapshot(PETS, TOOLS))
        await unions.get(PETS, snapshot(PETS, TOOLS))
        await unions.get(PETS, snapshot(PETS, TOOLS, BIRDS))
        first = list(encoder.asked)
        await unions.get(PETS, snapshot(PETS, resident("tools", 9, *TOOLS.own.names), BIRDS))
        assert encoder.asked == first, "the path does not matter, and the names are the same"
        return first

    encoder = Encoder()
    with cache(encoder) as parts:
        unions = Unions(parts)
        assert asyncio.run(run()) == [TOOLS.own.names, BIRDS.own.names]


def test_who_gives_up_leaves_what_was_encoded_and_queues_no_more() -> None:
    async def run() -> None:
        shot = snapshot(PETS, TOOLS, BIRDS)
        encoder.open.clear()
        asked = asyncio.ensure_future(unions.get(PETS, shot))
        await asyncio.sleep(0)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        encoder.open.set()
        await unions.get(PETS, shot)

    encoder = Encoder()
    with cache(encoder) as parts:
        unions = Unions(parts)
        asyncio.run(run())
    assert sorted(encoder.asked) == sorted([BIRDS.own.names, TOOLS.own.names])
