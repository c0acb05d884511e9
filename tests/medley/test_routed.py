"""Zero-shot is open_clip bit for bit, rows do not see each other, tasks leave no trace."""

from typing import Any

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.model import CLIP
from torch import Tensor
from torchvision.transforms.functional import normalize

from medley.backbone import Backbone, load_backbone, wrap
from medley.errors import BackboneError, CapacityError
from medley.mini import load_mini, mini_tokenizer
from medley.pool import Capacity
from medley.routed import ZERO_SHOT, RoutedModel
from tests.models import random_experts, timm_backbone, tiny_backbone

SMALL = Capacity(paths=4, slots=12, experts=4, bottleneck=8, max_top_k=2)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def assert_zero_shot_is_open_clip(model: Any, backbone: Backbone, size: int) -> None:
    first = len(backbone.image.blocks) // 2
    routed = RoutedModel(backbone, first_expert_block=first, capacity=SMALL)
    routed.load(random_experts(backbone=backbone, first_expert_block=first))
    pictures = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    tokens = backbone.tokenize(["a photo of a cat", "steam locomotive"])
    with torch.inference_mode():
        assert torch.equal(
            routed.encode_image(pictures, torch.tensor([ZERO_SHOT] * 2)),
            model.encode_image(pictures),
        )
        features = routed.frozen(pictures, features=True).features_BE
        assert features is not None
        assert torch.equal(features, model.encode_image(pictures))
        assert torch.equal(
            routed.encode_image(pictures, torch.tensor([0, ZERO_SHOT]))[1],
            model.encode_image(pictures)[1],
        )
        assert torch.equal(routed.encode_text(tokens), model.encode_text(tokens))


ARCHITECTURES = ("ViT-B-32", "ViT-B-16", "ViT-L-14")


def random_open_clip(name: str, layers: int | None) -> CLIP:
    """Build an open_clip architecture with random weights, cut to its first layers if asked."""
    config = open_clip.get_model_config(name)
    if layers is not None:
        config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = layers
    return CLIP(**config)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_zero_shot_equals_open_clip_bit_for_bit(name: str) -> None:
    model = random_open_clip(name, layers=2)
    backbone = wrap(model, name=name, tokenizer=open_clip.get_tokenizer(name))
    assert_zero_shot_is_open_clip(model, backbone, 224)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_zero_shot_equals_open_clip_bit_for_bit_at_full_depth(name: str) -> None:
    model = random_open_clip(name, layers=None)
    backbone = wrap(model, name=name, tokenizer=open_clip.get_tokenizer(name))
    assert_zero_shot_is_open_clip(model, backbone, 224)


def test_zero_shot_of_our_own_base_equals_open_clip_bit_for_bit() -> None:
    model = load_mini()
    backbone = wrap(model, name="medley-mini", tokenizer=mini_tokenizer())
    assert_zero_shot_is_open_clip(model, backbone, backbone.image_size[0])


def test_zero_shot_of_a_timm_tower_equals_open_clip_bit_for_bit() -> None:
    backbone = timm_backbone()
    assert_zero_shot_is_open_clip(backbone.model, backbone, 224)


def test_a_backbone_without_transformer_blocks_is_refused_by_name() -> None:
    model = random_open_clip("RN50", layers=None)
    with pytest.raises(BackboneError, match="ModifiedResNet is not a vision transformer"):
        wrap(model, name="RN50", tokenizer=open_clip.get_tokenizer("RN50"))


