"""Low-rank paths are models with merged weights; who has none keeps every bit; slots are slots."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from timm.layers.mlp import GluMlp
from torch import Tensor

from medley.backbone import Backbone, load_backbone
from medley.errors import BackboneError, CapacityError
from medley.experts import BlockLowRank, LowRank, TaskLowRank
from medley.low_rank import Layer, LowRankPool
from medley.pool import Capacity
from medley.precision import PRECISIONS, Precision
from medley.routed import ZERO_SHOT, RoutedModel
from medley.streams import Streams
from tests.models import merged, random_low_rank, timm_backbone, tiny_backbone
from tests.streams import LateStreams

CAPACITY = Capacity(paths=4, slots=4, experts=4, bottleneck=8, low_rank_slots=2, low_rank=8)
D, M = 6, 10
BACKBONES: dict[str, Callable[[], Backbone]] = {
    "gelu": tiny_backbone,
    "quick_gelu and layer_scale": lambda: tiny_backbone(quick_gelu=True, ls_init_value=0.7),
    "qk_norm": lambda: tiny_backbone(block_type="custom", qk_norm=True),
    "mean pooled": lambda: tiny_backbone(pool_type="avg"),
    "timm": timm_backbone,
    "medley-mini": load_backbone,
}


def images(backbone: Backbone, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, *backbone.image_size, generator=generator)


def assert_close(ours: Tensor, theirs: Tensor, error: float) -> None:
    far = (ours.float() - theirs).norm(dim=-1) / theirs.norm(dim=-1)
    assert far.max() < error


@pytest.mark.parametrize("name", BACKBONES)
def test_a_path_is_the_model_whose_weights_were_merged(name: str) -> None:
    """As for the fast forms of `test_fused.py`, bfloat16 may lose some 2 of its 8 bits."""
    backbone = BACKBONES[name]()
    task = random_low_rank(backbone, first_block=1)
    target = merged(backbone, task)
    pictures, prompts = images(backbone, 2), backbone.tokenize(["a photo of a cat", "x"])
    with torch.inference_mode():
        image, text = target.model.encode_image(pictures), target.model.encode_text(prompts)
        assert (image - backbone.model.encode_image(pictures)).norm(dim=-1).min() > 0.02
        for precision in PRECISIONS:
            model = RoutedModel(backbone, precision=precision, capacity=CAPACITY)
            path = model.load(task)
            rows = torch.full((2,), path)
            bits = 2**-5 if precision == "bf16" else 1e-5
            assert_close(model.encode_image(pictures, rows), image, bits)
            assert_close(model.encode_text(prompts, path), text, 1e-5)


def test_a_task_may_update_one_tower_alone() -> None:
    backbone = tiny_backbone()
    task = random_low_rank(backbone)
    model = RoutedModel(backbone, first_expert_block=None, capacity=CAPACITY)
    pictures, prompts = images(backbone, 1), backbone.tokenize(["x"])
    with torch.inference_mode():
        image, text = model.load(replace(task, text={})), model.load(replace(task, vision={}))
        assert torch.equal(model.encode_text(prompts, image), backbone.model.encode_text(prompts))
        plain = backbone.model.encode_image(pictures)
        assert torch.equal(model.encode_image(pictures, torch.tensor([text])), plain)
        assert model.first_expert_block == 0
        model.unload(image)
        assert model.first_expert_block == len(backbone.image.blocks)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_a_block_does_not_update_stays_whoever_had_the_slot_before(
    precision: Precision,
) -> None:
    backbone = tiny_backbone()
    capacity = replace(CAPACITY, low_rank_slots=1)
    used, fresh = (RoutedModel(backbone, precision=precision, capacity=capacity) for _ in "ab")
    used.unload(used.load(random_low_rank(backbone, 1, rank=8)))
    late = random_low_rank(backbone, 2, first_block=2, rank=3)
    pictures, rows = images(backbone, 2), torch.tensor([used.load(late), ZERO_SHOT])
    assert fresh.load(late) == rows[0]
    with torch.inference_mode():
        ours, theirs = (model.encode_image(pictures, rows) for model in (used, fresh))
    assert torch.equal(ours, theirs)


def test_a_server_without_such_tasks_has_no_memory_for_them_and_then_for_good() -> None:
    backbone = tiny_backbone()
    model = RoutedModel(backbone, capacity=CAPACITY)
    before = model.layout
    task = model.pack(random_low_rank(backbone))
    pool = model._low_rank
    assert pool is not None
    assert (pool.is_there, model.layout) == (False, before)
    with torch.inference_mode():
        path = model.load(task)
    assert pool._slots is not None
    first, memory = model.layout, pool._slots.down_NSRI[0].data_ptr()
    assert first != before
    model.unload(path)  # outside of inference mode, as a server does
    model.load(task)
    assert (model.layout, pool._slots.down_NSRI[0].data_ptr()) == (first, memory)


def test_slots_that_are_out_disturb_nobody() -> None:
    backbone = tiny_backbone()
    model = RoutedModel(backbone, capacity=CAPACITY)
    tasks = [model.pack(random_low_rank(backbone, seed)) for seed in range(3)]
    paths = [model.load(task) for task in tasks[:2]]
    rows, pictures = torch.tensor(paths), images(backbone, 2)
    with torch.inference_mode():
        before = model.encode_image(pictures, rows)
        assert model.free_low_rank_slots == 0
        assert not model.has_room(tasks[2])
        assert model.has_room(tasks[2], {paths[0]})
        with pytest.raises(CapacityError, match="all 2 slots of low-rank updates are taken"):
            model.load(tasks[2])
        assert model.paths == set(paths)
        assert torch.equal(model.encode_image(pictures, rows), before)
    model.unload(paths[0])
    assert model.load(tasks[2]) == paths[0]


def test_a_text_tower_without_room_leaves_nothing_in_the_image_tower() -> None:
    backbone = tiny_backbone()
    model = RoutedModel(backbone, capacity=CAPACITY)
    task = random_low_rank(backbone)
    for _ in range(2):
        model.load(replace(task, vision={}))
    with pytest.raises(CapacityError, match="all 2 slots"):
        model.load(task)
    assert model._low_rank is not None
    assert model._low_rank.free_slots == 2
    model.load(replace(task, text={}))


def test_a_tower_whose_mlp_is_made_otherwise_takes_no_updates() -> None:
    backbone = timm_backbone()
    task = random_low_rank(backbone)
    block = backbone.image.blocks[1].block
    block.mlp = GluMlp(192, 96).eval()
    model = RoutedModel(backbone, capacity=CAPACITY)
    with pytest.raises(BackboneError, match="the image tower of siglip-like takes no low-rank"):
        model.load(task)
    model.load(replace(task, vision={}))


def test_updates_in_blocks_of_the_trunk_are_refused() -> None:
    backbone = tiny_backbone()
    model = RoutedModel(backbone, first_expert_block=2, capacity=CAPACITY)
    with pytest.raises(BackboneError, match="it adds to image block 1, but the trunk"):
        model.load(random_low_rank(backbone, first_block=1))


def pool_of(streams: Streams | None = None) -> LowRankPool:
    layers = (Layer(D, M), Layer(M, D))
    device = torch.device("cpu")
    return LowRankPool([layers, layers], capacity=CAPACITY, device=device, streams=streams)


def updates(seed: int, *, rank: int = 8) -> dict[int, BlockLowRank]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (D, M, M, D)
    a, b, c, d = (torch.randn(rank, size, generator=generator) for size in sizes)
    return {1: BlockLowRank(LowRank(a, b), LowRank(c, d))}


def added(pool: LowRankPool, *paths: int) -> Tensor:
    """What both layers of block 1 get, side by side."""
    rows = pool.rows(torch.tensor(paths))
    if rows is None:
        return torch.zeros(len(paths), 3, M + D)
    generator, beside = torch.Generator().manual_seed(0), rows.beside(1)
    x_BLD, x_BLM = (torch.randn(len(paths), 3, size, generator=generator) for size in (D, M))
    fc_BLM, proj_BLD = torch.zeros_like(x_BLM), torch.zeros_like(x_BLD)
    return torch.cat([beside(0, x_BLD, fc_BLM), beside(1, x_BLM, proj_BLD)], dim=-1)


def test_updates_are_products_of_factors_and_a_smaller_rank_leaves_nothing_behind() -> None:
    pool = pool_of()
    pool.load(0, pool.pack(updates(1), scale=1.0))
    pool.unload(0)
    small = updates(2, rank=3)
    pool.load(3, pool.pack(small, scale=0.5))
    pool.load(1, pool.pack({}, scale=2.0))
    generator = torch.Generator().manual_seed(0)
    x_BLD, x_BLM = (torch.randn(3, 3, size, generator=generator) for size in (D, M))
    expected = torch.cat(
        [
            0.5 * x @ factors.down_RI.mT @ factors.up_RO
            for x, factors in ((x_BLD, small[1].fc), (x_BLM, small[1].proj))
        ],
        dim=-1,
    )
    ours = added(pool, 3, ZERO_SHOT, 1)
    torch.testing.assert_close(ours[0], expected[0])
    assert (ours[1:] == 0).all()


def test_on_a_cpu_a_batch_without_such_a_path_runs_nothing() -> None:
    pool = pool_of()
    assert pool.rows(torch.tensor([0])) is None
    pool.load(2, pool.pack(updates(1), scale=1.0))
    assert pool.rows(torch.tensor([0, ZERO_SHOT])) is None
    assert pool.rows(torch.tensor([0, 2])) is not None


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({2: updates(1)[1]}, "there is no block 2, the tower has 2"),
        (
            {1: replace(updates(1)[1], fc=LowRank(torch.zeros(4, D), torch.zeros(4, D)))},
            r"block 1: fc.up_RO has shape \(4, 6\), expected \(4, 10\)",
        ),
        (
            {0: replace(updates(1)[1], proj=LowRank(torch.zeros(4, M), torch.zeros(3, D)))},
            r"block 0: proj.up_RO has shape \(3, 6\), expected \(4, 6\)",
        ),
    ],
)
def test_what_does_not_fit_the_tower_is_refused(
    task: dict[int, BlockLowRank], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pool_of().pack(task, scale=1.0)


@pytest.mark.parametrize("scale", [1e39, math.nan])
def test_a_scale_that_float32_does_not_hold_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="scale is"):
        pool_of().pack(updates(1), scale=scale)


def test_a_rank_larger_than_the_slots_is_refused() -> None:
    with pytest.raises(CapacityError, match="rank 9 is larger than 8"):
        pool_of().pack(updates(1, rank=9), scale=1.0)


def test_a_path_that_is_not_there_cannot_leave() -> None:
    with pytest.raises(ValueError, match="path 0 is not loaded"):
        pool_of().unload(0)


def test_a_packed_task_says_what_it_takes() -> None:
    backbone = tiny_backbone()
    packed = RoutedModel(backbone, precision="bf16", capacity=CAPACITY).pack(
        TaskLowRank(random_low_rank(backbone).vision, {}, scale=1.0)
    )
    assert packed.size_bytes == 3 * 2 * 8 * (64 + 256) * 2


@pytest.mark.parametrize("seed", range(8))
def test_a_freed_slot_is_written_after_all_that_may_read_it(seed: int) -> None:
    """Swaps of the same slots are asked for before anything has been computed."""
    streams = LateStreams(seed)
    pool, plain = pool_of(streams), pool_of()
    found: list[Tensor] = []
    expected = []
    for task in map(updates, range(3)):
        for each in (pool, plain):
            each.load(0, each.pack(task, scale=0.5))
        streams.main.run(lambda: found.append(added(pool, 0)))
        expected.append(added(plain, 0))
        for each in (pool, plain):
            each.unload(0)
    while streams.step():
        pass

    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
