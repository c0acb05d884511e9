"""The columns of the table of kernels, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.expert_mixing import expert_mixing
from trainer.speed.baselines import dispatcher, rows
from trainer.speed.block import Block

__all__ = ["DISPATCHER", "GATHER", "OURS", "Baseline", "Column", "baselines"]

Baseline = Callable[[Block], Callable[[Tensor], Tensor]]

OURS, DISPATCHER, GATHER = "medley", "dispatcher", "gather + bmm"


@dataclass(frozen=True)
class Column:
    """One way to compute the branch."""

    name: str
    prepare: Baseline
    capturable: bool = True  # reads nothing back to the host, so a CUDA graph can hold it


def baselines(device: torch.device, *, compiled: bool) -> list[Column]:
    """Ours first, then what it is compared with on this device.

    Args:
        device: on a GPU the two steps are a pair of Triton kernels.
        compiled: also `torch.compile` of gather + bmm, which takes its time.
    """
    columns = [
        Column(OURS, _ours),
        Column(DISPATCHER, dispatcher.prepare, capturable=False),
        Column(GATHER, rows.gather_bmm),
        Column("row by row", rows.per_row, capturable=False),
        Column("sorted + grouped_mm", rows.grouped),
        Column("shrink, expand", _two_steps(device)),
    ]
    return [*columns, Column("gather + bmm, compiled", _compiled)] if compiled else columns


def _ours(block: Block) -> Callable[[Tensor], Tensor]:
    return lambda x_BLD: expert_mixing(x_BLD, *block.tables, max_top_k=block.max_top_k)


def _two_steps(device: torch.device) -> Baseline:
    if device.type != "cuda":
        return rows.two_steps
    from trainer.speed.baselines import shrink_expand

    return shrink_expand.prepare


def _compiled(block: Block) -> Callable[[Tensor], Tensor]:
    torch.compiler.reset()  # no guard of an earlier row is in the way
    return torch.compile(rows.gather_bmm(block), dynamic=False, fullgraph=True)
