"""The public operations: what is checked, and which implementation answers.

CUDA tensors go to the fused kernel, all others to the plain definition. The kernel's operations are
registered with torch, so that tracing sees one node of known shape. The CPU path is called
straight: a registered operation costs more than one image can spare, and autograd would need
a formula.

Legend: as in `reference.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.expert_mixing import reference, training

__all__ = [
    "add_low_rank_",
    "expert_mixing",
    "expert_mixing_norm",
    "mix",
    "mix_cuda",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_EXPERTS = 64  # a program of the kernel holds one step of all of them in registers


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
    """Apply each row's K given experts to all of its tokens and sum them by gate.

    The definition, arguments and answer are those of `reference.mix`, and gradients reach x, gates,
    weights and biases. On a CUDA device a slot out of range counts as none and adds nothing.

    Raises:
        ValueError: shapes, dtypes, devices or memory layouts that do not fit, and on a CPU a slot
            out of range. On CUDA also a D that is not a multiple of 16, or more hidden units than
            the launch table has room for.
    """
    B, L, _ = _check_pool(x_BLD, weights_S2RD, biases_SF)
    slots, _, bottleneck, _ = weights_S2RD.shape
    K = slots_BK.shape[-1]
    _check(x_BLD, "slots_BK", slots_BK, (B, K), torch.int64)
    _check(x_BLD, "gates_BK", gates_BK, (B, K), biases_SF.dtype)
    if keep_BLH is not None:
        _check(x_BLD, "keep_BLH", keep_BLH, (B, L, K * bottleneck), x_BLD.dtype)
    if x_BLD.device.type == "cuda":
        return mix_cuda(x_BLD, slots_BK, gates_BK, weights_S2RD, biases_SF, relu, keep_BLH)
    _check_range("slots_BK", slots_BK, 0, slots)
    return reference.mix(
        x_BLD, slots_BK, gates_BK, weights_S2RD, biases_SF, relu=relu, keep_BLH=keep_BLH
    )


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

    The definition, arguments and answer are those of `reference.expert_mixing`. On a CUDA device a
    path or slot out of range counts as none. Where two logits are so close that float32 sums of
    another order differ, two devices may choose differently; on one device the choice is the same
    every time, and of equal logits the kernel takes the lower index.

    Raises:
        ValueError: shapes, dtypes, devices or memory layouts that do not fit, `max_top_k` larger
            than E, and on a CPU a path or slot out of range. On CUDA also more than 64 experts, a D
            that is not a multiple of 16, or more hidden units than the launch table has room for.
    """
    routing = (paths_B, weights_S2RD, biases_SF, routers_PDE, slots_PE, top_k_P, scale_P)
    _check_routing(x_BLD, *routing, max_top_k=max_top_k)
    if x_BLD.device.type == "cuda":
        return expert_mixing_cuda(x_BLD, *routing, max_top_k)
    return reference.expert_mixing(x_BLD, *routing, max_top_k=max_top_k)


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

    The definition, arguments and answers (r, z) are those of `reference.expert_mixing_norm`; what
    else `expert_mixing` says holds here too.

    Raises:
        ValueError: as `expert_mixing`.
    """
    routing = (paths_B, weights_S2RD, biases_SF, routers_PDE, slots_PE, top_k_P, scale_P)
    norm = (out_bias_D, norm_weight_D, norm_bias_D)
    _check_routing(x_BLD, *routing, max_top_k=max_top_k)
    for name, tensor in zip(("out_bias_D", "norm_weight_D", "norm_bias_D"), norm, strict=True):
        _check(x_BLD, name, tensor, x_BLD.shape[-1:], tensor.dtype)
    if x_BLD.device.type == "cuda":
        return expert_mixing_norm_cuda(x_BLD, *routing, *norm, max_top_k, eps)
    return reference.expert_mixing_norm(x_BLD, *routing, *norm, max_top_k=max_top_k, eps=eps)


def add_low_rank_(
    y_BLO: Tensor,
    x_BLI: Tensor,
    slots_B: Tensor,
    down_SRI: Tensor,
    up_SRO: Tensor,
    scale_S: Tensor,
) -> Tensor:
    """Add each row's own low-rank update of a linear layer to that layer's output, in place.

    The definition, arguments and answer are those of `reference.add_low_rank_`. On a CUDA device a
    slot out of range counts as none. The CPU path reads the slots and is not for tracing.

    Raises:
        ValueError: shapes, dtypes, devices or memory layouts that do not fit, and on a CPU a slot
            out of range. On CUDA also an I or O that is not a multiple of 16, or a rank that the
            launch table has no room for.
    """
    _check_low_rank(y_BLO, x_BLI, slots_B, down_SRI, up_SRO, scale_S)
    if x_BLI.device.type in ("cuda", "meta"):  # the plain definition reads its slots
        add_low_rank_cuda_(y_BLO, x_BLI, slots_B, down_SRI, up_SRO, scale_S)
        return y_BLO
    return reference.add_low_rank_(y_BLO, x_BLI, slots_B, down_SRI, up_SRO, scale_S)


@torch.library.custom_op("medley::mix", mutates_args=(), device_types="cuda")
def mix_cuda(
    x_BLD: Tensor,
    slots_BK: Tensor,
    gates_BK: Tensor,
    weights_S2RD: Tensor,
    biases_SF: Tensor,
    relu: bool,
    keep_BLH: Tensor | None,
) -> Tensor:
    """Run `mix` on the kernel; nothing is checked."""
    from kernels.expert_mixing import fused  # here: Triton is there on Linux alone

    return fused.mix(
        x_BLD, slots_BK, gates_BK, weights_S2RD, biases_SF, relu=relu, keep_BLH=keep_BLH
    )


@torch.library.custom_op("medley::expert_mixing", mutates_args=(), device_types="cuda")
def expert_mixing_cuda(
    x_BLD: Tensor,
    paths_B: Tensor,
    weights_S2RD: Tensor,
    biases_SF: Tensor,
    routers_PDE: Tensor,
    slots_PE: Tensor,
    top_k_P: Tensor,
    scale_P: Tensor,
    max_top_k: int,
) -> Tensor:
    """Run `expert_mixing` on the kernel; nothing is checked."""
    from kernels.expert_mixing import fused

    routing = (paths_B, weights_S2RD, biases_SF, routers_PDE, slots_PE, top_k_P, scale_P)
    return fused.expert_mixing(x_BLD, *routing, max_top_k=max_top_k)


@torch.library.custom_op("medley::expert_mixing_norm", mutates_args=(), device_types="cuda")
def expert_mixing_norm_cuda(
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
    max_top_k: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Run `expert_mixing_norm` on the kernel; nothing is checked."""
    from kernels.expert_mixing import fused

    routing = (paths_B, weights_S2RD, biases_SF, routers_PDE, slots_PE, top_k_P, scale_P)
    norm = (out_bias_D, norm_weight_D, norm_bias_D)
    return fused.expert_mixing_norm(x_BLD, *routing, *norm, max_top_k=max_top_k, eps=eps)


