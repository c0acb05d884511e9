"""One feature of every image against the autoencoders of every task: the reconstruction errors.

Not a selector: what an error means, and who wins, is decided in `medley/selector.py`.

Legend: B images, T tasks, F feature width, C code width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Output", "autoencoder_errors"]

Output = Literal["linear", "sigmoid"]


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
    `features_BF`; shape (B, T), float32, on its device.

    At a fixed B an image's errors are exactly the same whatever the other images are, and at any B
    they do not depend on which other tasks are there. Across different B they agree to rounding.

    Raises:
        ValueError: the shapes do not fit each other.

    Source: the auto-selector of MoE-Adapters, arXiv:2403.11549: mean 0, std 1, output "sigmoid", on
    features that went through a sigmoid themselves. Standardised features need neither.
    """
    weights = (mean_TF, std_TF, encoder_TFC, encoder_bias_TC, decoder_TCF, decoder_bias_TF)
    _check_shapes(features_BF, *weights)
    features_BF = features_BF.float()
    errors = [_errors(features_BF, *task, output=output) for task in zip(*weights, strict=True)]
    return torch.stack(errors, 1) if errors else features_BF.new_empty(len(features_BF), 0)


def _errors(
    features_BF: Tensor,
    mean_F: Tensor,
    std_F: Tensor,
    encoder_FC: Tensor,
    encoder_bias_C: Tensor,
    decoder_CF: Tensor,
    decoder_bias_F: Tensor,
    *,
    output: Output,
) -> Tensor:
    # One task at a time: the (B, F) working set stays in the cache. A batched product over all
    # tasks gives the same bits and takes three times as long (T = 1,000, F = 480, one core).
    z_BF = (features_BF - mean_F) / std_F
    code_BC = torch.addmm(encoder_bias_C, z_BF, encoder_FC).relu()
    decoded_BF = torch.addmm(decoder_bias_F, code_BC, decoder_CF)
    if output == "sigmoid":
        decoded_BF = decoded_BF.sigmoid()
    return (decoded_BF - z_BF).square().mean(-1)


def _check_shapes(
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
    expected = {
        "features": (features_BF, (len(features_BF), F)),
        "mean": (mean_TF, (T, F)),
        "std": (std_TF, (T, F)),
        "encoder_bias": (encoder_bias_TC, (T, C)),
        "decoder": (decoder_TCF, (T, C, F)),
        "decoder_bias": (decoder_bias_TF, (T, F)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
