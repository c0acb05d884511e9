"""The branch with the LayerNorm and the residual sum around it: in one kernel, or three ops.

Both leave what the MLP needs, r = x + bias + y to accumulate on and z = LayerNorm(x) to read. On a
CPU the first is made of the second, so only a GPU has these columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from kernels.expert_mixing import expert_mixing, expert_mixing_norm
from trainer.speed.block import Block
from trainer.speed.timing import Pass, graphed

__all__ = ["EPS", "Norm", "apart", "norm_passes", "random_norm", "within"]

EPS = 1e-5

Norm = tuple[Tensor, Tensor, Tensor]  # the MLP's output bias; its LayerNorm's weight and bias


def norm_passes(block: Block, inputs: Sequence[Tensor]) -> dict[str, Pass]:
    """Columns for a GPU."""
    norm = random_norm(block)
    return {
        name: graphed([partial(run, block, norm, x_BLD) for x_BLD in inputs])
        for name, run in (("with LayerNorm, graph", within), ("LayerNorm apart, graph", apart))
    }


def random_norm(block: Block) -> Norm:
    """Draw the vectors."""
    return _vector(block, 11), _vector(block, 12), _vector(block, 13)


def within(block: Block, norm: Norm, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
    """Return r and z by one op."""
    run: Callable[..., tuple[Tensor, Tensor]] = expert_mixing_norm
    return run(x_BLD, *block.tables, *norm, max_top_k=block.max_top_k, eps=EPS)


def apart(block: Block, norm: Norm, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
    """Return r and z by an op for each step."""
    bias_D, weight_D, shift_D = norm
    y_BLD = expert_mixing(x_BLD, *block.tables, max_top_k=block.max_top_k)
    z_BLD = layer_norm(x_BLD, x_BLD.shape[-1:], weight_D, shift_D, EPS)
    return x_BLD + (y_BLD + bias_D), z_BLD


def _vector(block: Block, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(block.shape.width, generator=generator).to(block.weights_S2RD)
