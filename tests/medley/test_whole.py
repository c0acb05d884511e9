"""A path of whole weights is that model, shares what it can, and costs a pass only where taken."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medley.backbone import Backbone
from medley.errors import BackboneError, CapacityError
from medley.experts import TaskUpdate, TaskWeights
from medley.pool import Capacity
from medley.precision import PRECISIONS, Precision
from medley.routed import ZERO_SHOT, RoutedModel
from medley.whole import PackedWeights, WholeModels
from tests.models import (
    merged,
    random_experts,
    random_low_rank,
    random_weights,
    timm_backbone,
    tiny_backbone,
)
from tests.streams import LateStreams

CAPACITY = Capacity(paths=4, slots=6, experts=4, bottleneck=8, low_rank_slots=1, low_rank=8)
BACKBONES: dict[str, Callable[[], Backbone]] = {
    "quick_gelu": lambda: tiny_backbone(quick_gelu=True),
    "attention pooled": lambda: tiny_backbone(attentional_pool=True, attn_pooler_heads=2),
    "qk_norm": lambda: tiny_backbone(block_type="custom", qk_norm=True),
    "timm": timm_backbone,
}


def images(backbone: Backbone, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, *backbone.image_size, generator=generator)


def packed(model: RoutedModel, task: TaskWeights) -> PackedWeights:
    part = model.pack(task).parts["weights"]
    assert isinstance(part, PackedWeights)
    return part


@pytest.mark.parametrize(
    ("name", "first"),
    [("quick_gelu", 0), ("quick_gelu", 3), ("attention pooled", 2), ("qk_norm", 1), ("timm", 11)],
)
def test_a_path_is_the_model_of_its_weights_bit_for_bit(name: str, first: int) -> None:
    backbone = BACKBONES[name]()
    task = random_weights(backbone, first_block=first)
    target = merged(backbone, task)
    pictures, prompts = images(backbone, 2), backbone.tokenize(["a photo of a cat", "x"])
    with torch.inference_mode():
        exact = target.model.encode_image(pictures)
        assert (exact - backbone.model.encode_image(pictures)).norm(dim=-1).min() > 0.02
        for precision in PRECISIONS:
            ours = RoutedModel(backbone, precision=precision, first_expert_block=first)
            path = ours.load(task)
            features = ours.encode_image(pictures, torch.full((2,), path))
            theirs = RoutedModel(target, precision=precision)
            assert torch.equal(features, theirs.finish(theirs.frozen(pictures), None))
            if precision == "exact":
                assert torch.equal(features, exact)
            text = target.model.encode_text(prompts)
            assert torch.equal(ours.encode_text(prompts, path), text)


def test_what_a_path_does_not_change_is_the_very_tensor_of_the_backbone() -> None:
    backbone = tiny_backbone()
    task = random_weights(backbone, first_block=2)
    towers = packed(RoutedModel(backbone, capacity=CAPACITY), task).towers
    assert towers is not None
    theirs = dict(backbone.model.named_parameters())
    for name, parameter in towers.model.named_parameters():
        assert (parameter is theirs[name]) is (name not in task.deltas)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_packed_task_says_what_it_takes(precision: Precision) -> None:
    """The fast forms keep folded image blocks in their dtype, and the rest in float32."""
    backbone = tiny_backbone()
    task = random_weights(backbone, first_block=1)
    blocks = sum(d.numel() for name, d in task.deltas.items() if "visual.transformer" in name)
    rest = sum(d.numel() for d in task.deltas.values()) - blocks
    itemsize = 2 if precision == "bf16" else 4
    model = RoutedModel(backbone, precision=precision, capacity=CAPACITY)
    assert model.pack(task).size_bytes == 4 * rest + itemsize * blocks


def test_the_backbone_itself_stays_as_it_is() -> None:
    backbone = tiny_backbone()
    state = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    for precision in PRECISIONS:
        model = RoutedModel(backbone, precision=precision, capacity=CAPACITY)
        model.unload(model.load(random_weights(backbone)))
    for name, tensor in backbone.model.state_dict().items():
        assert torch.equal(tensor, state[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_scale": torch.zeros(())}, "logit_scale is no parameter of a tower"),
        ({"visual.conv1.weight": torch.zeros(64, 3, 8, 8)}, "visual.conv1.weight is no parameter"),
        ({"visual.positional_embedding": torch.zeros(17, 64)}, "visual.positional_embedding is no"),
        ({"visual.transformer.resblocks.0.ln_1.bias": torch.zeros(64)}, "from image block 1 on"),
        ({"visual.nothing": torch.zeros(1)}, "visual.nothing is no parameter"),
        ({"visual.proj": torch.zeros(3)}, r"has shape \(3,\), expected \(64, 24\)"),
    ],
)
def test_weights_that_no_path_can_have_are_refused(
    changes: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RoutedModel(tiny_backbone()).pack(TaskWeights(changes, first_block=1))


def test_weights_before_the_end_of_the_trunk_or_beyond_the_tower_are_refused() -> None:
    model = RoutedModel(tiny_backbone(), first_expert_block=2)
    with pytest.raises(BackboneError, match="it adds to image block 1, but the trunk"):
        model.pack(TaskWeights({}, first_block=1))
    for block in (-1, 4):
        with pytest.raises(ValueError, match=f"first block {block} is not within 0..3"):
            model.pack(TaskWeights({}, first_block=block))


def test_models_that_are_out_disturb_nobody() -> None:
    backbone = tiny_backbone()
    model = RoutedModel(backbone, capacity=replace(CAPACITY, models=1))
    first, second = (model.pack(random_weights(backbone, seed)) for seed in (1, 2))
    path = model.load(first)
    rows, pictures = torch.tensor([path, ZERO_SHOT]), images(backbone, 2)
    with torch.inference_mode():
        before = model.encode_image(pictures, rows)
        assert model.free_models == 0
        assert not model.has_room(second)
        assert model.has_room(second, {path})
        with pytest.raises(CapacityError, match="all 1 models of tasks with own weights are taken"):
            model.load(second)
        assert model.paths == {path}
        assert torch.equal(model.encode_image(pictures, rows), before)
        model.unload(path)
        assert model.load(second) == path
        assert not torch.equal(model.encode_image(pictures, rows)[0], before[0])


def test_what_a_graph_would_read_never_looks_like_what_it_once_read() -> None:
    backbone = tiny_backbone()
    model = RoutedModel(backbone, capacity=CAPACITY)
    task, seen = model.pack(random_weights(backbone)), [model.layout]
    for _ in range(3):
        path = model.load(task)
        assert model.layout not in seen
        seen.append(model.layout)
        model.unload(path)
        assert model.layout == seen[0]
    model.load(random_experts())
    assert model.layout == seen[0]


class Calls:
    """Counts how often modules are run."""

    def __init__(self, *modules: nn.Module) -> None:
        self.count = 0
        for module in modules:
            module.register_forward_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.count += 1


def test_on_a_cpu_only_the_towers_that_rows_take_are_run() -> None:
    backbone = tiny_backbone()
    model = RoutedModel(backbone, first_expert_block=1, capacity=CAPACITY)
    parts = [packed(model, random_weights(backbone, s, first_block=1)) for s in (1, 2)]
    paths = [
        model.load(replace(model.pack(TaskWeights({}, 1)), parts={"weights": p})) for p in parts
    ]
    assert parts[0].towers is not None
    assert parts[1].towers is not None
    base, one, other = (
        Calls(m.visual.transformer.resblocks[2].mlp)
        for m in (backbone.model, parts[0].towers.model, parts[1].towers.model)
    )

    def calls(*rows: int) -> tuple[int, int, int]:
        base.count = one.count = other.count = 0
        with torch.inference_mode():
            model.encode_image(images(backbone, len(rows)), torch.tensor(rows))
        return base.count, one.count, other.count

    assert calls(ZERO_SHOT, ZERO_SHOT) == (1, 0, 0)
    assert calls(paths[0], paths[0]) == (0, 1, 0)
    assert calls(*paths) == (0, 1, 1)
    assert calls(paths[1], ZERO_SHOT) == (1, 0, 1)


@pytest.mark.parametrize("seed", range(4))
def test_memory_of_a_model_is_written_after_all_that_may_read_what_it_was(seed: int) -> None:
    """On a device that is not the host, towers are made there of tensors that come behind."""
    streams, backbone = LateStreams(seed), tiny_backbone()
    order: list[str] = []
    streams.main.run(lambda: order.append("launched before"))
    model = RoutedModel(backbone)
    models = WholeModels(backbone, model._image, precision="exact", models=1, streams=streams)
    task = random_weights(backbone)
    tensors = {n: backbone.model.get_parameter(n) + d for n, d in task.deltas.items()}
    models.load(0, PackedWeights(tensors, None, 0, 0))
    pictures, target = images(backbone, 1), merged(backbone, task).model
    ((image, _),) = models.takers(torch.tensor([0]))

    def compute() -> None:
        order.append("computed")
        x_BLD = image.embed(image.stem(pictures))
        assert torch.equal(image.finish(x_BLD, 0), target.encode_image(pictures))

    streams.main.run(compute)
    copies = 0
    while streams.step():
        copies += order == ["launched before"]
    assert order == ["launched before", "computed"]
    assert copies > len(tensors)


@pytest.mark.parametrize(
    ("make", "precision"),
    [*((tiny_backbone, precision) for precision in PRECISIONS), (BACKBONES["qk_norm"], "fp32")],
)
def test_rows_of_all_kinds_in_one_batch_are_what_each_is_alone(
    make: Callable[[], Backbone], precision: Precision
) -> None:
    """Alone: the rest of the batch is zero-shot, and no other task is loaded."""
    backbone = make()
    tasks: list[TaskUpdate] = [
        random_experts(1, backbone=backbone, first_expert_block=1),
        random_low_rank(backbone, 2),
        random_low_rank(backbone, 3, first_block=1, rank=8),
        random_weights(backbone, 4, first_block=1),
        random_weights(backbone, 5),
    ]
    capacity = replace(CAPACITY, paths=5, low_rank_slots=2)
    model = RoutedModel(backbone, precision=precision, capacity=capacity)
    pictures = images(backbone, 8)
    with torch.inference_mode():
        before = model.encode_image(pictures, torch.full((8,), ZERO_SHOT))
        paths = [ZERO_SHOT, *map(model.load, tasks), ZERO_SHOT]
        mixed = model.encode_image(pictures, torch.tensor([*paths, paths[2]]))
        for row in (0, 6):
            assert torch.equal(mixed[row], before[row])
        for place, task in enumerate(tasks, start=1):
            alone = RoutedModel(backbone, precision=precision, capacity=capacity)
            rows = torch.full((8,), ZERO_SHOT)
            rows[place] = alone.load(task)
            features = alone.encode_image(pictures, rows)
            assert torch.equal(mixed[place], features[place])
            assert not torch.equal(mixed[place], before[place])
        for path in paths[1:-1]:
            model.unload(path)
        assert torch.equal(model.encode_image(pictures, torch.full((8,), ZERO_SHOT)), before)
