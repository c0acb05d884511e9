"""The expert branch in float64, row by row, from the definition: what errors are taken from."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.speed.block import Block

__all__ = ["ENTIRELY", "oracle", "relative_error"]

ENTIRELY = 1e9  # a wrong result, as a number that JSON can hold


def oracle(block: Block, x_BLD: Tensor) -> Tensor:
    """Return y in float64 for the values that x and the weights have in their own dtype."""
    y_BLD = torch.zeros_like(x_BLD, dtype=torch.float64)
    for row, path in enumerate(block.paths):
        if path >= 0:
            y_BLD[row] = _row(block, x_BLD[row].double(), path)
    return y_BLD


def relative_error(y_BLD: Tensor, exact_BLD: Tensor) -> float:
    """Frobenius norm of the difference over that of y itself.

    0 where both are exactly zero; what is not a number, or off by more than that, is `ENTIRELY`.
    """
    difference = (y_BLD.double() - exact_BLD).norm()
    error = float(difference / exact_BLD.norm()) if difference else 0.0
    return error if error < ENTIRELY else ENTIRELY


def _row(block: Block, x_LD: Tensor, path: int) -> Tensor:
    logits_E = x_LD[0] @ block.routers_PDE[path].double()
    top_K, expert_K = logits_E.topk(int(block.top_k_P[path]))
    bottleneck = block.weights_S2RD.shape[2]
    y_LD = torch.zeros_like(x_LD)
    for gate, expert in zip(top_K.softmax(0), expert_K, strict=True):
        slot = block.slots_PE[path, expert]
        down_RD, up_RD = block.weights_S2RD[slot].double()
        bias_F = block.biases_SF[slot].double()
        hidden_LR = (x_LD @ down_RD.T + bias_F[:bottleneck]).relu()
        y_LD += gate * (hidden_LR @ up_RD + bias_F[bottleneck:])
    return y_LD * block.scale_P[path].double()
