"""The fast form says what the exact one says within rounding; its promises it keeps bit by bit."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from open_clip.transformer import LayerScale
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medley.backbone import Backbone, load_backbone
from medley.fused import FusedBlock, fast_pass
from medley.mini import load_mini
from medley.pool import Capacity
from medley.precision import Precision, dtype_of
from medley.routed import ZERO_SHOT, PackedTask, RoutedModel
from medley.tower import image_tower, text_tower
from medley.whole import PackedWeights
from tests.models import (
    VISION_WIDTH,
    random_experts,
    random_low_rank,
    timm_backbone,
    tiny_backbone,
    tiny_clip,
)

CAPACITY = Capacity(paths=4, slots=12, experts=4, bottleneck=8, max_top_k=2)
FAST: tuple[Precision, ...] = ("fp32", "bf16")


def layer_scale() -> Backbone:
    backbone = tiny_backbone(ls_init_value=1.0)
    generator = torch.Generator().manual_seed(1)
    for module in backbone.model.visual.modules():
        if isinstance(module, LayerScale):
            module.gamma.copy_(torch.rand(module.gamma.shape, generator=generator) + 0.5)
    return backbone


BACKBONES: dict[str, Callable[[], Backbone]] = {
    "gelu": tiny_backbone,
    "quick_gelu": lambda: tiny_backbone(quick_gelu=True),
    "layer_scale": layer_scale,
    "qk_norm": lambda: tiny_backbone(block_type="custom", qk_norm=True),
    "mean pooled": lambda: tiny_backbone(pool_type="avg"),
    "norm after pooling": lambda: tiny_backbone(final_ln_after_pool=True),
    "attention pooled": lambda: tiny_backbone(attentional_pool=True, attn_pooler_heads=2),
    "timm": timm_backbone,
    "long": lambda: tiny_backbone(image_size=96),  # more tokens than `fused.LONG`
    "medley-mini": load_backbone,
}


def images(backbone: Backbone, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, *backbone.image_size, generator=generator)


def loaded(
    backbone: Backbone, precision: Precision, *, first: int | None = None
) -> tuple[RoutedModel, list[int]]:
    """A model with two tasks; also the paths that there are."""
    model = RoutedModel(backbone, precision=precision, first_expert_block=first, capacity=CAPACITY)
    own = len(backbone.image.blocks) - 2
    paths = [
        model.load(random_experts(seed, backbone=backbone, first_expert_block=own))
        for seed in (1, 2)
    ]
    return model, [ZERO_SHOT, *paths]


def fast_blocks(backbone: Backbone) -> list[bool]:
    steps = fast_pass(backbone.model.visual, torch.float32).steps
    return [isinstance(step, FusedBlock) for step in steps]


@pytest.mark.parametrize("precision", FAST)
@pytest.mark.parametrize("name", BACKBONES)
def test_fast_is_exact_within_rounding(name: str, precision: Precision) -> None:
    """A bfloat16 keeps 8 bits, and some twenty roundings in a row lose about 2 of them."""
    backbone = BACKBONES[name]()
    models = [RoutedModel(backbone, precision=p, capacity=CAPACITY) for p in (precision, "exact")]
    for model in models:  # all of a path's experts at once: which ones would be a step
        path = model.load(random_experts(1, backbone=backbone, num_experts=2))
    pictures, rows = images(backbone, 4), torch.tensor([path, ZERO_SHOT, path, ZERO_SHOT])
    with torch.inference_mode():
        ours, theirs = (model.encode_image(pictures, rows) for model in models)
        assert (theirs - models[1].encode_image(pictures, -torch.ones_like(rows)))[0].norm() > 0.1
    error = (ours.float() - theirs).norm(dim=-1) / theirs.norm(dim=-1)
    assert error.max() < (2**-5 if precision == "bf16" else 1e-5)


@pytest.mark.parametrize(
    "name", ["gelu", "quick_gelu", "layer_scale", "mean pooled", "medley-mini"]
)
def test_blocks_of_open_clip_take_the_fast_form(name: str) -> None:
    assert all(fast_blocks(BACKBONES[name]()))


@pytest.mark.parametrize("name", ["qk_norm", "timm"])
def test_other_blocks_stay_the_modules_they_are(name: str) -> None:
    assert not any(fast_blocks(BACKBONES[name]()))


@pytest.mark.parametrize(
    ("name", "narrow"),
    [
        ("gelu", True),
        ("norm after pooling", True),
        ("mean pooled", False),
        ("attention pooled", False),
        ("qk_norm", False),
        ("timm", False),
        ("medley-mini", False),
    ],
)
def test_the_last_block_skips_tokens_only_where_token_0_is_pooled(name: str, narrow: bool) -> None:
    backbone = BACKBONES[name]()
    image = fast_pass(backbone.model.visual, torch.float32)
    x_BLD = image.embed(image.stem(images(backbone, 2)))
    assert image.steps[-1](x_BLD, None).shape[1] == (1 if narrow else x_BLD.shape[1])
    assert (image.whole_last is not None) is narrow


@pytest.mark.parametrize("precision", FAST)
def test_a_block_for_token_0_says_what_the_whole_one_says_of_it(precision: Precision) -> None:
    backbone = BACKBONES["layer_scale"]()
    image = fast_pass(backbone.model.visual, dtype_of(precision))
    assert image.whole_last is not None
    with torch.inference_mode():
        x_BLD = image.embed(image.stem(images(backbone, 3)))
        narrow, whole = image.steps[-1](x_BLD, None), image.whole_last(x_BLD, None)
    bits = 2**-6 if precision == "bf16" else 1e-5
    torch.testing.assert_close(narrow, whole[:, :1], rtol=bits, atol=bits)


@pytest.mark.parametrize("precision", FAST)
@pytest.mark.parametrize("name", ["gelu", "layer_scale", "timm", "medley-mini"])
def test_a_zero_shot_row_is_the_frozen_fast_tower_bit_for_bit(
    name: str, precision: Precision
) -> None:
    backbone = BACKBONES[name]()
    model, (_, first, second) = loaded(backbone, precision)
    plain = RoutedModel(backbone, precision=precision, capacity=CAPACITY)
    with torch.inference_mode():
        frozen = plain.frozen(images(backbone, 4), features=True).features_BE
        assert frozen is not None
        mixed = model.encode_image(
            images(backbone, 4), torch.tensor([first, ZERO_SHOT, second, ZERO_SHOT])
        )
        assert torch.equal(mixed[[1, 3]], frozen[[1, 3]])
        assert torch.equal(model.finish(model.frozen(images(backbone, 4)), None), frozen)


@pytest.mark.parametrize("precision", FAST)
@pytest.mark.parametrize("name", ["gelu", "medley-mini"])
def test_an_image_does_not_depend_on_its_neighbours_and_by_rounding_on_its_place(
    name: str, precision: Precision
) -> None:
    backbone = BACKBONES[name]()
    model, paths = loaded(backbone, precision)
    mine = images(backbone, 1, seed=9)[0]

    def at(place: int, seed: int, path: int) -> Tensor:
        batch, rows = images(backbone, 4, seed), torch.tensor((paths * 2)[seed : seed + 4])
        batch[place], rows[place] = mine, path
        with torch.inference_mode():
            return model.encode_image(batch, rows)[place]

    # Two threads share out the four rows of token 0, and the library sums each share its own way:
    # an ulp of what was added up, of the dtype that it is stored in.
    tolerance = {"fp32": 1e-5, "bf16": 2e-2}[precision]
    for path in paths:
        assert torch.equal(at(0, 1, path), at(0, 2, path))
        torch.testing.assert_close(at(3, 2, path), at(0, 1, path), rtol=0, atol=tolerance)


@pytest.mark.parametrize("precision", FAST)
def test_where_the_trunk_ends_changes_no_bit(precision: Precision) -> None:
    backbone = tiny_backbone()
    shallow, paths = loaded(backbone, precision, first=0)
    deep, _ = loaded(backbone, precision)
    assert (shallow.first_expert_block, deep.first_expert_block) == (0, 1)
    rows = torch.tensor(paths)
    with torch.inference_mode():
        pictures = images(backbone, 3)
        assert torch.equal(shallow.encode_image(pictures, rows), deep.encode_image(pictures, rows))


@pytest.mark.parametrize("precision", FAST)
def test_taps_are_those_of_the_exact_tower(precision: Precision) -> None:
    backbone = tiny_backbone()
    taps = ["stem:mean_std", "block1:mean", "block3:mean", "block3:cls", "embedding"]
    exact, fast = (RoutedModel(backbone, precision=p) for p in ("exact", precision))
    with torch.inference_mode():
        ours, theirs = (m.frozen(images(backbone, 3), taps=taps).taps for m in (fast, exact))
    bits = 2**-5 if precision == "bf16" else 1e-5
    for name in taps:
        assert ours[name].dtype == torch.float32
        torch.testing.assert_close(ours[name], theirs[name], rtol=bits, atol=bits, msg=name)


@pytest.mark.parametrize("precision", FAST)
def test_a_tap_at_the_last_block_changes_no_bit_of_the_features(precision: Precision) -> None:
    backbone = tiny_backbone()
    model = RoutedModel(backbone, precision=precision, capacity=CAPACITY)
    pictures = images(backbone, 2)
    with torch.inference_mode():
        plain = model.frozen(pictures, features=True, taps=["block3:cls"])
        tapped = model.frozen(pictures, features=True, taps=["block3:mean", "block3:cls"])
    assert plain.features_BE is not None
    assert tapped.features_BE is not None
    assert torch.equal(plain.features_BE, tapped.features_BE)
    assert torch.equal(plain.taps["block3:cls"], tapped.taps["block3:cls"])


def test_the_backbone_itself_stays_as_it_is() -> None:
    backbone = tiny_backbone()
    state = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    before = backbone.model.encode_image(images(backbone, 2))
    for precision in FAST:
        model = RoutedModel(backbone, precision=precision, capacity=CAPACITY)
        model.encode_image(images(backbone, 2), torch.tensor([ZERO_SHOT] * 2))
    assert torch.equal(backbone.model.encode_image(images(backbone, 2)), before)
    for name, tensor in backbone.model.state_dict().items():
        assert torch.equal(tensor, state[name])
        assert tensor.dtype == state[name].dtype


def test_the_folded_stem_of_our_own_base_has_no_norm_left_and_says_the_same() -> None:
    stem = load_mini().visual.conv1
    folded = stem.folded()
    assert not any("BatchNorm" in type(module).__name__ for module in folded.modules())
    pixels = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(folded(pixels), stem(pixels), rtol=1e-4, atol=1e-4)


class OnDevice(TorchDispatchMode):
    """Refuses whatever touches a tensor of the host, or makes one out of Python's numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, answer)) if isinstance(t, Tensor)]
        if func is torch.ops.aten.lift_fresh.default or any(
            t.device.type == "cpu" for t in tensors
        ):
            raise RuntimeError(f"{func} looks at the host")
        return answer


