"""Problems for the low-rank updates, and what they are in float64, by loops.

Shares nothing with the kernel or its plain definition. Whatever must not be read is NaN here.

Legend: as in `kernels/expert_mixing/reference.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Case", "Problem", "build", "error"]

_BAND = 4096  # elements on either side of a tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """A problem's shape; equal cases have equal tensors."""

    B: int
    L: int
    I: int  # noqa: E741
    O: int  # noqa: E741
    R: int
    S: int = 5
    dtype: torch.dtype = torch.float32
    seed: int = 0


@dataclass(frozen=True)
class Problem:
    """The tensors of a case; rows use slots 3, -1, 0, S (out of range), 2, 0, 3, ..."""

    y_BLO: Tensor
    x_BLI: Tensor
    slots_B: Tensor
    down_SRI: Tensor
    up_SRO: Tensor
    scale_S: Tensor


def build(case: Case) -> Problem:
    """Make a case's tensors; behind the last slot lies one that looks sound."""
    g = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    B, L, S, R = case.B, case.L, case.S, case.R
    down_SRI = normal(S + 1, R, case.I) / case.I**0.5
    up_SRO = normal(S + 1, R, case.O) / R**0.5
    scale_S = torch.rand(S + 1, generator=g) + 0.5
    for pool in (down_SRI, up_SRO, scale_S):
        pool[[1, 4]] = torch.nan  # never used
    return Problem(
        y_BLO=_surrounded(normal(B, L, case.O).to(case.dtype)),
        x_BLI=_surrounded(normal(B, L, case.I).to(case.dtype)),
        slots_B=torch.tensor([3, -1, 0, S, 2, 0]).repeat(B)[:B],
        down_SRI=_surrounded(down_SRI.to(case.dtype))[:S],
        up_SRO=_surrounded(up_SRO.to(case.dtype))[:S],
        scale_S=_surrounded(scale_S)[:S],
    )


def _surrounded(tensor: Tensor) -> Tensor:
    """The same values with NaN before and behind them in memory."""
    whole = torch.full((tensor.numel() + 2 * _BAND,), torch.nan, dtype=tensor.dtype)
    view = whole[_BAND : _BAND + tensor.numel()].view(tensor.shape)
    return view.copy_(tensor)


def error(update_BLO: Tensor, p: Problem) -> float:
    """Return the relative Frobenius error of the updates against float64; NaN counts as inf."""
    expected_BLO = torch.zeros_like(update_BLO, dtype=torch.float64)
    for row, slot in enumerate(p.slots_B.tolist()):
        if 0 <= slot < len(p.scale_S):
            hidden_LR = p.x_BLI[row].double() @ p.down_SRI[slot].double().T
            expected_BLO[row] = p.scale_S[slot].double() * hidden_LR @ p.up_SRO[slot].double()
    off = (update_BLO.double() - expected_BLO).norm() / expected_BLO.norm()
    return float(off) if off.isfinite() else torch.inf