@torch.library.custom_op("medley::add_low_rank_", mutates_args=("y_BLO",), device_types="cuda")
def add_low_rank_cuda_(
    y_BLO: Tensor,
    x_BLI: Tensor,
    slots_B: Tensor,
    down_SRI: Tensor,
    up_SRO: Tensor,
    scale_S: Tensor,
) -> None:
    """Run `add_low_rank_` on the kernel; nothing is checked."""
    from kernels.expert_mixing import fused_low_rank

    fused_low_rank.add_low_rank_(y_BLO, x_BLI, slots_B, down_SRI, up_SRO, scale_S)


mix_cuda.register_autograd(training.backward, setup_context=training.setup_context)


@mix_cuda.register_fake
def _(x_BLD: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x_BLD)


@expert_mixing_cuda.register_fake
def _(x_BLD: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x_BLD)


@expert_mixing_norm_cuda.register_fake
def _(x_BLD: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_BLD), torch.empty_like(x_BLD)


@add_low_rank_cuda_.register_fake
def _(y_BLO: Tensor, *_: object) -> None:
    return None


def _check_routing(
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
) -> None:
    B, _, D = _check_pool(x_BLD, weights_S2RD, biases_SF)
    if slots_PE.ndim != 2:
        raise ValueError(f"slots_PE has shape {tuple(slots_PE.shape)}, expected (P, E)")
    P, E = slots_PE.shape
    wide = biases_SF.dtype
    _check(x_BLD, "paths_B", paths_B, (B,), torch.int64)
    _check(x_BLD, "routers_PDE", routers_PDE, (P, D, E), wide)
    _check(x_BLD, "slots_PE", slots_PE, (P, E), torch.int64)
    _check(x_BLD, "top_k_P", top_k_P, (P,), torch.int64)
    _check(x_BLD, "scale_P", scale_P, (P,), wide)
    if max_top_k < 1 or (E and max_top_k > E):
        raise ValueError(f"max_top_k {max_top_k} is not in 1..{E}, the experts a path may name")
    if x_BLD.device.type == "cuda":
        if E > _MAX_EXPERTS:
            raise ValueError(f"{E} experts a path, the kernel has room for {_MAX_EXPERTS}")
    else:
        _check_range("paths_B", paths_B, None, P)
        _check_range("slots_PE", slots_PE, None, len(weights_S2RD))


