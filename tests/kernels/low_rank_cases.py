"""Problems for the low-rank updates, and what they are in float64, by loops.

Shares nothing with the kernel or its plain definition. Whatever must not be read is NaN here, and
what is written lies between canaries.

Legend: as in `kernels/expert_mixing/reference.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels.expert_mixing.table import Launch
from tests.kernels.memory import Canaries, surrounded
from tests.kernels.mutants import module

__all__ = ["Case", "Problem", "build", "error", "launched", "update_error"]


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
        y_BLO=surrounded(normal(B, L, case.O).to(case.dtype)),
        x_BLI=surrounded(normal(B, L, case.I).to(case.dtype)),
        slots_B=torch.tensor([3, -1, 0, S, 2, 0]).repeat(B)[:B],
        down_SRI=surrounded(down_SRI.to(case.dtype))[:S],
        up_SRO=surrounded(up_SRO.to(case.dtype))[:S],
        scale_S=surrounded(scale_S)[:S],
    )


def update_error(update_BLO: Tensor, p: Problem) -> float:
    """Return the relative Frobenius error of the updates alone; inf for what is not finite."""
    return _relative(update_BLO.double() - _updates(p), _updates(p))


def error(y_BLO: Tensor, p: Problem) -> float:
    """Return the error of y with the updates, relative to the updates' size.

    It is inf where a row without a slot has changed.
    """
    expected_BLO = _updates(p)
    off_BLO = y_BLO.double() - (p.y_BLO.double() + expected_BLO)
    changed = off_BLO[~expected_BLO.any(-1).any(-1)].any()
    return torch.inf if changed else _relative(off_BLO, expected_BLO)


def _updates(p: Problem) -> Tensor:
    """What is added, row by row, in float64."""
    update_BLO = torch.zeros_like(p.y_BLO, dtype=torch.float64)
    for row, slot in enumerate(p.slots_B.tolist()):
        if 0 <= slot < len(p.scale_S):
            hidden_LR = p.x_BLI[row].double() @ p.down_SRI[slot].double().T
            update_BLO[row] = p.scale_S[slot].double() * hidden_LR @ p.up_SRO[slot].double()
    return update_BLO


def _relative(off: Tensor, expected: Tensor) -> float:
    if not off.any():
        return 0.0
    found = off.norm() / expected.norm()
    return float(found) if found.isfinite() else torch.inf


def launched(p: Problem, launch: Launch | None = None, *, source: Path | None = None) -> Tensor:
    """Run the kernel, or that of another source file, on a copy of y. For `Runner.call`.

    Raises:
        AssertionError: a canary beside y is gone.
    """
    fused = module("kernels.expert_mixing.fused_low_rank", source)
    y = Canaries(p.y_BLO)
    update = (p.slots_B, p.down_SRI, p.up_SRO, p.scale_S)
    fused.prepare(y.inner, p.x_BLI, *update, launch=launch).run()
    y.check()
    return y.inner
