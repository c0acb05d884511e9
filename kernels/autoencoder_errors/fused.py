"""The fused Triton kernel: all tasks' autoencoders in one launch, no reconstruction written.

What it computes is defined in `reference.py`; how it is cut up comes from `table.py`. This module
checks nothing: `kernels.autoencoder_errors` does, before it gets here. The launcher takes CPU
tensors too where Triton interprets (TRITON_INTERPRET=1), which is how the tests run it.

The features are not shared out: one image under T tasks keeps T multiprocessors busy, each with
reading one task's weights alone. At the served widths that is 200 KB; at AlexNet's 43,264 features
and 100 codes it is 35 MB, for which a device with few images and tasks is used badly.

Legend: B images, T tasks, F feature width, C code width; in the kernel M is the images of a tile,
N the features of one step, and C is rounded up to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.autoencoder_errors.table import Launch, find
from kernels.launching import Call

__all__ = ["kernel", "prepare"]


@triton.jit
def _standardised(x_ptr, mean_ptr, std_ptr, row_M, n_N, B, F):
    """Read z = (x - mean) / std, 0 where there is no such image or feature."""
    within_N = n_N < F
    # As int64: with AlexNet's 43,264 features, 50,000 images are more than int32 counts.
    at_MN = row_M.to(tl.int64)[:, None] * F + n_N[None, :]
    within_MN = (row_M < B)[:, None] & within_N[None, :]
    x_MN = tl.load(x_ptr + at_MN, mask=within_MN, other=0.0).to(tl.float32)
    mean_N = tl.load(mean_ptr + n_N, mask=within_N, other=0.0)
    std_N = tl.load(std_ptr + n_N, mask=within_N, other=1.0)
    return (x_MN - mean_N[None, :]) / std_N[None, :]


@triton.jit(do_not_specialize=["B"])
def kernel(
    errors_ptr,
    features_ptr,
    mean_ptr,
    std_ptr,
    encoder_ptr,
    encoder_bias_ptr,
    decoder_ptr,
    decoder_bias_ptr,
    B,
    F,
    C,
    SIGMOID: tl.constexpr,
    C_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Score one tile of images under one task's autoencoder.

    Grid: (T * ceil(B / BLOCK_M),), the tile fastest, so that neighbours share a task's weights.

    A program owns images tile * BLOCK_M.. of one task and goes through the features twice: first
    it adds up their codes, then it decodes them a step at a time and adds up the squared
    differences. The codes stay in registers. Sums have one order, so that at a fixed B errors have
    the same bits whatever the other images are, and whatever tasks. All is float32; "tf32x3"
    multiplies the parts of a float32 in three passes of a tensor core, exact but for the last bits,
    which costs three times a pass that would keep 10 bits of each number.

    Written: errors (B, T) contiguous, float32, each by one program.

    Read, all contiguous: features (B, F) of any float dtype; in float32 mean, std and decoder_bias
    (T, F), encoder (T, F, C), encoder_bias (T, C), decoder (T, C, F).

    B does not recompile; F and C do by whether they are multiples of 16, and C by C_PAD.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(B, BLOCK_M)
    T = tl.num_programs(0) // tiles
    row_M = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    task = (program // tiles).to(tl.int64)
    mean_ptr += task * F
    std_ptr += task * F
    encoder_ptr += task * F * C
    decoder_ptr += task * F * C
    decoder_bias_ptr += task * F
    c_C = tl.arange(0, C_PAD)
    within_C = c_C < C

    code_MC = tl.zeros((BLOCK_M, C_PAD), tl.float32)
    for n0 in range(0, F, BLOCK_N):
        n_N = n0 + tl.arange(0, BLOCK_N)
        z_MN = _standardised(features_ptr, mean_ptr, std_ptr, row_M, n_N, B, F)
        encoder_NC = tl.load(
            encoder_ptr + n_N[:, None] * C + c_C[None, :],
            mask=(n_N < F)[:, None] & within_C[None, :],
            other=0.0,
        )
        code_MC = tl.dot(z_MN, encoder_NC, code_MC, input_precision="tf32x3")
    bias_C = tl.load(encoder_bias_ptr + task * C + c_C, mask=within_C, other=0.0)
    # As torch's: a code that is not a number stays so.
    code_MC = tl.maximum(code_MC + bias_C[None, :], 0.0, propagate_nan=tl.PropagateNan.ALL)

    error_M = tl.zeros((BLOCK_M,), tl.float32)
    for n0 in range(0, F, BLOCK_N):
        n_N = n0 + tl.arange(0, BLOCK_N)
        decoder_CN = tl.load(
            decoder_ptr + c_C[:, None] * F + n_N[None, :],
            mask=within_C[:, None] & (n_N < F)[None, :],
            other=0.0,
        )
        decoded_MN = tl.dot(code_MC, decoder_CN, input_precision="tf32x3")
        bias_N = tl.load(decoder_bias_ptr + n_N, mask=n_N < F, other=0.0)
        decoded_MN += bias_N[None, :]
        if SIGMOID:
            decoded_MN = tl.sigmoid(decoded_MN)
        apart_MN = decoded_MN - _standardised(features_ptr, mean_ptr, std_ptr, row_M, n_N, B, F)
        # A sigmoid of nothing is a half.
        apart_MN = tl.where((n_N < F)[None, :], apart_MN, 0.0)
        error_M += tl.sum(apart_MN * apart_MN, axis=1)
    tl.store(errors_ptr + row_M.to(tl.int64) * T + task, error_M / F, mask=row_M < B)


def prepare(
    errors_BT: Tensor,
    features_BF: Tensor,
    mean_TF: Tensor,
    std_TF: Tensor,
    encoder_TFC: Tensor,
    encoder_bias_TC: Tensor,
    decoder_TCF: Tensor,
    decoder_bias_TF: Tensor,
    *,
    output: str,
    launch: Launch | None = None,
) -> Call:
    """Prepare the launch that writes errors_BT; all tensors are contiguous.

    Args:
        errors_BT: written, float32.
        features_BF, mean_TF, ..., decoder_bias_TF: read.
        output: "linear" or "sigmoid".
        launch: how to cut it up; without it the table chooses.
    """
    B, T = errors_BT.shape
    _, F, C = encoder_TFC.shape
    launch = launch or find(B, C)
    return Call(
        kernel=kernel,
        grid=(T * triton.cdiv(B, launch.block_m),),
        arguments={
            "errors_ptr": errors_BT,
            "features_ptr": features_BF,
            "mean_ptr": mean_TF,
            "std_ptr": std_TF,
            "encoder_ptr": encoder_TFC,
            "encoder_bias_ptr": encoder_bias_TC,
            "decoder_ptr": decoder_TCF,
            "decoder_bias_ptr": decoder_bias_TF,
            "B": B,
            "F": F,
            "C": C,
        },
        constants={
            "SIGMOID": output == "sigmoid",
            "C_PAD": max(16, triton.next_power_of_2(C)),
            "BLOCK_M": launch.block_m,
            "BLOCK_N": launch.block_n,
        },
        launch=launch,
    )