@given(seed=st.integers(0, 2**31), bucket=st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=20, deadline=None)
def test_an_image_does_not_depend_on_its_neighbours(seed: int, bucket: int) -> None:
    """Exact on a CPU: at one batch size each row is added up in the same order, wherever it is."""
    model = RoutedModel(tiny_backbone(), first_expert_block=1, capacity=SMALL)
    paths = [ZERO_SHOT, *(model.load(random_experts(s, first_expert_block=1)) for s in (1, 2))]
    g = torch.Generator().manual_seed(seed)
    mine, own_path = images(1, seed), paths[seed % 3]

    def beside(neighbours: int) -> Tensor:
        place = int(torch.randint(bucket, (1,), generator=g))
        batch = images(bucket, neighbours)
        batch[place] = mine[0]
        rows = torch.tensor(paths)[torch.randint(3, (bucket,), generator=g)]
        rows[place] = own_path
        with torch.inference_mode():
            return model.encode_image(batch, rows)[place]

    assert torch.equal(beside(seed + 1), beside(seed + 2))


@pytest.mark.parametrize("device", ["cuda", "gpu"])
def test_a_device_that_is_not_there_is_refused_by_name(device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(BackboneError, match=f"device '?{device}"):
        load_backbone(device=device)


@pytest.mark.parametrize("bucket", [1, 4, 8])
def test_an_image_does_not_depend_on_its_place_and_neighbours_in_our_own_base(bucket: int) -> None:
    backbone = load_backbone()
    model = RoutedModel(backbone, first_expert_block=2, capacity=Capacity(paths=2, slots=8))
    path = model.load(random_experts(backbone=backbone, first_expert_block=2))
    g = torch.Generator().manual_seed(bucket)
    batches = torch.randn(3, bucket, 3, *backbone.image_size, generator=g)
    batches[1:, -1] = batches[0, 0]
    with torch.inference_mode():
        first, *others = (
            model.encode_image(batch, torch.tensor([*[other] * (bucket - 1), path]).roll(shift))
            for batch, other, shift in zip(batches, (path, ZERO_SHOT, path), (1, 0, 0), strict=True)
        )
    for features in others:
        assert torch.equal(features[-1], first[0])


def test_experts_change_the_answer_of_their_own_rows_only(backbone: Backbone) -> None:
    model = RoutedModel(backbone, capacity=SMALL)
    path = model.load(random_experts())
    with torch.inference_mode():
        mixed = model.encode_image(images(4), torch.tensor([path, ZERO_SHOT, path, ZERO_SHOT]))
        plain = model.encode_image(images(4), torch.tensor([ZERO_SHOT] * 4))
    assert torch.equal(mixed[[1, 3]], plain[[1, 3]])
    assert (mixed[[0, 2]] - plain[[0, 2]]).abs().max() > 1e-3


def test_loading_and_unloading_other_tasks_changes_no_bit_of_a_task(backbone: Backbone) -> None:
    model = RoutedModel(backbone, capacity=SMALL)
    path = model.load(random_experts(1))
    rows = torch.full((3,), path)
    with torch.inference_mode():
        before = model.encode_image(images(3), rows)
        for seed in range(2, 30):
            model.unload(model.load(random_experts(seed)))
        second = model.load(random_experts(99))
        assert torch.equal(model.encode_image(images(3), rows), before)
        assert not torch.equal(model.encode_image(images(3), torch.full((3,), second)), before)


def test_an_expert_that_two_tasks_share_takes_one_slot(backbone: Backbone) -> None:
    model = RoutedModel(backbone, capacity=SMALL)
    shared = random_experts(1)
    first, second = model.load(shared), model.load(shared)
    assert model._vision.free_slots == SMALL.slots - 3
    model.unload(first)
    assert model._vision.free_slots == SMALL.slots - 3
    model.unload(second)
    assert model._vision.free_slots == SMALL.slots


def test_a_task_that_finds_no_room_is_refused_and_leaves_nothing_behind(backbone: Backbone) -> None:
    model = RoutedModel(backbone, capacity=SMALL)
    for seed in range(4):
        model.load(random_experts(seed))
    with pytest.raises(CapacityError, match="all 4 paths are taken"):
        model.load(random_experts(5))
    model.unload(3)
    model.load(random_experts(6))

    narrow = RoutedModel(backbone, capacity=Capacity(slots=4, bottleneck=8, experts=4, max_top_k=2))
    narrow.load(random_experts(1))
    for _ in range(3):
        with pytest.raises(CapacityError, match="3 expert slots needed, 1 free"):
            narrow.load(random_experts(2))
    assert narrow._vision.free_slots == 1


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (random_experts(bottleneck=16), "bottleneck 16 is larger than 8"),
        (random_experts(num_experts=5), "5 experts, room for 4"),
        (random_experts(top_k=3), "top_k 3 is larger than max_top_k 2"),
    ],
)
def test_experts_larger_than_the_slots_are_refused(
    experts: object, message: str, backbone: Backbone
) -> None:
    with pytest.raises(CapacityError, match=message):
        RoutedModel(backbone, capacity=SMALL).load(experts)  # type: ignore[arg-type]


