"""The slots of one tower: what packing refuses, who shares, and when a freed slot is written."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from medley.errors import CapacityError
from medley.experts import BlockExperts
from medley.pool import Capacity, ExpertPool
from medley.streams import Streams
from tests.fakes import random_experts
from tests.streams import LateStreams

WIDTH, BLOCKS = 16, 2
SMALL = Capacity(paths=3, slots=4, experts=3, bottleneck=8)
CPU = torch.device("cpu")


def pool_of(*, dtype: torch.dtype = torch.float32, streams: Streams | None = None) -> ExpertPool:
    return ExpertPool(
        blocks=BLOCKS, width=WIDTH, capacity=SMALL, device=CPU, dtype=dtype, streams=streams
    )


def experts(seed: int, *, count: int = 2, bottleneck: int = 8) -> dict[int, BlockExperts]:
    chance = torch.Generator().manual_seed(seed)
    return {1: random_experts(WIDTH, bottleneck, experts=count, random=chance)}


def load(pool: ExpertPool, path: int, task: dict[int, BlockExperts], *, top_k: int = 2) -> None:
    pool.load(path, pool.pack(task, top_k=top_k, scale=0.5))


def mixed(pool: ExpertPool, *paths: int) -> Tensor:
    x_BLD = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(0))[: len(paths)]
    return pool.mixing(1, x_BLD, torch.tensor(paths))


def tables(pool: ExpertPool) -> list[Tensor]:
    return [
        pool.weights_NS2RD,
        pool.biases_NSF,
        pool.routers_NPDE,
        pool.slots_NPE,
        pool.top_k_P,
        pool.scale_P,
    ]


def test_what_another_thread_has_packed_is_loaded_as_it_is() -> None:
    here, there = pool_of(dtype=torch.bfloat16), pool_of(dtype=torch.bfloat16)
    task = experts(1, bottleneck=5)
    load(here, 0, task)
    with ThreadPoolExecutor(1) as thread:
        packed = thread.submit(there.pack, task, top_k=2, scale=0.5).result()
    there.load(0, packed)

    for ours, theirs in zip(tables(here), tables(there), strict=True):
        assert torch.equal(ours, theirs)
    assert here.weights_NS2RD.dtype == torch.bfloat16
    assert {here.biases_NSF.dtype, here.routers_NPDE.dtype} == {torch.float32}


def test_a_smaller_bottleneck_leaves_nothing_of_what_was_in_the_slot() -> None:
    used, fresh = pool_of(), pool_of()
    load(used, 0, experts(1, count=3))
    used.unload(0)
    for pool in (used, fresh):
        load(pool, 0, experts(2, count=3, bottleneck=3))

    assert torch.equal(mixed(used, 0), mixed(fresh, 0))


@pytest.mark.parametrize(
    ("task", "top_k", "message"),
    [
        ({2: experts(1)[1]}, 2, "there is no block 2, the tower has 2"),
        ({-1: experts(1)[1]}, 2, "there is no block -1, the tower has 2"),
        (experts(1), 0, "top_k is 0, must be at least 1"),
        (
            {0: random_experts(WIDTH + 1, 4, random=torch.Generator())},
            2,
            r"block 0: down_ERD has shape \(2, 4, 17\), expected \(2, 4, 16\)",
        ),
        (
            {1: replace(experts(1)[1], up_bias_ED=torch.zeros(3, WIDTH))},
            2,
            r"block 1: up_bias_ED has shape \(3, 16\), expected \(2, 16\)",
        ),
        (
            {1: replace(experts(1)[1], router_DE=torch.zeros(WIDTH, 3))},
            2,
            r"block 1: router_DE has shape \(16, 3\), expected \(16, 2\)",
        ),
    ],
)
def test_what_does_not_fit_the_tower_is_refused(
    task: dict[int, BlockExperts], top_k: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pool_of().pack(task, top_k=top_k, scale=1.0)


@pytest.mark.parametrize("scale", [1e308, -1e39, math.inf, math.nan])
def test_a_scale_that_float32_does_not_hold_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="scale is"):
        pool_of().pack(experts(1), top_k=2, scale=scale)


@pytest.mark.parametrize(
    ("task", "top_k", "message"),
    [
        (experts(1), 3, "top_k 3 is larger than max_top_k 2"),
        (experts(1, bottleneck=9), 2, "bottleneck 9 is larger than 8"),
        (experts(1, count=4), 2, "block 1: 4 experts, room for 3"),
    ],
)
def test_what_is_too_large_is_refused(
    task: dict[int, BlockExperts], top_k: int, message: str
) -> None:
    with pytest.raises(CapacityError, match=message):
        pool_of().pack(task, top_k=top_k, scale=1.0)


def test_more_experts_to_an_image_than_a_path_may_name_is_no_capacity() -> None:
    with pytest.raises(ValueError, match="max_top_k 3 is larger than experts 2"):
        Capacity(experts=2, max_top_k=3)


def test_a_full_block_takes_nobody_in_and_changes_nothing() -> None:
    pool = pool_of()
    load(pool, 0, experts(1, count=3))
    before = [tensor.clone() for tensor in tables(pool)]
    with pytest.raises(CapacityError, match="block 1: 2 expert slots needed, 1 free"):
        load(pool, 1, experts(2))

    assert pool.paths == {0}
    for ours, theirs in zip(tables(pool), before, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("path", [-1, 1, 3])
def test_a_path_that_is_not_there_cannot_leave(path: int) -> None:
    pool = pool_of()
    for taken in (0, 2):
        load(pool, taken, experts(taken, count=1), top_k=1)
    before = mixed(pool, 0, 2)
    with pytest.raises(ValueError, match=f"path {path} is not loaded"):
        pool.unload(path)

    assert torch.equal(mixed(pool, 0, 2), before)


def test_a_path_without_experts_and_one_with_fewer_than_top_k() -> None:
    pool = pool_of()
    load(pool, 0, {})
    load(pool, 1, experts(1, count=1))
    load(pool, 2, experts(2, count=0))
    y_BLD = mixed(pool, 0, 1, 2)

    assert (y_BLD[[0, 2]] == 0).all()
    assert (y_BLD[1] != 0).any()


def test_a_path_forgets_the_experts_of_who_had_it_before() -> None:
    pool, fresh = pool_of(), pool_of()
    load(pool, 0, experts(1, count=3))
    pool.unload(0)
    load(pool, 0, {})
    assert (mixed(pool, 0) == 0).all()
    pool.unload(0)
    for each in (pool, fresh):
        load(each, 0, experts(2, count=1))
    assert torch.equal(mixed(pool, 0), mixed(fresh, 0))


@pytest.mark.parametrize("seed", range(12))
def test_a_freed_slot_is_written_after_all_that_may_read_it(seed: int) -> None:
    """Three swaps of the same slots are asked for before anything has been computed."""
    streams = LateStreams(seed)
    pool, plain = pool_of(streams=streams), pool_of()
    found: list[Tensor] = []
    expected = []
    for task in (experts(n, count=3) for n in range(3)):
        for each in (pool, plain):
            load(each, 0, task)
        streams.main.run(lambda: found.append(mixed(pool, 0)))
        expected.append(mixed(plain, 0))
        for each in (pool, plain):
            each.unload(0)
    while streams.step():
        pass

    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