def _check_low_rank(
    y_BLO: Tensor,
    x_BLI: Tensor,
    slots_B: Tensor,
    down_SRI: Tensor,
    up_SRO: Tensor,
    scale_S: Tensor,
) -> None:
    if x_BLI.ndim != 3 or down_SRI.ndim != 3 or up_SRO.ndim != 3:
        raise ValueError(
            f"x_BLI has shape {tuple(x_BLI.shape)}, down_SRI {tuple(down_SRI.shape)} and up_SRO "
            f"{tuple(up_SRO.shape)}, expected (B, L, I), (S, R, I) and (S, R, O)"
        )
    B, L, inputs = x_BLI.shape
    S, R, outputs = up_SRO.shape
    wide = _check_x("x_BLI", x_BLI)
    for name, tensor, shape, dtype in (
        ("y_BLO", y_BLO, (B, L, outputs), x_BLI.dtype),
        ("slots_B", slots_B, (B,), torch.int64),
        ("down_SRI", down_SRI, (S, R, inputs), x_BLI.dtype),
        ("up_SRO", up_SRO, (S, R, outputs), x_BLI.dtype),
        ("scale_S", scale_S, (S,), wide),
    ):
        _check(x_BLI, name, tensor, shape, dtype, beside="x_BLI")
    if x_BLI.device.type != "cuda":
        _check_range("slots_B", slots_B, None, S)


def _check_pool(x_BLD: Tensor, weights_S2RD: Tensor, biases_SF: Tensor) -> torch.Size:
    """Check what all forms share, and return (B, L, D)."""
    if x_BLD.ndim != 3 or weights_S2RD.ndim != 4:
        raise ValueError(
            f"x_BLD has shape {tuple(x_BLD.shape)} and weights_S2RD {tuple(weights_S2RD.shape)}, "
            "expected (B, L, D) and (S, 2, R, D)"
        )
    D = x_BLD.shape[2]
    slots, _, bottleneck, _ = weights_S2RD.shape
    wide = _check_x("x_BLD", x_BLD)
    _check(x_BLD, "weights_S2RD", weights_S2RD, (slots, 2, bottleneck, D), x_BLD.dtype)
    _check(x_BLD, "biases_SF", biases_SF, (slots, bottleneck + D), wide)
    return x_BLD.shape


def _check_x(name: str, x: Tensor) -> torch.dtype:
    """Check what the others have to fit, and return the dtype of biases, routers and scales."""
    if x.shape[1] == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected at least one token")
    # float64 is for gradient checks on a CPU.
    dtypes = _DTYPES if x.device.type == "cuda" else (*_DTYPES, torch.float64)
    if x.dtype not in dtypes:
        raise ValueError(f"{name} is {x.dtype}, expected one of {dtypes}")
    _check(x, name, x, x.shape, x.dtype, beside=name)
    return torch.promote_types(x.dtype, torch.float32)


def _check(
    x: Tensor,
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    beside: str = "x_BLD",
) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}, expected {dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, {beside} on {x.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous: its strides are {tensor.stride()}")


def _check_range(name: str, indices: Tensor, least: int | None, end: int) -> None:
    """Look at the values where that costs nothing: on a CPU, and not while tracing."""
    traced = type(indices) is not Tensor or torch.compiler.is_compiling()
    if traced or indices.device.type != "cpu" or indices.numel() == 0:
        return
    low, high = (int(bound) for bound in indices.aminmax())
    if high >= end or (least is not None and low < least):
        wrong = high if high >= end else low
        raise ValueError(f"{name} holds {wrong}, there are {end}")
