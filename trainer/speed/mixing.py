"""`medley bench kernels`: the expert branch of one block, ours and every baseline, in turns.

Legend: B rows, L tokens, D width, K chosen experts, R bottleneck.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from kernels.expert_mixing import choose
from medley.journal import Journal
from trainer.speed.baselines import Column, baselines, oracle
from trainer.speed.baselines.oracle import relative_error
from trainer.speed.baselines.rows import routed
from trainer.speed.block import SHAPES, Block, Shape, make_block, mixes_of
from trainer.speed.ceiling import measure_ceiling
from trainer.speed.checks import check_kernels
from trainer.speed.low_rank import LARGEST, LowRankPlan, measure_low_rank
from trainer.speed.norm import norm_passes
from trainer.speed.timing import Pass, Timed, Work, graphed, in_turns, over, reason

__all__ = ["PREDICTED_US", "ROUTER", "KernelsPlan", "measure_kernels"]

# Of inputs that take turns in a graph on a GPU: more than twice the L2 cache of an H100.
ROTATED_BYTES, MOST_INPUTS = 2**27, 512
EAGER_INPUTS = 4  # there the host is the limit, and loops over experts take long
ROUTER = "router alone"
# Microseconds of a block on an H100 in bfloat16, from a model of memory and L2 traffic made before
# any device was seen (docs/speed.md); by shape and batch size.
PREDICTED_US = {
    ("ViT-B/16", 1): 6.2,
    ("ViT-B/16", 8): 9.0,
    ("ViT-B/16", 64): 20.0,
    ("ViT-B/16", 256): 64.0,
    ("ViT-L/14", 256): 126.0,
}


@dataclass(frozen=True, kw_only=True)
class KernelsPlan:
    """Which rows are measured, and how often."""

    device: torch.device
    batches: tuple[int, ...]
    repeats: int
    shapes: tuple[Shape, ...] = SHAPES
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    compiled: bool = False

    @property
    def low_rank(self) -> LowRankPlan:
        """The rows of low-rank updates, of the first shape."""
        cuda = self.device.type == "cuda"
        return LowRankPlan(
            device=self.device,
            shape=self.shapes[0],
            batches=tuple(batch for batch in self.batches if cuda or batch <= LARGEST),
            dtypes=self.dtypes,
            repeats=self.repeats,
        )

    @property
    def steps(self) -> int:
        """How many rows there are."""
        return len(list(self.rows())) + len(list(self.low_rank.rows()))

    def rows(self) -> Iterator[tuple[torch.dtype, Shape, int, str]]:
        """Every row of the expert branch once."""
        for dtype, shape, batch in product(self.dtypes, self.shapes, self.batches):
            for mix in mixes_of(batch):
                yield dtype, shape, batch, mix


def measure_kernels(
    journal: Journal, plan: KernelsPlan, *, on_row: Callable[[int], object] = lambda _: None
) -> None:
    """Write a line for each column of each row, and the ceiling."""
    check_kernels(journal, plan.device, plan.shapes, plan.dtypes)
    measure_ceiling(journal, plan.device, plan.dtypes, repeats=plan.repeats)
    for dtype, shape, batch, mix in plan.rows():
        block = make_block(shape, batch=batch, mix=mix, dtype=dtype, device=plan.device)
        conditions: dict[str, str | int] = {
            "shape": shape.name,
            "tokens": shape.tokens,
            "width": shape.width,
            "dtype": str(dtype).removeprefix("torch."),
            "batch": batch,
            "mix": mix,
        }
        with torch.inference_mode():
            _measure_row(journal, plan, block, conditions)
        on_row(1)
    measure_low_rank(journal, plan.low_rank, on_row=on_row)


def _measure_row(
    journal: Journal, plan: KernelsPlan, block: Block, conditions: dict[str, str | int]
) -> None:
    inputs = _inputs(block)
    exact_BLD = oracle(block, inputs[0])
    passes: dict[str, Pass] = {}
    values: dict[str, dict[str, float]] = {}
    failures: dict[str, str] = {}
    for column in baselines(plan.device, compiled=plan.compiled):
        try:
            _prepare(column, block, inputs, exact_BLD, passes, values)
        except Exception as error:  # a column that cannot run is a result too
            failures[column.name] = reason(error)
    passes[ROUTER] = over([_router(block, x_BLD) for x_BLD in inputs[:EAGER_INPUTS]])
    if plan.device.type == "cuda":
        passes |= norm_passes(block, inputs)
    timed = in_turns(passes, device=plan.device, repeats=plan.repeats)
    timed |= {name: Timed(failure=reason) for name, reason in failures.items()}
    work = _work(block, inputs[0])
    for name, one in timed.items():
        journal.add(
            "kernels",
            conditions,
            name,
            times_s=one.times_s,
            values=work | values.get(name, {}),
            failure=one.failure,
        )


def _prepare(
    column: Column,
    block: Block,
    inputs: Sequence[Tensor],
    exact_BLD: Tensor,
    passes: dict[str, Pass],
    values: dict[str, dict[str, float]],
) -> None:
    """Check a column's answer, then add what is to be timed: calls, and on a GPU graphs of them."""
    run = column.prepare(block)
    started_s = time.perf_counter()
    y_BLD = run(inputs[0])
    error = relative_error(y_BLD, exact_BLD)  # reads back, so a device is done by now
    first_s = time.perf_counter() - started_s
    values[column.name] = {"error": error, "first_call_s": first_s}
    calls = [_call(run, x_BLD) for x_BLD in inputs]
    passes[column.name] = over(calls[:EAGER_INPUTS])
    if column.capturable and inputs[0].is_cuda:
        passes[f"{column.name}, graph"] = graphed(calls)
        values[f"{column.name}, graph"] = values[column.name]


def _call(run: Callable[[Tensor], Tensor], x_BLD: Tensor) -> Work:
    return lambda: run(x_BLD)


def _router(block: Block, x_BLD: Tensor) -> Work:
    tables = (block.paths_B, block.routers_PDE, block.slots_PE, block.top_k_P)
    return lambda: choose(x_BLD, *tables, max_top_k=block.max_top_k)


def _inputs(block: Block) -> list[Tensor]:
    """One x on a CPU; on a GPU as many as do not fit in its L2 cache together."""
    first = block.random_x(100)
    if not first.is_cuda:
        return [first]
    size = first.numel() * first.element_size()
    return [
        first,
        *(block.random_x(101 + i) for i in range(min(MOST_INPUTS, ROTATED_BYTES // size))),
    ]


def _work(block: Block, x_BLD: Tensor) -> dict[str, float]:
    """What the branch must do at least: bytes (x, y, each chosen expert once) and operations."""
    slots_BK, _, active_B = routed(block, x_BLD)
    active, experts = int(active_B.sum()), len(slots_BK[active_B].unique())
    size = block.weights_S2RD.element_size()
    _, _, R, D = block.weights_S2RD.shape
    L, K = block.shape.tokens, block.max_top_k
    bytes_moved = size * (L * D * (active + len(block.paths)) + experts * 2 * R * D)
    return {"bytes": float(bytes_moved), "flop": 4.0 * active * L * D * K * R}
