"""Several paths' answers for one image, as one: how much each counts, and their mean.

Whose answers they are is for `medley/neighbours.py`; nothing here knows of paths or texts.

Legend: C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Weighting", "averaged", "weights"]

Weighting = Literal["uniform", "similarity"]

# How much more cosine makes a neighbour count e times as much. Cosines with image prototypes of a
# CLIP lie within some tenths, so weights proportional to them would be all but uniform.
_TEMPERATURE = 0.05


def weights(similarities: Sequence[float], how: Weighting) -> tuple[float, ...]:
    """Return what zero-shot and each neighbour count; they add up to 1.

    Zero-shot, which is similar to nothing, counts as one of the K + 1 in either case. "uniform",
    the rule of ConDU's code, lets every neighbour count as much; "similarity", which its text
    speaks of, shares the rest by a softmax of the similarities.

    Args:
        similarities: of the K neighbours; of none, zero-shot is all.
        how: the rule.

    Raises:
        ValueError: there is no such rule, or a similarity is not a finite number.

    Source: ConDU, arXiv:2503.10705. The temperature is ours.
    """
    if how not in ("uniform", "similarity"):
        raise ValueError(f"the weights {how!r} are none of uniform, similarity")
    if not all(map(math.isfinite, similarities)):
        raise ValueError(f"the similarities {list(similarities)} are not all finite")
    most = max(similarities, default=0.0)
    sharpness = 1 / _TEMPERATURE if how == "similarity" else 0.0
    shares = [math.exp(sharpness * (similarity - most)) for similarity in similarities]
    even = 1 / (len(shares) + 1)
    return even, *(even * len(shares) * share / sum(shares) for share in shares)


def averaged(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted sum of logits of one shape, float32; no class depends on another.

    Raises:
        ValueError: there is not one weight for each, or nothing at all, or shapes differ.
    """
    if not logits or len(logits) != len(weights):
        raise ValueError(f"{len(weights)} weights for {len(logits)} answers")
    if len({answer.shape for answer in logits}) > 1:
        shapes = [tuple(answer.shape) for answer in logits]
        raise ValueError(f"the answers have shapes {shapes}, which must be the same")
    total = torch.zeros_like(logits[0], dtype=torch.float32)
    for answer, weight in zip(logits, weights, strict=True):
        # Product and sum apart: fused for some elements only, a class would depend on its place.
        total = total + answer.float() * weight
    return total
