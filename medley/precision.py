"""How exactly the image tower computes: the library's own bits, or the fast forms near them.

exact runs the library's modules in float32 and is bit-equal to open_clip; fp32 and bf16 run the
fast form of `medley/fused.py` in that dtype. Routers compute in float32 in all of them, and the
text tower is float32 whatever the image tower is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch

__all__ = ["ADDED_TOLERANCE", "PRECISIONS", "Precision", "dtype_of"]

Precision = Literal["exact", "fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

# What a bundle's self-test may be off by beyond its own tolerance, in logits (100 times a cosine)
# and in selector scores. Measured (docs/adr/0015): fp32 stays far within a bundle's own 0.05; bf16
# moves self-tests of medley-mini by up to 0.06, and the features of a ViT-B-16 with random weights
# 2.5 times as far as those of medley-mini. The rest of the 0.5 is for what was not measured.
ADDED_TOLERANCE: Mapping[Precision, float] = {"exact": 0.0, "fp32": 0.0, "bf16": 0.5}


def dtype_of(precision: Precision) -> torch.dtype:
    """What the image tower and its experts compute in."""
    return torch.bfloat16 if precision == "bf16" else torch.float32
