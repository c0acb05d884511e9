"""The golden model of MoE-Adapters4CL: its numbers, and a backbone of its frozen part."""

import json
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import load_file
from torch import Tensor

from medley.backbone import Backbone, wrap

FOLDER = Path(__file__).parent / "golden"
CONFIG: dict[str, Any] = json.loads((FOLDER / "moe_adapters_small.json").read_text())


def load_golden() -> dict[str, Tensor]:
    """All golden tensors: `model.*`, `input.*` and `output.*`."""
    return load_file(FOLDER / "moe_adapters_small.safetensors")


def golden_state_dict(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference's own state dict, under its own names."""
    return {k.removeprefix("model."): v for k, v in golden.items() if k.startswith("model.")}


def golden_backbone(golden: dict[str, Tensor], *, quick_gelu: bool = True) -> Backbone:
    """The frozen part; its tokenizer answers the golden prompts whatever it is asked."""
    model = CLIP(
        CONFIG["embed_dim"],
        CLIPVisionCfg(
            layers=CONFIG["vision_layers"],
            width=CONFIG["vision_width"],
            head_width=64,
            patch_size=CONFIG["patch_size"],
            image_size=CONFIG["image_size"],
        ),
        CLIPTextCfg(
            context_length=CONFIG["context_length"],
            vocab_size=CONFIG["vocab_size"],
            width=CONFIG["text_width"],
            heads=1,
            layers=CONFIG["text_layers"],
        ),
        quick_gelu=quick_gelu,
    )
    ours = model.state_dict().keys()
    frozen = {k: v for k, v in golden_state_dict(golden).items() if k in ours}
    model.load_state_dict(frozen, strict=True)
    return wrap(model, name="golden", tokenizer=lambda texts: golden["input.text"][: len(texts)])


def close(ours: Tensor, theirs: Tensor) -> None:
    """Golden vectors are met at 1e-4."""
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