def without_values(real: Backbone, precision: Precision) -> RoutedModel:
    with torch.device("meta"):
        model = tiny_clip().eval().requires_grad_(requires_grad=False)
        image, text = image_tower(model.visual), text_tower(model)
        backbone = replace(real, model=model, image=image, text=text)
        return RoutedModel(backbone, precision=precision, first_expert_block=1, capacity=CAPACITY)


@pytest.mark.parametrize("precision", ["exact", *FAST])
def test_a_forward_neither_reads_back_nor_brings_a_tensor_from_the_host(
    precision: Precision,
) -> None:
    """Traced with tensors that have shapes and no values: who looks at a value raises.

    It proves nothing about what a kernel does inside.
    """
    model = without_values(tiny_backbone(), precision)
    model.load(random_low_rank(tiny_backbone(), first_block=1))
    own = {"visual.transformer.resblocks.1.mlp.c_fc.bias": torch.zeros(4 * VISION_WIDTH)}
    model.load(PackedTask({"weights": PackedWeights(own, None, 1, 0)}, first_block=1))
    pixels = torch.empty(4, 3, 32, 32, dtype=torch.uint8, device="meta")
    paths = torch.zeros(4, dtype=torch.int64, device="meta")
    taps = ["stem:mean_std", "block1:mean", "block3:mean", "embedding"]
    model.backbone.normalise(pixels)  # the first time it fetches its constants
    with torch.inference_mode(), OnDevice():  # type: ignore[no-untyped-call]
        images_BCHW = model.backbone.normalise(pixels)
        for rows in (None, paths):
            features = model.finish(model.frozen(images_BCHW, taps=taps), rows)
            assert features.shape == (4, 24)
        for look in (
            lambda: features.sum().item(),
            lambda: features[features > 0],
            lambda: features.cpu(),
            lambda: features + torch.tensor(1.0),
            lambda: torch.tensor([1.0], device="meta"),
            lambda: torch.ones(1).to("meta"),
        ):
            with pytest.raises((RuntimeError, NotImplementedError)):
                look()
