"""medley-mini, the embedded base: open_clip's own CLIP with a pretrained convolutional stem.

Architecture, weights and tokenizer only. Nothing is downloaded and nothing is trained here; see
`trainer/pretrain` for the recipe and ``assets/MODEL_CARD.md`` for what it can and cannot do.

Dimensions: B batch, C channels, D width, h w token grid.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from medley.errors import BackboneError

__all__ = ["MINI_PREPROCESS", "Stem", "build_mini", "load_mini", "mini_tokenizer"]

ASSETS = Path(__file__).parent / "assets"
WEIGHTS = ASSETS / "medley-mini.safetensors"
MERGES = ASSETS / "bpe_8k.txt.gz"

IMAGE_SIZE = 128
CONTEXT_LENGTH = 24
EMBED_DIM = 384
WIDTH = 256
LAYERS = 4
VOCABULARY = 8514  # 256 bytes, the same ending a word, the first 8,000 merges, start and end
_PATCH = 16  # one token per cell of the stem's finer level
_TRUNK_CHANNELS = (112, 320)  # EfficientNet-lite0 at strides 16 and 32

MINI_PREPROCESS = PreprocessCfg(
    size=IMAGE_SIZE,
    mean=(0.5, 0.5, 0.5),  # what EfficientNet-lite0 was trained with
    std=(0.5, 0.5, 0.5),
    interpolation="bicubic",
    resize_mode="shortest",  # then the centre crop: open_clip's usual evaluation transform
)


class Mixer(nn.Module):
    """Both levels of the trunk, standardised by frozen statistics, to one token each.

    Takes the stacked map (B, 432, h, w) of `stack_levels`, returns (B, D, h, w).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        channels = sum(_TRUNK_CHANNELS)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.proj = nn.Conv2d(channels, width, 1)

    def forward(self, stacked_BChw: Tensor) -> Tensor:
        """(B, 432, h, w) to (B, D, h, w)."""
        mean, std = self.mean[:, None, None], self.std[:, None, None]
        tokens: Tensor = self.proj((stacked_BChw - mean) / std)
        return tokens

    def folded(self) -> nn.Conv2d:
        """The same in one convolution, up to rounding."""
        proj = copy.deepcopy(self.proj)
        assert proj.bias is not None
        proj.weight /= self.std[:, None, None]
        proj.bias -= (proj.weight * self.mean[:, None, None]).sum((1, 2, 3))
        return proj


class Stem(nn.Module):
    """A frozen EfficientNet-lite0 with the contract of a ViT's ``conv1``.

    (B, 3, 128, 128) to (B, D, 8, 8). The ViT sees edges and parts (stride 16) together with what
    ImageNet taught the last stage about objects (stride 32, each cell repeated 2 x 2).
    """

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.trunk = timm.create_model(
            "tf_efficientnet_lite0", pretrained=False, features_only=True, out_indices=(3, 4)
        ).requires_grad_(False)
        self.mix = Mixer(width)
        self.eval()

    def train(self, mode: bool = True) -> Stem:
        """Only the mixer trains: the trunk's batch statistics are frozen with its weights."""
        super().train(mode)
        self.trunk.eval()
        return self

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, D, H/16, W/16)."""
        tokens: Tensor = self.mix(stack_levels(*self.levels(pixels_B3HW)))
        return tokens

    @torch.no_grad()
    def folded(self) -> Stem:
        """A copy with the batch norms folded into the convolutions: the same up to rounding.

        It takes about a fifth less time (docs/adr/0015).
        """
        stem = copy.deepcopy(self)
        for module in list(stem.trunk.modules()):
            children = list(module.named_children())
            for (conv_name, conv), (norm_name, norm) in pairwise(children):
                if isinstance(conv, nn.Conv2d) and isinstance(norm, BatchNormAct2d):
                    setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                    setattr(module, norm_name, norm.act)
        stem.register_module("mix", self.mix.folded())
        return stem

    def levels(self, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """The trunk's (B, 112, H/16, W/16) and (B, 320, H/32, W/32)."""
        # The same bits as with contiguous pixels; 130 images/s and core, not 75 (batch 64, 2026-11)
        pixels_B3HW = pixels_B3HW.contiguous(memory_format=torch.channels_last)
        fine, coarse = self.trunk(pixels_B3HW)
        return fine, coarse


def stack_levels(fine_BChw: Tensor, coarse_BChw: Tensor) -> Tensor:
    """Repeat the coarse level to the fine one's grid and stack them, (B, 432, h, w)."""
    height, width = fine_BChw.shape[-2:]
    return torch.cat([fine_BChw, F.interpolate(coarse_BChw, size=(height, width))], dim=1)


def build_mini(*, patch_dropout: float = 0.0) -> CLIP:
    """The architecture with random weights, float32, in evaluation mode.

    Args:
        patch_dropout: share of the image tokens left out while training.
    """
    vision = CLIPVisionCfg(
        layers=LAYERS,
        width=WIDTH,
        head_width=64,
        patch_size=_PATCH,
        image_size=IMAGE_SIZE,
        patch_dropout=patch_dropout,
        pool_type="avg",
    )
    text = CLIPTextCfg(
        context_length=CONTEXT_LENGTH,
        vocab_size=VOCABULARY,
        width=256,
        heads=4,
        layers=LAYERS,
    )
    model = CLIP(EMBED_DIM, vision, text)
    model.visual.conv1 = Stem(WIDTH)
    model.visual.image_mean = MINI_PREPROCESS.mean
    model.visual.image_std = MINI_PREPROCESS.std
    return model.eval()


def load_mini(weights: Path | None = None) -> CLIP:
    """medley-mini in float32 and evaluation mode, from the embedded weights or another file.

    Raises:
        BackboneError: the file is missing, unreadable, or not of this architecture.
    """
    path = weights or WEIGHTS
    if not path.is_file():
        raise BackboneError(f"the weights of medley-mini are missing: no file {path}")
    try:
        state = {name: tensor.float() for name, tensor in load_file(path).items()}
        model = build_mini()
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (SafetensorError, RuntimeError) as error:
        raise BackboneError(f"{path} does not hold medley-mini: {error}") from error
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise BackboneError(f"{path} does not hold medley-mini: {missing=} {unexpected=}")
    return model


def mini_tokenizer() -> SimpleTokenizer:
    """open_clip's tokenizer with the first 8,000 of its merges: (N, 24) token ids."""
    return SimpleTokenizer(bpe_path=str(MERGES), context_length=CONTEXT_LENGTH)