def test_a_smaller_bottleneck_than_the_slots_computes_the_same(backbone: Backbone) -> None:
    task = random_experts(bottleneck=8)
    rows = torch.zeros(2, dtype=torch.int64)
    tight = RoutedModel(backbone, capacity=SMALL)
    roomy = RoutedModel(backbone, capacity=Capacity(paths=2, slots=8, experts=4, bottleneck=32))
    tight.load(task)
    roomy.load(task)
    with torch.inference_mode():
        torch.testing.assert_close(
            tight.encode_image(images(2), rows), roomy.encode_image(images(2), rows)
        )


def test_experts_in_blocks_of_the_trunk_are_refused(backbone: Backbone) -> None:
    with pytest.raises(BackboneError, match="it adds to image block 0"):
        RoutedModel(backbone, first_expert_block=1, capacity=SMALL).load(random_experts())


def test_taps_are_the_same_however_deep_the_pass_goes(backbone: Backbone) -> None:
    model = RoutedModel(backbone, first_expert_block=1, capacity=SMALL)
    with torch.inference_mode():
        shallow = model.frozen(images(2), taps=["stem:mean_std", "block1:mean"])
        deep = model.frozen(
            images(2), taps=["stem:mean_std", "block1:mean", "block3:cls", "embedding"]
        )
    for name, tap in shallow.taps.items():
        assert torch.equal(tap, deep.taps[name])
    assert shallow.features_BE is None
    assert torch.equal(shallow.hidden_BLD, deep.hidden_BLD)
    assert deep.taps["stem:mean_std"].shape == (2, 128)
    torch.testing.assert_close(deep.taps["embedding"].norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize("tap", ["block9:mean", "block0:mean", "blockx", "stem:max", "pixels"])
def test_a_feature_that_the_backbone_does_not_have_is_refused(tap: str, backbone: Backbone) -> None:
    with pytest.raises(BackboneError, match=tap):
        RoutedModel(backbone, capacity=SMALL).frozen(images(1), taps=[tap])


def test_the_trunk_follows_the_loaded_tasks_and_no_bit_changes(backbone: Backbone) -> None:
    model = RoutedModel(backbone, first_expert_block=None, capacity=SMALL)
    assert model.first_expert_block == len(backbone.image.blocks)
    late = model.load(random_experts(1, first_expert_block=2))
    assert model.first_expert_block == 2
    rows = torch.tensor([late, ZERO_SHOT])
    with torch.inference_mode():
        before = model.encode_image(images(2), rows)
        early = model.load(random_experts(2))
        assert model.first_expert_block == 0
        assert torch.equal(model.encode_image(images(2), rows), before)
        model.unload(early)
        assert model.first_expert_block == 2
        assert torch.equal(model.encode_image(images(2), rows), before)
    model.unload(late)
    assert model.first_expert_block == len(backbone.image.blocks)


def test_a_batch_goes_on_from_where_its_trunk_ended(backbone: Backbone) -> None:
    model = RoutedModel(backbone, first_expert_block=None, capacity=SMALL)
    early, late = model.load(random_experts(1)), model.load(random_experts(2, first_expert_block=2))
    rows = torch.tensor([late, ZERO_SHOT])
    with torch.inference_mode():
        frozen = model.frozen(images(2))
        expected = model.finish(frozen, rows)
        model.unload(early)
        deeper = model.frozen(images(2))
        assert (frozen.depth, deeper.depth) == (0, 2)
        assert torch.equal(model.finish(frozen, rows), expected)
        assert torch.equal(model.finish(deeper, rows), expected)


def test_a_batch_that_is_told_zero_shot_needs_no_paths(backbone: Backbone) -> None:
    model = RoutedModel(backbone, capacity=SMALL)
    model.load(random_experts(1))
    with torch.inference_mode():
        features = model.finish(model.frozen(images(3)), None)
        assert torch.equal(features, backbone.model.encode_image(images(3)))


def prompts(backbone: Backbone) -> Tensor:
    return backbone.tokenize(["a photo of a cat", "steam locomotive", "x"])


def text_by_router(model: RoutedModel, tokens: Tensor, path: int) -> Tensor:
    """What the routers say when every one of them is asked for every prompt."""
    text = model.backbone.text
    assert text is not None
    assert model._text is not None
    rows = torch.full((len(tokens),), path)
    x, mask = text.embed(tokens)
    for index, block in enumerate(text.blocks):
        x = block.attend(x, mask)
        x = x + block.mlp(x) + model._text.pool.mixing(index, x, rows)
    return text.pool(x, tokens)


def test_text_routing_of_a_causal_tower_is_a_constant_of_the_path(backbone: Backbone) -> None:
    model = RoutedModel(backbone, capacity=SMALL)
    tokens = prompts(backbone)
    with torch.inference_mode():
        for seed in range(4):
            path = model.load(random_experts(seed))
            expected = text_by_router(model, tokens, path)
            torch.testing.assert_close(model.encode_text(tokens, path), expected)
            assert (expected - model.encode_text(tokens)).abs().max() > 1e-3


def test_no_router_runs_for_a_prompt_after_the_first(backbone: Backbone) -> None:
    model = RoutedModel(backbone, capacity=SMALL)
    path = model.load(random_experts(1))
    tokens = prompts(backbone)
    with torch.inference_mode():
        before = model.encode_text(tokens, path)
        assert model._text is not None
        model._text.pool.routers_NPDE.fill_(torch.nan)
        assert torch.equal(model.encode_text(tokens, path), before)


def test_a_path_that_takes_the_place_of_another_routes_its_own_prompts(backbone: Backbone) -> None:
    model = RoutedModel(backbone, capacity=SMALL)
    tokens = prompts(backbone)
    with torch.inference_mode():
        first = model.load(random_experts(1))
        model.encode_text(tokens, first)
        model.unload(first)
        assert model.load(random_experts(2)) == first
        expected = text_by_router(model, tokens, first)
        torch.testing.assert_close(model.encode_text(tokens, first), expected)


@pytest.mark.parametrize("causal", [True, False])
def test_prompts_that_begin_differently_are_routed_one_by_one(causal: bool) -> None:
    backbone = tiny_backbone() if causal else timm_backbone()
    model = RoutedModel(backbone, capacity=SMALL)
    path = model.load(random_experts(1, backbone=backbone))
    tokens = torch.arange(2, 2 + 3 * 12).view(3, 12) if causal else torch.arange(192).view(3, 64)
    with torch.inference_mode():
        expected = text_by_router(model, tokens, path)
        assert torch.equal(model.encode_text(tokens, path), expected)


def test_pixels_are_normalised_as_torchvision_does(backbone: Backbone) -> None:
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    for _ in range(2):  # the second time from what is kept on the device
        expected = normalize(pixels / 255, list(backbone.mean), list(backbone.std))
        assert torch.equal(backbone.normalise(pixels), expected)
