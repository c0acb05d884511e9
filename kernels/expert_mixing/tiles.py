"""What the kernels of this package share: how a tile is read, multiplied and written.

Legend: M tokens of a tile, N columns of one step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["dot", "read", "upcast", "write"]


@triton.jit
def dot(a, b, acc, UPCAST: tl.constexpr):
    """Add a @ b to acc, in float32."""
    # The interpreter multiplies raw bfloat16 bit patterns in tl.dot (triton issue 11584), so it
    # gets float32; a GPU's tensor cores get what was loaded. "ieee" concerns float32 inputs alone:
    # they are the kernel's exact form, not its fast one, and tf32 would keep 10 bits of them.
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def read(ptr, at_M, nn_N, within_M):
    """Load a tile: tokens by columns; zero where a token is none."""
    return tl.load(ptr + (at_M + nn_N[None, :]), mask=within_M, other=0.0)


@triton.jit
def write(ptr, at_M, nn_N, within_M, value_MN):
    """Store a tile in the memory's own dtype."""
    tl.store(ptr + (at_M + nn_N[None, :]), value_MN.to(ptr.dtype.element_ty), mask=within_M)


def upcast(x: Tensor) -> bool:
    """Whether `dot` has to cast: a CPU tensor can only get here under the interpreter."""
    return x.device.type == "cpu" and x.dtype is torch.bfloat16
