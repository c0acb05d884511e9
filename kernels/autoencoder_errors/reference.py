"""The reconstruction errors in plain PyTorch: the definition, and the way of a CPU.

Legend: B images, T tasks, F feature width, C code width.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["autoencoder_errors"]

_MOST_TOGETHER = 2**15 - 1  # numbers; below torch's grain size nothing but a product starts threads
_ALIGNMENT = 16  # numbers in 64 bytes, to which torch aligns what it allocates


def autoencoder_errors(
    features_BF: Tensor,
    mean_TF: Tensor,
    std_TF: Tensor,
    encoder_TFC: Tensor,
    encoder_bias_TC: Tensor,
    decoder_TCF: Tensor,
    decoder_bias_TF: Tensor,
    *,
    output: str,
) -> Tensor:
    """Do what `kernels.autoencoder_errors` says, on any device; nothing is checked.

    What is elementwise is done for several tasks at once, while they fit into the cache. Products
    are one call a task: MKL's batched product gives a matrix other last bits for other numbers of
    matrices, as soon as it has two threads.
    """
    features_BF = features_BF.float()
    B, F = features_BF.shape
    # A task's part of a buffer must lie as a buffer of its own would: BLAS rounds by alignment.
    together = max(1, _MOST_TOGETHER // (B * F)) if B and F and B * F % _ALIGNMENT == 0 else 1
    encoders, biases = encoder_TFC.unbind(), encoder_bias_TC.unbind()
    decoders, decoder_biases = decoder_TCF.unbind(), decoder_bias_TF.unbind()
    errors = [features_BF.new_empty(0, B)]
    for first in range(0, len(encoders), together):
        some = slice(first, first + together)
        z_TBF = (features_BF - mean_TF[some, None]).div_(std_TF[some, None])
        decoded_TBF = torch.empty_like(z_TBF)
        for t, (z_BF, decoded_BF) in enumerate(zip(z_TBF, decoded_TBF, strict=True), first):
            code_BC = torch.addmm(biases[t], z_BF, encoders[t]).relu_()
            torch.addmm(decoder_biases[t], code_BC, decoders[t], out=decoded_BF)
        if output == "sigmoid":
            decoded_TBF.sigmoid_()
        errors.append(decoded_TBF.sub_(z_TBF).square_().mean(-1))
    return torch.cat(errors).T.contiguous()
