"""The routed model computes what the reference of MoE-Adapters computes (golden vectors, 1e-4)."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from medley.backbone import Backbone
from medley.experts import BlockExperts, TaskExperts
from medley.routed import ZERO_SHOT, RoutedModel
from tests.golden_model import CONFIG, close, golden_backbone, load_golden

PATHS = ("zero_shot", "task0", "task1", "task5")


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_golden()


@pytest.fixture(scope="module")
def backbone(golden: dict[str, Tensor]) -> Backbone:
    return golden_backbone(golden)


@pytest.fixture(scope="module")
def model(golden: dict[str, Tensor], backbone: Backbone) -> RoutedModel:
    model = RoutedModel(backbone)
    for task in (0, 1, 5):
        model.load(task_experts(golden, task))
    return model


def task_experts(golden: dict[str, Tensor], task: int) -> TaskExperts:
    def block_experts(block: str) -> BlockExperts:
        def stacked(name: str) -> Tensor:
            return torch.stack(
                [golden[f"{block}.adaptmlp_list.{e}.{name}"] for e in range(CONFIG["experts"])]
            )

        return BlockExperts(
            stacked("down_proj.weight"),
            stacked("down_proj.bias"),
            stacked("up_proj.weight").mT,
            stacked("up_proj.bias"),
            golden[f"{block}.router_list.{task}"],
        )

    return TaskExperts(
        vision={
            b: block_experts(f"model.visual.transformer.resblocks.{b}")
            for b in range(CONFIG["vision_layers"])
        },
        text={
            b: block_experts(f"model.transformer.resblocks.{b}")
            for b in range(CONFIG["text_layers"])
        },
        top_k=CONFIG["top_k"],
        scale=CONFIG["adapter_scale"],
    )


def path_of(name: str) -> int:
    return ZERO_SHOT if name == "zero_shot" else {"task0": 0, "task1": 1, "task5": 2}[name]


@pytest.mark.parametrize("name", PATHS)
def test_features_and_logits_of_each_path_alone(
    name: str, model: RoutedModel, golden: dict[str, Tensor]
) -> None:
    path = path_of(name)
    with torch.inference_mode():
        image = model.encode_image(golden["input.images"], torch.full((7,), path))
        text = model.encode_text(golden["input.text"], path)
    cosine = torch.nn.functional.normalize(image, dim=-1) @ torch.nn.functional.normalize(text).T
    close(image, golden[f"output.{name}.image_features"])
    close(text, golden[f"output.{name}.text_features"])
    close(100 * cosine, golden[f"output.{name}.logits"])


def test_features_of_all_paths_in_one_mixed_batch(
    model: RoutedModel, golden: dict[str, Tensor]
) -> None:
    order = [(i, name) for i in range(7) for name in PATHS]
    images = torch.stack([golden["input.images"][i] for i, _ in order])
    with torch.inference_mode():
        ours = model.encode_image(images, torch.tensor([path_of(name) for _, name in order]))
    theirs = torch.stack([golden[f"output.{name}.image_features"][i] for i, name in order])
    close(ours, theirs)


@pytest.mark.parametrize("name", PATHS[1:])
def test_gates_of_every_block(name: str, model: RoutedModel, golden: dict[str, Tensor]) -> None:
    with torch.inference_mode():
        for tower, block, gates in gates_by_block(model, golden, path_of(name)):
            close(gates, golden[f"output.{name}.gates.{tower}.{block}"])


def gates_by_block(
    model: RoutedModel, golden: dict[str, Tensor], path: int
) -> Iterator[tuple[str, int, Tensor]]:
    image, text = model.backbone.image, model.backbone.text
    assert text is not None
    assert model._text is not None
    tokens, mask = text.embed(golden["input.text"])
    patches = image.embed(image.stem(golden["input.images"]))
    for tower, parts, pool, x, attention_mask in (
        ("image", image, model._vision, patches, None),
        ("text", text, model._text.pool, tokens, mask),
    ):
        paths = torch.full((len(x),), path)
        for index, block in enumerate(parts.blocks):
            attended = block.attend(x, attention_mask)
            yield tower, index, pool.gates(index, attended, paths)[:, : CONFIG["experts"]]
            x = attended + block.mlp(attended) + pool.mixing(index, attended, paths)
