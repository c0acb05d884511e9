"""The two-kernel form of LoRA servers, adapted: shrink with bias and ReLU, then expand (Triton).

A baseline for a GPU, written for this comparison: one launch writes the hidden units of each
(row, expert) pair in float32, a second reads them back and writes one output a pair, PyTorch sums
over the pairs of a row. A pair's weights are found through its slot; a pair without a slot ends at
once.

Legend: B rows, L tokens, D width, R bottleneck, K chosen experts, M = B * K pairs.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.speed.baselines.rows import routed
from trainer.speed.block import Block

__all__ = ["prepare"]

TILE_L, TILE_D = 64, 64


@triton.jit
def _shrink(x, slots, gates, weights, biases, hidden, L, D, K, F, R: tl.constexpr,
            TILE_L: tl.constexpr, TILE_D: tl.constexpr):  # fmt: skip
    """Grid (M, tiles of L): hidden[m] = gate * relu(x[m // K] @ down^T + bias), float32."""
    pair = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + pair).to(tl.int64)
    if slot < 0:
        return
    token = tl.program_id(1) * TILE_L + tl.arange(0, TILE_L)
    unit = tl.arange(0, R)
    total = tl.zeros((TILE_L, R), dtype=tl.float32)
    for first in range(0, D, TILE_D):
        column = first + tl.arange(0, TILE_D)
        x_at = x + (pair // K) * L * D + token[:, None] * D + column[None, :]
        tile = tl.load(x_at, mask=(token < L)[:, None] & (column < D)[None, :], other=0.0)
        down_at = weights + slot * 2 * R * D + unit[:, None] * D + column[None, :]
        down = tl.load(down_at, mask=(column < D)[None, :], other=0.0)
        total = tl.dot(tile, tl.trans(down), total, input_precision="ieee")
    total = tl.maximum(total + tl.load(biases + slot * F + unit)[None, :], 0.0)
    total *= tl.load(gates + pair)
    at = hidden + (pair * L + token[:, None]) * R + unit[None, :]
    tl.store(at, total, mask=(token < L)[:, None])


@triton.jit
def _expand(hidden, slots, gates, weights, biases, y, L, D, F, R: tl.constexpr,
            TILE_L: tl.constexpr, TILE_D: tl.constexpr):  # fmt: skip
    """Grid (M, tiles of L, tiles of D): y[m] = hidden[m] @ up + gate * bias."""
    pair = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + pair).to(tl.int64)
    if slot < 0:
        return
    token = tl.program_id(1) * TILE_L + tl.arange(0, TILE_L)
    column = tl.program_id(2) * TILE_D + tl.arange(0, TILE_D)
    unit = tl.arange(0, R)
    inside = (token < L)[:, None] & (column < D)[None, :]
    at = hidden + (pair * L + token[:, None]) * R + unit[None, :]
    tile = tl.load(at, mask=(token < L)[:, None], other=0.0).to(y.dtype.element_ty)
    up_at = weights + (slot * 2 + 1) * R * D + unit[:, None] * D + column[None, :]
    up = tl.load(up_at, mask=(column < D)[None, :], other=0.0)
    bias = tl.load(biases + slot * F + R + column, mask=column < D, other=0.0)
    total = tl.dot(tile, up, input_precision="ieee") + tl.load(gates + pair) * bias[None, :]
    to = y + (pair * L + token[:, None]) * D + column[None, :]
    tl.store(to, total.to(y.dtype.element_ty), mask=inside)


def prepare(block: Block) -> Callable[[Tensor], Tensor]:
    """See `trainer.speed.baselines`; R must be a power of two and at least 16."""
    _, _, R, D = block.weights_S2RD.shape
    F = R + D

    def run(x_BLD: Tensor) -> Tensor:
        slots_BK, gates_BK, active_B = routed(block, x_BLD)
        B, L, _ = x_BLD.shape
        K = slots_BK.shape[1]
        slots_BK = slots_BK.masked_fill(~active_B[:, None], -1)
        gates_BK = gates_BK.contiguous()
        hidden = torch.empty(B * K, L, R, dtype=torch.float32, device=x_BLD.device)
        y_BKLD = x_BLD.new_zeros(B, K, L, D)
        pools = (slots_BK, gates_BK, block.weights_S2RD, block.biases_SF)
        tiles, grid = {"R": R, "TILE_L": TILE_L, "TILE_D": TILE_D}, (B * K, triton.cdiv(L, TILE_L))
        _shrink[grid](x_BLD, *pools, hidden, L, D, K, F, **tiles)
        _expand[(*grid, triton.cdiv(D, TILE_D))](hidden, *pools, y_BKLD, L, D, F, **tiles)
        return y_BKLD.sum(1)

    return run
