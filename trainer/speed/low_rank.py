"""The linear layers of a block's MLP with every row's own low-rank updates, beside them alone.

Part of `medley bench kernels`. The two layers follow each other without what lies between them.

Legend: B rows, L tokens, D width, M hidden width of the MLP, I inputs, O outputs, R rank, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.expert_mixing import add_low_rank_
from medley.journal import Conditions, Journal
from trainer.speed.baselines.oracle import relative_error
from trainer.speed.block import Shape
from trainer.speed.timing import Pass, graphed, in_turns, over

__all__ = ["ALONE", "LARGEST", "MIXES", "LowRankPlan", "check_low_rank", "measure_low_rank"]

RANK, TASKS, WIDER = 64, 11, 4  # ConDU's rank; an MLP is so many times as wide as its tower
SCALE = RANK**-0.5
MIXES = ("one task", "11 tasks", "half null", "all null")
ALONE, OURS, GATHER = "layers alone", "medley", "gather + bmm"
LARGEST = 8  # rows on a CPU: the layers themselves are most of the time


@dataclass(frozen=True, kw_only=True)
class LowRankPlan:
    """Which rows are measured, and how often."""

    device: torch.device
    shape: Shape
    batches: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    repeats: int

    def rows(self) -> Iterator[tuple[torch.dtype, int, str]]:
        """Every row once."""
        for dtype, batch in product(self.dtypes, self.batches):
            for mix in MIXES if batch > 1 else ("one task", "all null"):
                yield dtype, batch, mix


@dataclass(frozen=True, eq=False)
class _Layer:
    weight_OI: Tensor
    down_SRI: Tensor
    up_SRO: Tensor
    scale_S: Tensor
    slots_B: Tensor

    def alone(self, x_BLI: Tensor) -> Tensor:
        return F.linear(x_BLI, self.weight_OI)

    def ours(self, x_BLI: Tensor) -> Tensor:
        return self.added(self.alone(x_BLI), x_BLI)

    def added(self, y_BLO: Tensor, x_BLI: Tensor) -> Tensor:
        update = (self.slots_B, self.down_SRI, self.up_SRO, self.scale_S)
        return add_low_rank_(y_BLO, x_BLI, *update)

    def gathered(self, x_BLI: Tensor) -> Tensor:
        slots_B = self.slots_B.clamp_min(0)
        scale_B = self.scale_S[slots_B].masked_fill(self.slots_B < 0, 0.0).to(x_BLI.dtype)
        hidden_BLR = torch.bmm(x_BLI, self.down_SRI[slots_B].mT) * scale_B[:, None, None]
        return torch.baddbmm(self.alone(x_BLI), hidden_BLR, self.up_SRO[slots_B])

    def exact(self, x_BLI: Tensor) -> Tensor:
        """The updates alone, in float64."""
        y_BLO = x_BLI.new_zeros(*x_BLI.shape[:2], self.up_SRO.shape[2], dtype=torch.float64)
        for row, slot in enumerate(self.slots_B.tolist()):
            if slot >= 0:
                hidden_LR = x_BLI[row].double() @ self.down_SRI[slot].double().T
                y_BLO[row] = self.scale_S[slot].double() * hidden_LR @ self.up_SRO[slot].double()
        return y_BLO


COLUMNS: dict[str, Callable[[_Layer, Tensor], Tensor]] = {
    ALONE: _Layer.alone,
    OURS: _Layer.ours,
    GATHER: _Layer.gathered,
}


def measure_low_rank(
    journal: Journal, plan: LowRankPlan, *, on_row: Callable[[int], object] = lambda _: None
) -> None:
    """Write a line for each column of each row."""
    for dtype, batch, mix in plan.rows():
        layers, x_BLD = _layers(plan.shape, batch, mix, dtype, plan.device)
        with torch.inference_mode():
            timed = in_turns(_passes(layers, x_BLD), device=plan.device, repeats=plan.repeats)
        conditions = _conditions(plan.shape, dtype, batch, mix)
        for name, one in timed.items():
            journal.add("low rank", conditions, name, times_s=one.times_s, failure=one.failure)
        on_row(1)


def check_low_rank(
    shape: Shape, batch: int, mix: str, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, float]]:
    """Run both layers' updates; the relative error of each alone."""
    layers, x_BLD = _layers(shape, batch, mix, dtype, device)
    hidden_BLM = x_BLD.repeat(1, 1, WIDER)
    for name, layer, x_BLI in zip(("fc", "proj"), layers, (x_BLD, hidden_BLM), strict=True):
        got_BLO = layer.added(x_BLI.new_zeros(*x_BLI.shape[:2], len(layer.weight_OI)), x_BLI)
        yield f"add_low_rank_, {name}", relative_error(got_BLO, layer.exact(x_BLI))


def _conditions(shape: Shape, dtype: torch.dtype, batch: int, mix: str) -> Conditions:
    name = str(dtype).removeprefix("torch.")
    return {"shape": shape.name, "dtype": name, "batch": batch, "mix": mix}


def _passes(layers: tuple[_Layer, _Layer], x_BLD: Tensor) -> dict[str, Pass]:
    """Each column once; on a GPU as a graph too, in which both layers' outputs leave the cache."""
    fc, proj = layers

    def work(run: Callable[[_Layer, Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: run(proj, run(fc, x_BLD))

    works = {name: work(run) for name, run in COLUMNS.items()}
    passes = {name: over([one]) for name, one in works.items()}
    if x_BLD.is_cuda:
        passes |= {f"{name}, graph": graphed([one]) for name, one in works.items()}
    return passes


def _layers(
    shape: Shape, batch: int, mix: str, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[_Layer, _Layer], Tensor]:
    """Draw both layers and an input."""
    random = torch.Generator().manual_seed(0)

    def normal(*sizes: int, over: int = 1) -> Tensor:
        return (torch.randn(sizes, generator=random) / over**0.5).to(device, dtype)

    D, M = shape.width, WIDER * shape.width
    slots_B = torch.tensor([_slot(row, mix) for row in range(batch)], device=device)
    fc, proj = (
        _Layer(
            normal(outputs, inputs, over=inputs),
            normal(TASKS, RANK, inputs, over=inputs),
            normal(TASKS, RANK, outputs, over=RANK),
            torch.full((TASKS,), SCALE, device=device),
            slots_B,
        )
        for inputs, outputs in ((D, M), (M, D))
    )
    return (fc, proj), normal(batch, shape.tokens, D)


def _slot(row: int, mix: str) -> int:
    if mix == "all null" or (mix == "half null" and row % 2):
        return -1
    return 3 if mix == "one task" else row % TASKS
