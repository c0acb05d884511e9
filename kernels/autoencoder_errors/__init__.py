"""One feature of every image against the autoencoders of every task: the reconstruction errors.

Not a selector: what an error means, and who wins, is decided in `medley/selector.py`. A CPU runs
`reference`, the definition; a CUDA device runs the Triton kernel of `fused`, but for codes too wide
for it.

Legend: B images, T tasks, F feature width, C code width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels.autoencoder_errors import reference
from kernels.autoencoder_errors.table import MAX_CODES

__all__ = ["Output", "autoencoder_errors"]

Output = Literal["linear", "sigmoid"]

_WEIGHTS = ("mean", "std", "encoder", "encoder_bias", "decoder", "decoder_bias")


def autoencoder_errors(
    features_BF: Tensor,
    mean_TF: Tensor,
    std_TF: Tensor,
    encoder_TFC: Tensor,
    encoder_bias_TC: Tensor,
    decoder_TCF: Tensor,
    decoder_bias_TF: Tensor,
    *,
    output: Output = "linear",
) -> Tensor:
    """Return each image's mean squared reconstruction error under each task's autoencoder.

    With ``z = (x - mean) / std`` the error is the mean over F of
    ``(relu(z @ encoder + encoder_bias) @ decoder + decoder_bias - z) ** 2``, where `output`
    "sigmoid" puts a sigmoid around all before ``- z``. Computed in float32 whatever the dtype of
    `features_BF`; shape (B, T), float32, on its device. An image with a number that is not finite
    gets errors that are not finite, and no other image does.

    At a fixed B an image's errors are exactly the same whatever the other images are. At any B they
    do not depend on which other tasks are there, if F * C is a multiple of 16 or the device is no
    CPU: a CPU's BLAS may round the part of a stack that is not aligned another way. Across
    different B they agree to rounding, and so do devices.

    Raises:
        ValueError: the shapes do not fit each other, the weights are not float32, or not all
            tensors are on one device; on a CUDA device also weights that are not contiguous.

    Source: the auto-selector of MoE-Adapters, arXiv:2403.11549: mean 0, std 1, output "sigmoid", on
    features that went through a sigmoid themselves. Standardised features need neither.
    """
    weights = (mean_TF, std_TF, encoder_TFC, encoder_bias_TC, decoder_TCF, decoder_bias_TF)
    _check(features_BF, *weights)
    # A custom op costs its first caller a second and 150 MB of imports; a CPU needs none.
    if features_BF.device.type == "cuda" and encoder_TFC.shape[2] <= MAX_CODES:
        _check_contiguous(*weights)
        return _fused(features_BF, *weights, output=output)
    return reference.autoencoder_errors(features_BF, *weights, output=output)


@torch.library.custom_op("medley::autoencoder_errors", mutates_args=(), device_types="cuda")
def _fused(
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
    # Here, since Triton is only where Linux is.
    from kernels.autoencoder_errors.fused import prepare

    weights = (mean_TF, std_TF, encoder_TFC, encoder_bias_TC, decoder_TCF, decoder_bias_TF)
    errors_BT = _empty(features_BF, *weights, output=output)
    prepare(errors_BT, features_BF.contiguous(), *weights, output=output).run()
    return errors_BT


@_fused.register_fake
def _empty(features_BF: Tensor, mean_TF: Tensor, *_: Tensor, output: str) -> Tensor:
    return features_BF.new_empty(len(features_BF), len(mean_TF), dtype=torch.float32)


def _check(
    features_BF: Tensor,
    mean_TF: Tensor,
    std_TF: Tensor,
    encoder_TFC: Tensor,
    encoder_bias_TC: Tensor,
    decoder_TCF: Tensor,
    decoder_bias_TF: Tensor,
) -> None:
    if encoder_TFC.ndim != 3:
        raise ValueError(f"encoder has shape {tuple(encoder_TFC.shape)}, expected (T, F, C)")
    T, F, C = encoder_TFC.shape
    device = features_BF.device
    if features_BF.shape != (len(features_BF), F):
        raise ValueError(f"features has shape {tuple(features_BF.shape)}, expected (B, {F})")
    weights = (mean_TF, std_TF, encoder_TFC, encoder_bias_TC, decoder_TCF, decoder_bias_TF)
    shapes = ((T, F), (T, F), (T, F, C), (T, C), (T, C, F), (T, F))
    for name, tensor, shape in zip(_WEIGHTS, weights, shapes, strict=True):
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tensor.dtype}, expected torch.float32")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the features on {device}")


def _check_contiguous(*weights: Tensor) -> None:
    for name, weight in zip(_WEIGHTS, weights, strict=True):
        if not weight.is_contiguous():
            raise ValueError(f"{name} is not contiguous, its strides are {weight.stride()}")
