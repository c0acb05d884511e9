"""A second frozen network whose features a selector may look at, beside the backbone's own.

Published selectors were fitted on one: MoE-Adapters' autoencoders read AlexNet. It costs a forward
of its own for every image, so ours do not need it, and a server has it only if it is told to.

Legend: B images, F feature width.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torchvision.models import AlexNet

from medley.errors import BackboneError
from medley.state_dict import read_state_dict

__all__ = ["ALEXNET_CONV5", "Extractor", "load_alexnet"]

ALEXNET_CONV5 = "alexnet:conv5"


class Extractor(Protocol):
    """Features of an image that do not come from the backbone."""

    @property
    def tap(self) -> str:
        """Name of the feature."""

    @property
    def digest(self) -> str:
        """What identifies the weights, as "sha256:..."."""

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Turn images, normalised as the backbone takes them, into float32 features (B, F)."""


@dataclass(frozen=True, eq=False)
class _AlexNet:
    """AlexNet's fifth convolution before its ReLU, flattened, through a sigmoid.

    F is 43,264 for 224 x 224 pixels. The images are normalised as CLIP's, not as AlexNet's own:
    that is what the published autoencoders have seen.

    Source: MoE-Adapters, arXiv:2403.11549.
    """

    layers: nn.Sequential
    digest: str
    tap: str = ALEXNET_CONV5

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        return self.layers(images_BCHW.float()).flatten(1).sigmoid()


def load_alexnet(weights: Path, *, device: str | torch.device = "cpu") -> Extractor:
    """Load torchvision's AlexNet as the extractor of "alexnet:conv5".

    Args:
        weights: torchvision's own file (`alexnet-owt-*.pth`), or its tensors as safetensors; what
            lies behind the convolutions may be missing.
        device: where the backbone is.

    Raises:
        BackboneError: with code `weights`: the file cannot be read, or is not of an AlexNet.
    """
    tensors = read_state_dict(weights)
    with torch.device("meta"):  # 61 M weights that are not needed, and no random number drawn
        layers = AlexNet().features[:-2]
    own = {n.removeprefix("features."): t for n, t in tensors.items() if n.startswith("features.")}
    try:
        layers.load_state_dict(own, assign=True)
    except RuntimeError as error:
        problem = f"{weights.name} is not of torchvision's AlexNet"
        raise BackboneError(problem, code="weights") from error
    layers.float().eval().requires_grad_(requires_grad=False)
    return _AlexNet(layers.to(device), _digest(layers))


def _digest(layers: nn.Sequential) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(layers.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"
