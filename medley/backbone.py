"""The frozen CLIP that everything stands on; nothing downstream knows which one it is.

A backbone is identified by its fingerprint, the digest of its weights and its preprocessing: a
bundle learnt on one backbone is refused by any other.

Legend: B rows, L tokens, E joint embedding width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torchvision.transforms import Compose, Normalize
from torchvision.transforms.functional import pil_to_tensor

from medley.errors import BackboneError
from medley.mini import load_mini, mini_tokenizer
from medley.tower import ImageTower, TextTower, image_tower, text_tower

__all__ = ["MINI", "Backbone", "find_device", "load_backbone", "wrap"]

MINI = "medley-mini"
Clip = Any  # open_clip's CLIP or CustomTextCLIP; the package ships no types
Tokenizer = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class Backbone:
    """A frozen open_clip model with its preprocessing, taken apart into towers."""

    name: str
    model: Clip
    image: ImageTower
    text: TextTower | None  # None: experts cannot enter this text tower
    tokenizer: Tokenizer
    crop: Callable[[Image.Image], Image.Image]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: tuple[int, int]  # height, width
    embed_dim: int
    logit_scale: float  # already exponentiated
    fingerprint: str  # "sha256:..."

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def pixels(self, image: Image.Image) -> Tensor:
        """Resize and crop as open_clip does; return uint8 (3, H, W)."""
        return pil_to_tensor(self.crop(image))

    def normalise(self, pixels_BCHW: Tensor) -> Tensor:
        """Turn uint8 pixels into the image tower's input, float32 (B, 3, H, W), on its device."""
        images = pixels_BCHW.to(self.device).to(torch.float32).div_(255)
        mean, std = self._mean_and_std
        return images.sub_(mean).div_(std)

    @cached_property
    def _mean_and_std(self) -> Tensor:
        """Both as (1, 3, 1, 1), on the device for good: a CUDA graph cannot fetch them anew."""
        return torch.tensor([self.mean, self.std], device=self.device).view(2, 1, 3, 1, 1)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Turn texts into token ids (N, context length), int64, on the backbone's device."""
        return self.tokenizer(list(texts)).to(self.device)


def find_device(name: str | torch.device) -> torch.device:
    """Return the device of that name.

    Raises:
        BackboneError: torch knows no such name, or finds no GPU where it means one.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BackboneError(f"there is no device {str(name)!r}; use cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackboneError(f"device {name} needs a GPU, and torch finds none here")
    return device


def load_backbone(
    name: str = MINI, *, weights: Path | None = None, device: str | torch.device = "cpu"
) -> Backbone:
    """Build a frozen backbone, float32.

    Args:
        name: "medley-mini" (embedded, the default), or an open_clip architecture: "ViT-B-16/openai"
            takes the pretrained weights of that tag from open_clip's cache or hub, "ViT-B-16" needs
            `weights`.
        weights: a local file in a format that open_clip reads (safetensors, or a state dict; never
            code).
        device: where it is to live.

    Raises:
        BackboneError: unknown architecture or tag, weights missing or not fitting, a tower that
            cannot take experts, or a device that is not there.
    """
    device = find_device(device)
    if name == MINI:
        model: Clip = load_mini(weights)
        tokenizer: Tokenizer = mini_tokenizer()
    else:
        model = _open_clip_model(name, weights)
        tokenizer = open_clip.get_tokenizer(name.partition("/")[0])
    backbone = wrap(model, name=name, tokenizer=tokenizer)
    model.to(device)
    return backbone


def wrap(model: Clip, *, name: str, tokenizer: Tokenizer) -> Backbone:
    """Freeze an open_clip model and take it apart; the model is used as it is, not copied.

    Raises:
        BackboneError: if its towers cannot be taken apart.
    """
    model.eval().requires_grad_(requires_grad=False)
    preprocess = PreprocessCfg(**open_clip.get_model_preprocess_cfg(model))
    transform = image_transform_v2(preprocess, is_train=False)
    _, height, width = preprocess.input_size
    return Backbone(
        name=name,
        model=model,
        image=image_tower(model.visual),
        text=text_tower(model),
        tokenizer=tokenizer,
        crop=_before_tensors(transform),
        mean=_triple(preprocess.mean),
        std=_triple(preprocess.std),
        image_size=(height, width),
        embed_dim=_embed_dim(model, tokenizer),
        logit_scale=float(model.logit_scale.detach().exp()),
        fingerprint=_fingerprint(model, preprocess),
    )


def _open_clip_model(name: str, weights: Path | None) -> Clip:
    architecture, _, tag = name.partition("/")
    if architecture not in open_clip.list_models():
        raise BackboneError(
            f"no backbone is called {name!r}; use {MINI!r} or an open_clip architecture "
            "such as 'ViT-B-16/openai'"
        )
    if weights is not None and not weights.is_file():
        raise BackboneError(f"there are no weights at {weights}")
    if weights is None and not tag:
        raise BackboneError(f"{name} needs weights: name a tag ('{name}/openai') or a local file")
    try:
        return open_clip.create_model(architecture, pretrained=str(weights) if weights else tag)
    except (RuntimeError, OSError, ValueError, UnpicklingError, SafetensorError) as error:
        raise BackboneError(f"{name} cannot be loaded from {weights or tag}: {error}") from error


def _before_tensors(transform: Compose) -> Callable[[Image.Image], Image.Image]:
    """Keep of open_clip's transform what works on the picture; the rest is done on the device."""
    *picture, _, normalise = transform.transforms
    assert isinstance(normalise, Normalize)
    return Compose(picture)


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue


def _embed_dim(model: Clip, tokenizer: Tokenizer) -> int:
    with torch.inference_mode():
        return int(model.encode_text(tokenizer(["x"])).shape[-1])


def _fingerprint(model: Clip, preprocess: PreprocessCfg) -> str:
    """Digest of the preprocessing and of every tensor by name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps(asdict(preprocess), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"
