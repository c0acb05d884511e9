"""How MoE-Adapters' published code computes the branch, written anew from a description of it.

One task id holds for a whole batch there, so a mixed batch is one group a task. Each group makes a
gate matrix, a dispatcher that sorts rows by expert, calls every expert (those without rows too),
and combines in float32. The counting of experts and the balance loss, which nobody reads, are part
of what a forward of that code does and are timed with it. What differs: rows of a group are known
beforehand, a group of one task that fills the batch is not copied, zero-shot rows cost nothing,
experts that only others name are not called, and the router is float32.

Source: MoE-Adapters, arXiv:2403.11549; the dispatcher, Shazeer et al., arXiv:1701.06538.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.speed.block import Block

__all__ = ["prepare"]


@dataclass(frozen=True)
class _Expert:
    down_RD: Tensor
    down_bias_R: Tensor
    up_DR: Tensor
    up_bias_D: Tensor

    def __call__(self, x_NLD: Tensor, scale: float) -> Tensor:
        hidden_NLR = F.linear(x_NLD, self.down_RD, self.down_bias_R).relu()
        return F.linear(hidden_NLR, self.up_DR, self.up_bias_D) * scale


@dataclass(frozen=True)
class _Task:
    """One group of rows, N of them, and what its task id selects."""

    rows_N: Tensor | None  # None: the whole batch
    router_DE: Tensor
    experts: Sequence[_Expert]
    top_k: int
    scale: float
    chosen_E: Tensor  # on the host

    def __call__(self, x_NLD: Tensor) -> Tensor:
        gates_NE = self._gates(x_NLD[:, 0].float())
        order_Z, expert_Z = _by_expert(gates_NE)
        self._count(gates_NE)
        inputs = x_NLD[order_Z].split((gates_NE > 0).sum(0).tolist())
        outputs = [e(x, self.scale) for e, x in zip(self.experts, inputs, strict=True)]
        gate_Z1 = gates_NE[order_Z].gather(1, expert_Z[:, None])
        stitched_ZLD = torch.cat(outputs).float() * gate_Z1[:, :, None]
        zeros_NLD = torch.zeros(x_NLD.shape, dtype=torch.float32, device=x_NLD.device)
        return zeros_NLD.index_add(0, order_Z, stitched_ZLD).to(x_NLD.dtype)

    def _count(self, gates_NE: Tensor) -> None:
        """Add up how often each expert was chosen, one by one and on the host."""
        for expert, times in Counter(gates_NE.nonzero()[:, 1].tolist()).items():
            self.chosen_E[expert] = self.chosen_E[expert] + times

    def _gates(self, token_ND: Tensor) -> Tensor:
        logits_NE = token_ND @ self.router_DE
        top_NK, expert_NK = logits_NE.topk(min(self.top_k + 1, logits_NE.shape[1]), dim=1)
        chosen_NK = top_NK[:, : self.top_k].softmax(1)
        gates_NE = torch.zeros_like(logits_NE).scatter(1, expert_NK[:, : self.top_k], chosen_NK)
        _unbalance(gates_NE.sum(0)) + _unbalance((gates_NE > 0).sum(0).float())
        return gates_NE


def prepare(block: Block) -> Callable[[Tensor], Tensor]:
    """See `trainer.speed.baselines`."""
    experts = [_expert(block, slot) for slot in range(len(block.weights_S2RD))]
    groups = [_task(block, path, experts) for path in sorted(set(block.paths)) if path >= 0]

    def run(x_BLD: Tensor) -> Tensor:
        if len(groups) == 1 and groups[0].rows_N is None:
            return groups[0](x_BLD)
        y_BLD = torch.zeros_like(x_BLD)
        for group in groups:
            y_BLD[group.rows_N] = group(x_BLD[group.rows_N])
        return y_BLD

    return run


def _by_expert(gates_NE: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and experts of all gates that are not zero, ordered by expert."""
    sorted_Z2, order_Z2 = gates_NE.nonzero().sort(0)
    return gates_NE.nonzero()[order_Z2[:, 1], 0], sorted_Z2[:, 1]


def _unbalance(x_E: Tensor) -> Tensor:
    return x_E.var() / (x_E.mean() ** 2 + 1e-10)


def _expert(block: Block, slot: int) -> _Expert:
    down_RD, up_RD = block.weights_S2RD[slot]
    bias_F, bottleneck = block.biases_SF[slot].to(block.dtype), down_RD.shape[0]
    return _Expert(down_RD, bias_F[:bottleneck], up_RD.T.contiguous(), bias_F[bottleneck:])


def _task(block: Block, path: int, experts: Sequence[_Expert]) -> _Task:
    rows = [row for row, other in enumerate(block.paths) if other == path]
    whole = len(rows) == len(block.paths)
    return _Task(
        None if whole else torch.tensor(rows, device=block.paths_B.device),
        block.routers_PDE[path],
        [experts[slot] for slot in block.slots_PE[path].tolist()],
        int(block.top_k_P[path]),
        float(block.scale_P[path]),
        torch.zeros(block.slots_PE.shape[1]),
    )
