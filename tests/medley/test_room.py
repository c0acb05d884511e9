"""Whether there is room for a task, now or without some of those that are there."""

import pytest
import torch

from medley.errors import CapacityError
from medley.experts import BlockExperts
from medley.pool import Capacity, ExpertPool, PackedExperts
from medley.routed import RoutedModel
from tests.fakes import random_experts
from tests.models import random_experts as random_task
from tests.models import tiny_backbone

WIDTH = 16


def pool_of(slots: int) -> ExpertPool:
    capacity = Capacity(paths=4, slots=slots, experts=4, bottleneck=8)
    return ExpertPool(blocks=2, width=WIDTH, capacity=capacity, device=torch.device("cpu"))


def packed(pool: ExpertPool, *seeds: int) -> PackedExperts:
    """One expert for each seed, in block 1; equal seeds are equal experts."""
    ones = [random_experts(WIDTH, 8, experts=1, random=_chance(seed)) for seed in seeds]
    fields = ("down_ERD", "down_bias_ER", "up_ERD", "up_bias_ED")
    tensors = {name: torch.cat([getattr(one, name) for one in ones]) for name in fields}
    router_DE = torch.cat([one.router_DE for one in ones], dim=1)
    return pool.pack({1: BlockExperts(**tensors, router_DE=router_DE)}, top_k=1, scale=1.0)


def _chance(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_full_pool_has_room_once_a_path_is_gone() -> None:
    pool = pool_of(slots=2)
    pool.load(0, packed(pool, 1))
    pool.load(1, packed(pool, 2))

    assert not pool.has_room(packed(pool, 3))
    assert pool.has_room(packed(pool, 3), {0})
    assert not pool.has_room(packed(pool, 3, 4), {0})
    assert pool.has_room(packed(pool, 3, 4), {0, 1})


def test_what_is_shared_needs_no_slot_and_frees_none() -> None:
    pool = pool_of(slots=2)
    pool.load(0, packed(pool, 1, 2))
    pool.load(1, packed(pool, 1))

    assert pool.has_room(packed(pool, 1, 2))
    assert not pool.has_room(packed(pool, 3, 4), {0})  # path 1 still holds the first
    assert pool.has_room(packed(pool, 2, 3), {0, 1})


def test_what_has_room_loads_and_what_has_none_does_not() -> None:
    """Over all small cases: the promise and the deed agree."""
    for held, wanted in [(a, b) for a in ((1,), (1, 2), (2, 3)) for b in ((1,), (4,), (4, 5))]:
        pool = pool_of(slots=3)
        pool.load(0, packed(pool, *held))
        pool.load(1, packed(pool, 9))
        room = pool.has_room(packed(pool, *wanted))
        if room:
            pool.load(2, packed(pool, *wanted))
        else:
            with pytest.raises(CapacityError):
                pool.load(2, packed(pool, *wanted))


def test_a_model_without_a_free_path_has_room_without_one_of_its_tasks() -> None:
    model = RoutedModel(tiny_backbone(), capacity=Capacity(paths=1))
    task = model.pack(random_task(1))
    path = model.load(model.pack(random_task(0)))

    assert not model.has_room(task)
    assert not model.has_room(task, {path + 1})
    assert model.has_room(task, {path})
    assert task.size_bytes > 0
