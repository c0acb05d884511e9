"""Top-k expert mixing for a batch whose rows follow different paths, the plain PyTorch definition.

It is the CPU path and what the Triton kernel of the same signature is tested against. It gathers
each row's experts by slot index; there is no loop over experts and no read-back to the host. Only
`add_low_rank_` reads its slots back: rows without one are most of them, and cost nothing.

Legend: B rows (images or prompts), L tokens, D width, E experts a path may name, K chosen experts,
S slots, R bottleneck, H = K * R hidden units, P paths, I inputs and O outputs of a linear layer. A
slot's weights are stored [2, R, D]: down.weight, then up.weight transposed, both contiguous along
D.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["add_low_rank_", "choose", "expert_mixing", "expert_mixing_norm", "mix", "route"]


def route(logits_BE: Tensor, top_k_B: Tensor, *, max_top_k: int) -> tuple[Tensor, Tensor]:
    """Choose each row's best experts and their gates.

    gates = softmax over the chosen logits; an expert of logit -inf gets gate 0.

    Args:
        logits_BE: router logits, -inf where a path has no such expert; at least one finite logit in
            each row that counts.
        top_k_B: how many experts each row may use, 1..max_top_k, int64.
        max_top_k: K, the width of the answer.

    Returns:
        expert_BK int64 (best first; where the gate is 0, the row's best expert stands in) and
        gates_BK, in the logits' dtype.

    Source: MoE-Adapters, arXiv:2403.11549; Shazeer et al., arXiv:1701.06538, without the noise.
    """
    top_BK, expert_BK = logits_BE.topk(max_top_k, dim=-1)
    beyond_BK = torch.arange(max_top_k, device=logits_BE.device) >= top_k_B[:, None]
    top_BK = top_BK.masked_fill(beyond_BK, float("-inf"))
    gates_BK = torch.softmax(top_BK, dim=-1)
    return torch.where(top_BK.isneginf(), expert_BK[:, :1], expert_BK), gates_BK


def choose(
    x_BLD: Tensor,
    paths_B: Tensor,
    routers_PDE: Tensor,
    slots_PE: Tensor,
    top_k_P: Tensor,
    *,
    max_top_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Let every row's own router read its token 0 and choose experts.

    Returns:
        expert_BK and gates_BK as `route` gives them, and active_B: whether the row has any expert
        in this block. What the first two hold for an inactive row means nothing.
    """
    path_B = paths_B.clamp_min(0)
    present_BE = slots_PE[path_B] >= 0
    active_B = (paths_B >= 0) & present_BE.any(-1)
    logits_BE = torch.bmm(x_BLD[:, :1].to(routers_PDE.dtype), routers_PDE[path_B])[:, 0]
    logits_BE = logits_BE.masked_fill(~present_BE, float("-inf"))
    logits_BE = logits_BE.masked_fill(~active_B[:, None], 0.0)
    expert_BK, gates_BK = route(logits_BE, top_k_P[path_B], max_top_k=max_top_k)
    return expert_BK, gates_BK, active_B


def mix(
    x_BLD: Tensor,
    slots_BK: Tensor,
    gates_BK: Tensor,
    weights_S2RD: Tensor,
    biases_SF: Tensor,
    *,
    relu: bool = True,
    keep_BLH: Tensor | None = None,
) -> Tensor:
    """Apply each row's K bottleneck experts to all of its tokens and sum them by gate.

    y = sum_k gate_k * (relu(x @ down_k^T + down_bias_k) @ up_k^T + up_bias_k), in x's dtype, shape
    (B, L, D).

    Args:
        x_BLD: the residual stream after attention, not layer-normed.
        slots_BK: which slot each row's k-th expert lives in, int64.
        gates_BK: float32; any constant scale is folded in by the caller.
        weights_S2RD: slot pool.
        biases_SF: F = R + D, down bias then up bias, float32.
        relu: False for linear experts, which have no ReLU.
        keep_BLH: multiplies the hidden units after the ReLU, the k-th expert's at k*R..(k+1)*R: a
            dropout mask already divided by its keep probability, in x's dtype.

    Source: MoE-Adapters, arXiv:2403.11549, the branch parallel to the MLP.
    """
    bottleneck = weights_S2RD.shape[2]
    down_BKRD, up_BKRD = _chosen(weights_S2RD, slots_BK).unbind(2)
    down_bias_BKR, up_bias_BKD = _chosen(biases_SF, slots_BK).split(
        [bottleneck, biases_SF.shape[1] - bottleneck], dim=-1
    )
    # The k experts side by side are one expert of K*R hidden units: two products a row for any k.
    hidden_BLH = torch.baddbmm(
        down_bias_BKR.flatten(1)[:, None].to(x_BLD.dtype), x_BLD, down_BKRD.flatten(1, 2).mT
    )
    if relu:
        hidden_BLH = hidden_BLH.relu_()
    if keep_BLH is not None:
        hidden_BLH = hidden_BLH * keep_BLH
    gates_BH = gates_BK.repeat_interleave(bottleneck, dim=1).to(x_BLD.dtype)
    up_bias_BD = (gates_BK[:, :, None] * up_bias_BKD).sum(1).to(x_BLD.dtype)
    return torch.baddbmm(up_bias_BD[:, None], hidden_BLH * gates_BH[:, None], up_BKRD.flatten(1, 2))


def expert_mixing(
    x_BLD: Tensor,
    paths_B: Tensor,
    weights_S2RD: Tensor,
    biases_SF: Tensor,
    routers_PDE: Tensor,
    slots_PE: Tensor,
    top_k_P: Tensor,
    scale_P: Tensor,
    *,
    max_top_k: int,
) -> Tensor:
    """Route every row by its own path's router and mix its experts: the whole branch of one block.

    The router reads token 0 of x in the routers' own dtype, float32 whatever x is: top-k is a step,
    and bfloat16 would step at other places. A row whose path is -1, or whose path has no expert in
    this block, is exactly zero, whatever unused slots hold.

    Args:
        x_BLD: the residual stream after attention, (B, L, D).
        paths_B: path of each row, int64, -1 for none.
        weights_S2RD: slot pool, [s, 0] = down.weight, [s, 1] = up.weight transposed.
        biases_SF: slot pool of biases, F = R + D, float32.
        routers_PDE: each path's router, float32.
        slots_PE: the slot of each path's e-th expert, int64, -1 where there is none.
        top_k_P: int64; scale_P: float32; both per path.
        max_top_k: the largest top_k of any path.

    Returns:
        y (B, L, D) in x's dtype, to be added to the block's output.

    Source: MoE-Adapters, arXiv:2403.11549; routing is per sample, as in the authors' code.
    """
    if slots_PE.numel() == 0 or len(weights_S2RD) == 0:  # no path, or none with any expert
        return torch.zeros_like(x_BLD)
    expert_BK, gates_BK, active_B = choose(
        x_BLD, paths_B, routers_PDE, slots_PE, top_k_P, max_top_k=max_top_k
    )
    path_B = paths_B.clamp_min(0)
    slots_BK = slots_PE[path_B].gather(1, expert_BK).clamp_min(0)
    y_BLD = mix(x_BLD, slots_BK, gates_BK * scale_P[path_B, None], weights_S2RD, biases_SF)
    return y_BLD.masked_fill_(~active_B[:, None, None], 0.0)


def expert_mixing_norm(
    x_BLD: Tensor,
    paths_B: Tensor,
    weights_S2RD: Tensor,
    biases_SF: Tensor,
    routers_PDE: Tensor,
    slots_PE: Tensor,
    top_k_P: Tensor,
    scale_P: Tensor,
    out_bias_D: Tensor,
    norm_weight_D: Tensor,
    norm_bias_D: Tensor,
    *,
    max_top_k: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Mix the experts, and prepare both inputs of the MLP beside them, which shares their x.

    The first eight arguments are those of `expert_mixing`, whose answer is y here.

    Args:
        out_bias_D: bias of the MLP's last product, which then needs none of its own.
        norm_weight_D: of the MLP's LayerNorm; norm_bias_D and eps likewise.

    Returns:
        r = x + out_bias + y, for the MLP's last product to accumulate on, and z = LayerNorm(x), its
        input; both (B, L, D) in x's dtype.
    """
    pool = (weights_S2RD, biases_SF)
    y_BLD = expert_mixing(
        x_BLD, paths_B, *pool, routers_PDE, slots_PE, top_k_P, scale_P, max_top_k=max_top_k
    )
    r_BLD = y_BLD.add_(out_bias_D.to(x_BLD.dtype)).add_(x_BLD)
    weight_D, bias_D = norm_weight_D.to(x_BLD.dtype), norm_bias_D.to(x_BLD.dtype)
    return r_BLD, F.layer_norm(x_BLD, x_BLD.shape[-1:], weight_D, bias_D, eps)


def add_low_rank_(
    y_BLO: Tensor,
    x_BLI: Tensor,
    slots_B: Tensor,
    down_SRI: Tensor,
    up_SRO: Tensor,
    scale_S: Tensor,
) -> Tensor:
    """Add each row's own low-rank update of a linear layer to that layer's output, in place.

    y += scale[slot] * (x @ down[slot]^T) @ up[slot], row by row. No gradients.

    Args:
        y_BLO: the layer's output, changed; not the memory of x. A row without a slot stays as it
            is, to the bit, whatever unused slots hold.
        x_BLI: the layer's input.
        slots_B: which slot each row uses, int64, -1 for none.
        down_SRI: slot pool; up_SRO likewise, both in x's dtype.
        scale_S: float32.

    Returns:
        y_BLO.

    Source: LoRA, arXiv:2106.09685, with a slot for each row as in Punica, arXiv:2310.18547.
    """
    # Row by row, which no other row can change by a bit, and which copies no weights; `medley bench
    # kernels` has a gather and two batched products to compare with.
    for row, slot in enumerate(slots_B.tolist()):
        if slot >= 0:
            hidden_LR = (x_BLI[row] @ down_SRI[slot].mT).mul_(scale_S[slot])
            y_BLO[row].addmm_(hidden_LR, up_SRO[slot])
    return y_BLO


def _chosen(pool: Tensor, slots_BK: Tensor) -> Tensor:
    """Each row's experts, (B, K, ...).

    By index_select, whose gradient adds up in one order. That of plain indexing does not where
    there are several threads, and equal seeds would give other bits each time.
    """
    return pool.index_select(0, slots_BK.flatten()).unflatten(0, slots_BK.shape)
