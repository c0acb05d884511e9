"""The plain forms: gather and batched product (our reference op), row by row, two steps, grouped.

Legend: B rows, L tokens, D width, K chosen experts, R bottleneck, S slots, M = B * K pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.expert_mixing import reference
from trainer.speed.block import Block

__all__ = ["gather_bmm", "grouped", "per_row", "routed", "two_steps"]

Run = Callable[[Tensor], Tensor]


def gather_bmm(block: Block) -> Run:
    """Gather each row's experts, concatenated, and two batched products: our reference op."""
    return lambda x_BLD: reference.expert_mixing(x_BLD, *block.tables, max_top_k=block.max_top_k)


def per_row(block: Block) -> Run:
    """A loop over rows; each row's experts are views of the pool, read back to the host once."""

    def run(x_BLD: Tensor) -> Tensor:
        slots_BK, gates_BK, _ = routed(block, x_BLD)
        y_BLD = torch.zeros_like(x_BLD)
        slots = slots_BK.tolist()
        for row, path in enumerate(block.paths):
            if path < 0:
                continue
            for k, slot in enumerate(slots[row]):
                gate = gates_BK[row, k].to(x_BLD.dtype)
                y_BLD[row] += gate * _expert(block, slot, x_BLD[row])
        return y_BLD

    return run


def two_steps(block: Block) -> Run:
    """Shrink, then expand: rows k times, hidden units in float32 in memory, a sum over k last.

    The shape of LoRA servers' kernel pairs, with bias and ReLU between; on a CPU two batched
    products over gathered weights.
    """
    bottleneck = block.weights_S2RD.shape[2]

    def run(x_BLD: Tensor) -> Tensor:
        slots_BK, gates_BK, active_B = routed(block, x_BLD)
        slots_M, K = slots_BK.flatten(), slots_BK.shape[1]
        x_MLD = x_BLD.repeat_interleave(K, 0)
        bias_MF = block.biases_SF[slots_M]
        shrunk_MLR = torch.bmm(x_MLD, block.weights_S2RD[slots_M, 0].mT).float()
        hidden_MLR = (shrunk_MLR + bias_MF[:, None, :bottleneck]).relu()
        hidden_MLR = (hidden_MLR * gates_BK.flatten()[:, None, None]).to(x_BLD.dtype)
        up_bias_MD = (gates_BK.flatten()[:, None] * bias_MF[:, bottleneck:]).to(x_BLD.dtype)
        y_MLD = torch.baddbmm(up_bias_MD[:, None], hidden_MLR, block.weights_S2RD[slots_M, 1])
        y_BLD = y_MLD.view(-1, K, *x_BLD.shape[1:]).sum(1)
        return y_BLD.masked_fill(~active_B[:, None, None], 0.0)

    return run


def grouped(block: Block) -> Run:
    """Sort (row, expert) pairs by expert, two grouped products (`torch._grouped_mm`), sum over k.

    Offsets stay on the device. Rows without experts are sorted behind the last group.
    """
    slots, _, bottleneck, width = block.weights_S2RD.shape
    down_SDR = block.weights_S2RD[:, 0].mT.contiguous()
    up_SRD = block.weights_S2RD[:, 1].contiguous()
    slot_ids_S = torch.arange(slots, device=block.paths_B.device)

    def run(x_BLD: Tensor) -> Tensor:
        slots_BK, gates_BK, active_B = routed(block, x_BLD)
        L, K = x_BLD.shape[1], slots_BK.shape[1]
        slots_M = slots_BK.masked_fill(~active_B[:, None], slots).flatten()
        sorted_M, order_M = slots_M.sort(stable=True)
        ends_S = (torch.searchsorted(sorted_M, slot_ids_S, right=True) * L).to(torch.int32)
        bias_MF = block.biases_SF[sorted_M.clamp_max(slots - 1)].to(x_BLD.dtype)
        x_NB = x_BLD[order_M // K].view(-1, width)
        shrunk = torch._grouped_mm(x_NB, down_SDR, offs=ends_S).view(len(order_M), L, -1)
        hidden = (shrunk + bias_MF[:, None, :bottleneck]).relu().view(-1, bottleneck)
        expanded = torch._grouped_mm(hidden, up_SRD, offs=ends_S).view(len(order_M), L, -1)
        gates_M = gates_BK.flatten()[order_M].to(x_BLD.dtype)
        y_MLD = (expanded + bias_MF[:, None, bottleneck:]) * gates_M[:, None, None]
        y_BKLD = torch.empty_like(y_MLD).index_copy_(0, order_M, y_MLD).view(-1, K, L, width)
        return y_BKLD.sum(1).masked_fill(~active_B[:, None, None], 0.0)

    return run


def routed(block: Block, x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return slots_BK, gates_BK with the scale in them, and active_B."""
    expert_BK, gates_BK, active_B = reference.choose(
        x_BLD,
        block.paths_B,
        block.routers_PDE,
        block.slots_PE,
        block.top_k_P,
        max_top_k=block.max_top_k,
    )
    path_B = block.paths_B.clamp_min(0)
    slots_BK = block.slots_PE[path_B].gather(1, expert_BK).clamp_min(0)
    return slots_BK, gates_BK * block.scale_P[path_B, None], active_B


def _expert(block: Block, slot: int, x_LD: Tensor) -> Tensor:
    down_RD, up_RD = block.weights_S2RD[slot]
    bias_F = block.biases_SF[slot].to(x_LD.dtype)
    hidden_LR = torch.addmm(bias_F[: len(down_RD)], x_LD, down_RD.T).relu()
    return torch.addmm(bias_F[len(down_RD) :], hidden_LR, up_RD)
