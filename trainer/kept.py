"""Pictures whose frozen features are kept: what the backbone said of them, found by row.

How they come to be kept is `trainer/frozen.py`.

Legend: N images, B images asked for, L tokens, D width, F width of a tap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from medley.backbone import Backbone
from trainer.datasets import ImageSet, Picture

__all__ = ["KeptPart", "KeptPicture", "kept_hidden"]


@dataclass(frozen=True, eq=False)
class KeptPart:
    """The rows of one data set.

    `hidden_NLD`, after the blocks before the first one with experts, is missing where it would be
    too large to keep.
    """

    fingerprint: str
    first_block: int
    bucket: int  # the batch size that it was computed at
    taps: dict[str, Tensor]  # (N, F)
    hidden_NLD: NDArray[np.float32] | None


@dataclass(frozen=True, eq=False)
class KeptPicture:
    """A picture that knows its row."""

    picture: Picture
    part: KeptPart
    row: int

    def read(self) -> bytes:
        """The encoded image, as it would be sent to a server."""
        return self.picture.read()

    def image(self) -> Image.Image:
        """The decoded image."""
        return self.picture.image()

    def content(self) -> bytes:
        """What identifies the picture."""
        return self.picture.content()

    def hidden(self) -> Tensor:
        """Its hidden state (L, D), float32."""
        assert self.part.hidden_NLD is not None
        return torch.from_numpy(self.part.hidden_NLD[self.row].copy())


def kept_hidden(
    backbone: Backbone, first_block: int, images: ImageSet, index: Sequence[int]
) -> Tensor | None:
    """Hidden states (B, L, D) of some images of a set, or None unless all of them are kept."""
    pictures = [images.items[i][0] for i in index]
    kept = [p for p in pictures if isinstance(p, KeptPicture) and p.part.hidden_NLD is not None]
    wanted = (backbone.fingerprint, first_block)
    if len(kept) < len(pictures) or any(
        (p.part.fingerprint, p.part.first_block) != wanted for p in kept
    ):
        return None
    return torch.stack([p.hidden() for p in kept]).to(backbone.device)
