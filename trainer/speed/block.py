"""One block's expert branch as a benchmark row: shapes, mixes of tasks, random tensors for them.

Legend: B rows, L tokens, D width, E experts a path may name, K chosen experts, S slots,
R bottleneck, F = R + D, P paths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MIXES", "SHAPES", "Block", "Shape", "make_block", "mixes_of"]

SHARED_EXPERTS, TASKS, TOP_K, BOTTLENECK, SCALE = 22, 11, 2, 64, 0.1  # MoE-Adapters on MTIL


# Of `expert_mixing`: paths, weights, biases, routers, slots, top_k, scale.
Tables = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Shape:
    """Of one tower's hidden state."""

    name: str
    tokens: int
    width: int


SHAPES = (Shape("ViT-B/16", 197, 768), Shape("ViT-L/14", 257, 1024), Shape("text", 77, 512))
MIXES = ("one task", "11 tasks", "all distinct", "half null", "all null")


@dataclass(frozen=True, eq=False)
class Block:
    """What `expert_mixing` takes, without x; the paths also as the host knows them."""

    shape: Shape
    paths_B: Tensor
    paths: tuple[int, ...]
    weights_S2RD: Tensor
    biases_SF: Tensor
    routers_PDE: Tensor
    slots_PE: Tensor
    top_k_P: Tensor
    scale_P: Tensor

    max_top_k = TOP_K

    @property
    def tables(self) -> Tables:
        """The arguments of `expert_mixing` that follow x."""
        return (
            self.paths_B,
            self.weights_S2RD,
            self.biases_SF,
            self.routers_PDE,
            self.slots_PE,
            self.top_k_P,
            self.scale_P,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of x and of the weights."""
        return self.weights_S2RD.dtype

    def random_x(self, seed: int) -> Tensor:
        """Draw a hidden state (B, L, D)."""
        shape = (len(self.paths), self.shape.tokens, self.shape.width)
        return _normal(shape, seed).to(self.weights_S2RD)


def mixes_of(batch: int) -> tuple[str, ...]:
    """The mixes that are different from each other at this batch size."""
    return MIXES if batch > 1 else ("one task", "all null")


def make_block(
    shape: Shape, *, batch: int, mix: str, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Block:
    """Draw a block: 22 experts that 11 tasks share, or two of its own for every row.

    Args:
        shape: of the hidden state.
        batch: B.
        mix: one of `MIXES`.
        dtype: of x and weights.
        device: where everything is.
        seed: decides all numbers.
    """
    distinct = mix == "all distinct"
    count = batch if distinct else TASKS
    slots = TOP_K * batch if distinct else SHARED_EXPERTS
    named = TOP_K if distinct else SHARED_EXPERTS
    slots_PE = torch.arange(slots).view(count, named) if distinct else _every_slot(count)
    paths = _paths(batch, mix)
    width = shape.width
    weights = _normal((slots, 2, BOTTLENECK, width), seed)
    weights[:, 0] /= width**0.5
    weights[:, 1] /= BOTTLENECK**0.5
    return Block(
        shape,
        torch.tensor(paths, device=device),
        paths,
        weights.to(device, dtype),
        (0.1 * _normal((slots, BOTTLENECK + width), seed + 1)).to(device),
        (_normal((count, width, named), seed + 2) / width**0.5).to(device),
        slots_PE.to(device),
        torch.full((count,), TOP_K, device=device),
        torch.full((count,), SCALE, device=device),
    )


def _paths(batch: int, mix: str) -> tuple[int, ...]:
    if mix == "all null":
        return (-1,) * batch
    if mix == "one task":
        return (3,) * batch
    if mix == "all distinct":
        return tuple(range(batch))
    mixed = [row % TASKS for row in range(batch)]
    return tuple(-1 if mix == "half null" and row % 2 else path for row, path in enumerate(mixed))


def _every_slot(count: int) -> Tensor:
    return torch.arange(SHARED_EXPERTS).expand(count, -1).contiguous()


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
