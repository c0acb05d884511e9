"""Replayed batches over a longer time and on a real backbone; on a CPU too, by the stand-in."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from medley.backbone import load_backbone
from medley.classifier import Ask
from medley.precision import Precision
from medley.routed import ZERO_SHOT
from tests.devices import DEVICES
from tests.medley.replayed import Pair, assert_same, mixed, tiny_on
from tests.models import random_experts

SWAPS = 200


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_medley_mini_answers_as_the_eager_one(device: str, precision: Precision) -> None:
    pair = Pair(load_backbone(device=device), precision=precision, buckets=(1, 4))
    asks = mixed(pair.load(1, first=3), pair.load(2, first=3))
    taken: set[int] = set()
    for count in (1, 3, 4, 7):
        taken |= set(pair.check(count, asks, seed=count).paths)

    assert taken == {ZERO_SHOT, 0, 1}
    batches = [(pair.pixels(4, seed=seed), asks[seed : seed + 4]) for seed in (1, 2)]
    for batch, flight in zip(batches, [pair.replayed.launch(*b) for b in batches], strict=True):
        assert_same(flight.wait(), pair.eager.route(*batch), rounding=pair.rounding)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_swaps_leave_the_bits_of_other_tasks_and_the_memory_as_they_were(
    device: str, precision: Precision
) -> None:
    """Each swap captures the selection again, and only that."""
    pair = Pair(tiny_on(device), precision=precision, buckets=(4,), first_expert_block=1)
    kept = [pair.load(1), pair.load(2)]
    asks = [*map(Ask, kept), Ask(ZERO_SHOT), Ask(eligible=frozenset(kept))]
    images = pair.pixels(4)
    before = pair.replayed.route(images, asks)
    held_bytes = []
    pair.captured()
    for swap in range(SWAPS):
        path = pair.load(3 + swap % 6)
        during = pair.replayed.route(images, asks)
        assert during.paths == before.paths
        assert torch.equal(during.features_BE, before.features_BE)
        assert torch.equal(during.scores_BT[:, : len(kept)], before.scores_BT)
        pair.check(2, [Ask(path), Ask()])
        pair.unload(path)
        if swap in (SWAPS // 2, SWAPS - 1):
            held_bytes.append(memory_bytes(device))

    assert pair.captured() == ["selection"] * SWAPS
    assert all(later <= sooner for sooner, later in zip(*held_bytes, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_tasks_are_packed_by_another_thread_while_graphs_are_captured(device: str) -> None:
    """Packing pins memory, which a capture of the whole process would not survive."""
    pair = Pair(tiny_on(device), precision="bf16", buckets=(4,))
    kept = pair.load(1)
    with ThreadPoolExecutor(1) as aside:
        packing = [
            aside.submit(pair.model.pack, random_experts(seed, first_expert_block=seed % 3))
            for seed in range(30)
        ]
        for seed, packed in enumerate(packing):
            path = pair.enter(packed.result(), seed=seed)
            assert {kept, path} <= set(pair.check(4, [Ask(kept), Ask(path), Ask()]).paths)
            pair.unload(path)

    assert pair.captured().count("trunk") > len(packing) // 2


def memory_bytes(device: str) -> tuple[int, ...]:
    """What tensors hold, and what is kept for them; on a CPU what those hold that Python knows."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    return (sum(thing.nbytes for thing in gc.get_objects() if type(thing) is Tensor),)
