"""Small random backbones and tasks for tests: open_clip's own classes, weights from a seed."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from torch import Tensor, nn

from medley.backbone import Backbone, wrap
from medley.experts import (
    BlockExperts,
    BlockLowRank,
    LowRank,
    TaskExperts,
    TaskLowRank,
    TaskWeights,
)
from medley.tower import Block

CONTEXT, VOCABULARY = 12, 128
VISION_WIDTH, TEXT_WIDTH, IMAGE_BLOCKS, TEXT_BLOCKS = 64, 32, 3, 2


def tiny_tokenizer(texts: Sequence[str]) -> Tensor:
    """Turn a text's bytes into ids 1..126; the end of text has the highest id, as in CLIP."""
    rows = torch.zeros(len(texts), CONTEXT, dtype=torch.int64)
    for row, text in zip(rows, texts, strict=True):
        ids = [1, *(2 + byte % 120 for byte in text.encode()[: CONTEXT - 2]), VOCABULARY - 1]
        row[: len(ids)] = torch.tensor(ids)
    return rows


def tiny_clip(*, quick_gelu: bool = False, image_size: int = 32, **vision: Any) -> CLIP:
    """Build the model of `tiny_backbone`, with more settings of open_clip's for its image tower."""
    model = CLIP(
        24,
        CLIPVisionCfg(
            layers=IMAGE_BLOCKS,
            width=VISION_WIDTH,
            head_width=32,
            patch_size=8,
            image_size=image_size,
            **vision,
        ),
        CLIPTextCfg(
            context_length=CONTEXT,
            vocab_size=VOCABULARY,
            width=TEXT_WIDTH,
            heads=1,
            layers=TEXT_BLOCKS,
        ),
        quick_gelu=quick_gelu,
    )
    model.visual.preprocess_cfg = {"size": image_size, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return model


def tiny_backbone(seed: int = 0, *, quick_gelu: bool = False, **vision: Any) -> Backbone:
    """Build a backbone of 3 image and 2 text blocks for 32 x 32 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = tiny_clip(quick_gelu=quick_gelu, **vision)
    return wrap(model, name="tiny", tokenizer=tiny_tokenizer)


def timm_backbone() -> Backbone:
    """Build a backbone as SigLIP is built: timm's image tower, a text tower without causal mask."""
    model = CustomTextCLIP(
        64,
        CLIPVisionCfg(timm_model_name="vit_tiny_patch16_224", timm_proj="linear", image_size=224),
        CLIPTextCfg(
            context_length=64,
            vocab_size=300,
            width=64,
            heads=2,
            layers=2,
            no_causal_mask=True,
            pool_type="last",
        ),
    )
    model.visual.preprocess_cfg = {"size": 224}

    def tokenizer(texts: Sequence[str]) -> Tensor:
        return torch.ones(len(texts), 64, dtype=torch.int64)

    return wrap(model, name="siglip-like", tokenizer=tokenizer)


def random_experts(
    seed: int = 0,
    *,
    first_expert_block: int = 0,
    num_experts: int = 3,
    top_k: int = 2,
    bottleneck: int = 8,
    backbone: Backbone | None = None,
) -> TaskExperts:
    """Make experts that matter: large enough to change every feature of the tiny backbone."""
    generator = torch.Generator().manual_seed(seed)
    blocks, text_blocks = IMAGE_BLOCKS, TEXT_BLOCKS
    width, text_width = VISION_WIDTH, TEXT_WIDTH
    if backbone is not None:
        assert backbone.text is not None
        blocks, text_blocks = len(backbone.image.blocks), len(backbone.text.blocks)
        width, text_width = backbone.image.width, backbone.text.width

    def block_experts(width: int) -> BlockExperts:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator) * 0.3

        return BlockExperts(
            normal(num_experts, bottleneck, width),
            normal(num_experts, bottleneck),
            normal(num_experts, bottleneck, width),
            normal(num_experts, width),
            normal(width, num_experts),
        )

    return TaskExperts(
        vision={b: block_experts(width) for b in range(first_expert_block, blocks)},
        text={b: block_experts(text_width) for b in range(text_blocks)},
        top_k=top_k,
        scale=0.1,
    )


def random_low_rank(
    backbone: Backbone, seed: int = 0, *, first_block: int = 0, rank: int = 4
) -> TaskLowRank:
    """Make low-rank updates that matter, of image blocks from one on and of all text blocks."""
    generator = torch.Generator().manual_seed(seed)
    assert backbone.text is not None

    def update(layer: nn.Linear) -> LowRank:
        sizes = (layer.in_features, layer.out_features)
        down_RI, up_RO = (0.2 * torch.randn(rank, size, generator=generator) for size in sizes)
        return LowRank(down_RI, up_RO)

    def updates(block: Block) -> BlockLowRank:
        assert block.linears is not None
        return BlockLowRank(*(update(layer) for layer in block.linears))

    return TaskLowRank(
        {i: updates(b) for i, b in enumerate(backbone.image.blocks) if i >= first_block},
        {i: updates(b) for i, b in enumerate(backbone.text.blocks)},
        scale=rank**-0.5,
    )


def random_weights(backbone: Backbone, seed: int = 0, *, first_block: int = 0) -> TaskWeights:
    """Make weights that matter: of image blocks from one on, of what follows, and of all text."""
    generator = torch.Generator().manual_seed(seed)
    image = backbone.image
    own = {id(p) for block in image.blocks[first_block:] for p in block.block.parameters()}
    for name in image.behind:
        part = getattr(backbone.model.visual, name, None)
        if part is not None:
            own |= {id(p) for p in ([part] if isinstance(part, Tensor) else part.parameters())}
    deltas = {
        name: 0.05 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in backbone.model.named_parameters()
        if id(parameter) in own or not name.startswith(("visual.", "logit_"))
    }
    return TaskWeights(deltas, first_block)


def merged(backbone: Backbone, task: TaskLowRank | TaskWeights) -> Backbone:
    """Build the backbone whose weights are those that a task computes with."""
    model = copy.deepcopy(backbone.model)
    changed = wrap(model, name="merged", tokenizer=backbone.tokenizer)
    if isinstance(task, TaskWeights):
        for name, delta in task.deltas.items():
            model.get_parameter(name).add_(delta)
        return changed
    assert changed.text is not None
    for blocks, updates in ((changed.image.blocks, task.vision), (changed.text.blocks, task.text)):
        for index, update in updates.items():
            linears = blocks[index].linears
            assert linears is not None
            for layer, factors in zip(linears, (update.fc, update.proj), strict=True):
                layer.weight.add_(task.scale * factors.up_RO.mT @ factors.down_RI)
    return changed
