"""Gradients of `mix` on a device: the forward is the fused kernel, the backward is PyTorch's.

The backward runs the reference once more and asks autograd. It costs one more forward of a branch
that is a few per cent of its block, and keeps nothing but the arguments in between. On a CPU the
reference is the forward too, and autograd needs no help.

Legend: B rows, L tokens, D width, K chosen experts, S slots, R bottleneck, H = K R, F = R + D.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.expert_mixing import reference

__all__ = ["backward", "setup_context"]

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, bool, Tensor | None]


def setup_context(ctx: Any, inputs: Inputs, output: Tensor) -> None:
    """Keep the arguments: x_BLD, slots_BK, gates_BK, weights_S2RD, biases_SF, relu, keep_BLH."""
    x_BLD, slots_BK, gates_BK, weights_S2RD, biases_SF, relu, keep_BLH = inputs
    ctx.save_for_backward(x_BLD, slots_BK, gates_BK, weights_S2RD, biases_SF, keep_BLH)
    ctx.relu = relu


def backward(ctx: Any, dy_BLD: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, gates, weights and biases where they are wanted, None elsewhere.

    In the dtypes of what they belong to. On a CUDA device the weights' gradients of experts that
    several rows share are added with atomics, unless `torch.use_deterministic_algorithms` is on.
    """
    saved = list(ctx.saved_tensors)
    wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4)]
    places = [place for place, want in zip((0, 2, 3, 4), wanted, strict=True) if want]
    with torch.enable_grad():
        for place in places:
            saved[place] = saved[place].detach().requires_grad_()
        *arguments, keep_BLH = saved
        y_BLD = reference.mix(*arguments, relu=ctx.relu, keep_BLH=keep_BLH)
        found = torch.autograd.grad(y_BLD, [saved[place] for place in places], dy_BLD)
    gradients: list[Tensor | None] = [None] * 7
    for place, gradient in zip(places, found, strict=True):
        gradients[place] = gradient
    return tuple(gradients)
