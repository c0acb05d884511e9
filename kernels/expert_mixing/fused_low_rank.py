"""The Triton kernel of the low-rank updates: both products of every row's own slot in one launch.

What it computes is defined in `reference.add_low_rank_`; how it is cut up comes from `table.py`, in
which the ranks of a slot are the hidden units. This module checks nothing: `kernels.expert_mixing`
does, before it gets here. It takes CPU tensors too where Triton interprets (TRITON_INTERPRET=1).

Legend: B rows, L tokens, I inputs and O outputs of the layer, R rank, S slots. In the kernel M is
the tokens of a tile and R is rounded up to a power of two; `kk_`, `nn_` are columns of one step.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.expert_mixing.table import Launch, find
from kernels.expert_mixing.tiles import dot, read, upcast, write
from kernels.launching import Call

__all__ = ["add_low_rank_", "kernel", "prepare"]


@triton.jit(do_not_specialize=["L", "S"])
def kernel(
    y_ptr,
    x_ptr,
    slots_ptr,
    down_ptr,
    up_ptr,
    scale_ptr,
    L,
    S,
    I: tl.constexpr,  # noqa: E741
    O: tl.constexpr,  # noqa: E741
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Add the update of one row to one tile of its tokens.

    Grid: (B * ceil(L / BLOCK_M) * SPLIT,), the split fastest, then the tile, then the row, as in
    `fused.kernel`. It depends on shapes alone.

    A program owns tokens tile * BLOCK_M.. and columns split * O/SPLIT.. of one row of y, reads and
    writes each of them once, and reads all I columns of x of its tokens.

    y (B, L, O) is changed in place and is not the memory of x (B, L, I). Read besides: slots (B),
    down (S, R, I) and up (S, R, O) in x's dtype, scale (S) float32; all contiguous. A slot out of
    range counts as none: such a row's programs end at once.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(L, BLOCK_M)
    split = program % SPLIT
    tile = program // SPLIT % tiles
    b = (program // (SPLIT * tiles)).to(tl.int64)
    slot = tl.load(slots_ptr + b)
    if (slot >= 0) & (slot < S):
        # int64 to find the row and the slot, int32 within them.
        x_ptr += b * L * I
        y_ptr += b * L * O
        m_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        within_M = (m_M < L)[:, None]
        r_R = tl.arange(0, R_PAD)[:, None]

        down_R = down_ptr + slot * (R * I) + r_R * I
        hidden_MR = tl.zeros((BLOCK_M, R_PAD), tl.float32)
        for k0 in range(0, I, BLOCK_K):
            kk_K = k0 + tl.arange(0, BLOCK_K)
            x_MK = read(x_ptr, m_M[:, None] * I, kk_K, within_M)
            down_RK = tl.load(down_R + kk_K[None, :], mask=r_R < R, other=0.0)
            hidden_MR = dot(x_MK, tl.trans(down_RK), hidden_MR, UPCAST)
        hidden_MR = (hidden_MR * tl.load(scale_ptr + slot)).to(x_ptr.dtype.element_ty)

        up_R = up_ptr + slot * (R * O) + r_R * O
        for n0 in range(0, O // SPLIT, BLOCK_N):
            nn_N = split * (O // SPLIT) + n0 + tl.arange(0, BLOCK_N)
            y_MN = read(y_ptr, m_M[:, None] * O, nn_N, within_M).to(tl.float32)
            up_RN = tl.load(up_R + nn_N[None, :], mask=r_R < R, other=0.0)
            y_MN = dot(hidden_MR, up_RN, y_MN, UPCAST)
            write(y_ptr, m_M[:, None] * O, nn_N, within_M, y_MN)


def prepare(
    y_BLO: Tensor,
    x_BLI: Tensor,
    slots_B: Tensor,
    down_SRI: Tensor,
    up_SRO: Tensor,
    scale_S: Tensor,
    *,
    launch: Launch | None = None,
) -> Call:
    """Prepare the launch that changes y; without `launch` the table chooses how to cut it up."""
    B, L, inputs = x_BLI.shape
    S, R, outputs = up_SRO.shape
    if launch is None:
        launch = find(B, L, hidden=R, itemsize=x_BLI.element_size())
    launch = launch.fit(inputs, outputs)
    return Call(
        kernel=kernel,
        grid=(B * triton.cdiv(L, launch.block_m) * launch.split,),
        arguments={
            "y_ptr": y_BLO,
            "x_ptr": x_BLI,
            "slots_ptr": slots_B,
            "down_ptr": down_SRI,
            "up_ptr": up_SRO,
            "scale_ptr": scale_S,
            "L": L,
            "S": S,
        },
        constants={
            "I": inputs,
            "O": outputs,
            "R": R,
            "R_PAD": max(16, triton.next_power_of_2(R)),
            "UPCAST": upcast(x_BLI),
            "BLOCK_M": launch.block_m,
            "BLOCK_K": launch.block_k,
            "BLOCK_N": launch.block_n,
            "SPLIT": launch.split,
        },
        launch=launch,
    )


def add_low_rank_(
    y_BLO: Tensor,
    x_BLI: Tensor,
    slots_B: Tensor,
    down_SRI: Tensor,
    up_SRO: Tensor,
    scale_S: Tensor,
) -> None:
    """Launch what `reference.add_low_rank_` defines; a slot out of range adds nothing."""
    prepare(y_BLO, x_BLI, slots_B, down_SRI, up_SRO, scale_S).run()
