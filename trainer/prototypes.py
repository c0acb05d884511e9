"""A task's prototypes: what each of its classes looks and reads like to the untouched backbone.

They say how near an image that no task claims is to this one; who asks is `medley/neighbours.py`.
From the images that are learnt from and no others: with few shots, from these few.

Legend: N images, C classes, E joint embedding width.

Source: ConDU, arXiv:2503.10705; its code takes all training images for few shots, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from medley.backbone import Backbone
from medley.prompts import prompts

__all__ = ["class_prototypes"]

CHUNK = 256  # prompts encoded at once


def class_prototypes(
    backbone: Backbone,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    image_NE: Tensor,
    labels_N: Tensor,
) -> Tensor:
    """Halfway between what a class looks like and what its prompts say, scaled to unit length.

    Args:
        backbone: frozen.
        class_names: C names.
        templates: each with one "{}".
        image_NE: zero-shot features of the images, of unit length, on the CPU.
        labels_N: int64, at least one of each class.

    Returns:
        (C, E) float32, on the CPU.
    """
    member_NC = one_hot(labels_N, len(class_names)).float()
    looks_CE = (member_NC.T @ image_NE) / member_NC.sum(0)[:, None]
    reads_CE = torch.stack([_encoded(backbone, class_names, t) for t in templates]).mean(0)
    return normalize((looks_CE + reads_CE.cpu()) / 2, dim=1)


@torch.no_grad()
def _encoded(backbone: Backbone, class_names: Sequence[str], template: str) -> Tensor:
    tokens_CL = backbone.tokenize(prompts(class_names, template))
    parts = [backbone.model.encode_text(part).float() for part in tokens_CL.split(CHUNK)]
    return normalize(torch.cat(parts), dim=1)
