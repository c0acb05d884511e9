"""The reconstruction errors in plain PyTorch: the definition, and the way of a CPU.

Legend: B images, T tasks, F feature width, C code width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["autoencoder_errors"]

_ALIGNED = 16  # float32 numbers in the 64 bytes that torch aligns its memory to
_MOST_WEIGHTS = 2**17  # numbers of an encoder
_MOST_TOGETHER = 2**15 - 1  # numbers; below torch's grain size only a product starts threads


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

    Tasks are scored together while what they work on fits into the cache, if that gives each the
    bits that it has alone, and otherwise one by one.
    """
    x_BF = features_BF.float()
    B, F = x_BF.shape
    weights = (mean_TF, std_TF, encoder_TFC, encoder_bias_TC, decoder_TCF, decoder_bias_TF)
    if not _same_bits_together(B, F, encoder_TFC.shape[2]):
        tasks = zip(*weights, strict=True)
        errors = [_errors(x_BF, *task, output=output, product=torch.addmm) for task in tasks]
        return torch.stack(errors, 1) if errors else x_BF.new_empty(B, 0)
    rows = [w[:, None] if w.ndim == 2 else w for w in weights]
    together = _MOST_TOGETHER // (B * F)
    if len(mean_TF) <= together:
        return _errors(x_BF, *rows, output=output, product=torch.baddbmm).T.contiguous()
    parts = zip(*(w.split(together) for w in rows), strict=True)
    errors = [_errors(x_BF, *part, output=output, product=torch.baddbmm) for part in parts]
    return torch.cat(errors).T.contiguous()


def _same_bits_together(images: int, width: int, codes: int) -> bool:
    """Whether a batched product gives each of its matrices the bits that it would have alone.

    So it is for MKL where each matrix lies as memory of its own would, and a power of two of rows
    can be shared out to threads without a rest: seen with 1 to 64 threads, on an AMD EPYC, and
    otherwise not. For more images or larger weights there is nothing to gain.
    """
    return (
        images > 0
        and images & (images - 1) == 0
        and width % _ALIGNED == codes % _ALIGNED == 0
        and 2 * images * width <= _MOST_TOGETHER
        and 0 < width * codes <= _MOST_WEIGHTS
    )


def _errors(
    features_BF: Tensor,
    mean: Tensor,
    std: Tensor,
    encoder: Tensor,
    encoder_bias: Tensor,
    decoder: Tensor,
    decoder_bias: Tensor,
    *,
    output: str,
    product: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Score one task, (B,), or several whose vectors are rows, (T, B)."""
    z = (features_BF - mean).div_(std)
    code = product(encoder_bias, z, encoder).relu_()
    decoded = product(decoder_bias, code, decoder)
    if output == "sigmoid":
        decoded.sigmoid_()
    return decoded.sub_(z).square_().mean(-1)
