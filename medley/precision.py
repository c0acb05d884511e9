"""How exactly the image tower computes: the library's own bits, or the fast forms near them.

exact runs the library's modules in float32 and is bit-equal to open_clip; fp32 and bf16 run the
fast form of `medley/fused.py` in that dtype. Routers compute in float32 in all of them, and the
text tower is float32 whatever the image tower is.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

__all__ = ["PRECISIONS", "Precision", "dtype_of"]

Precision = Literal["exact", "fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def dtype_of(precision: Precision) -> torch.dtype:
    """What the image tower and its experts compute in."""
    return torch.bfloat16 if precision == "bf16" else torch.float32
