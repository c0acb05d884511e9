"""The fused Triton kernel: a whole block's expert branch in one launch.

What it computes is defined in `reference.py`; how it is cut up comes from `table.py`. This module
checks nothing: `kernels.expert_mixing` does, before it gets here. The launchers take CPU tensors
too where Triton interprets (TRITON_INTERPRET=1), which is how the tests run them.

Legend: B rows (images or prompts), L tokens, D width, E experts a path may name, K chosen experts,
S slots, R bottleneck, F = R + D, H = K * R hidden units, P paths. In the kernel M is the tokens of
a tile and H is rounded up to a power of two; `kk_`, `nn_` are indices along D of one step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.expert_mixing.table import Launch, find
from kernels.expert_mixing.tiles import dot, read, upcast, write
from kernels.launching import Call

__all__ = [
    "Norm",
    "Router",
    "expert_mixing",
    "expert_mixing_norm",
    "kernel",
    "mix",
    "prepare",
]


@triton.jit
def _given(slots_ptr, gates_ptr, b, S, K: tl.constexpr, K_PAD: tl.constexpr):
    """Read a row's slots and gates; a slot out of range is none."""
    k_K = tl.arange(0, K_PAD)
    slot_K = tl.load(slots_ptr + b * K + k_K, mask=k_K < K, other=-1)
    gate_K = tl.load(gates_ptr + b * K + k_K, mask=k_K < K, other=0.0)
    there = (slot_K >= 0) & (slot_K < S)
    slot_K = tl.where(there, slot_K, -1)
    gate_K = tl.where(there, gate_K, 0.0)
    return slot_K, gate_K, tl.max(slot_K, axis=0) >= 0


@triton.jit
def _routed(
    x_ptr,
    paths_ptr,
    routers_ptr,
    slots_ptr,
    top_k_ptr,
    scale_ptr,
    b,
    P,
    S,
    D: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK_ROUTER: tl.constexpr,
):
    """Route a row by its token 0: its K slots (-1 for none) and gates, and whether it has any.

    Every program of a row repeats this, in the same order of sums, so all of them agree.
    """
    k_K = tl.arange(0, K_PAD)
    slot_K = tl.full((K_PAD,), -1, tl.int64)
    gate_K = tl.zeros((K_PAD,), tl.float32)
    active = False
    path = tl.load(paths_ptr + b)
    if (path >= 0) & (path < P):
        e_E = tl.arange(0, E_PAD)
        slots_E = tl.load(slots_ptr + path * E + e_E, mask=e_E < E, other=-1)
        present_E = (slots_E >= 0) & (slots_E < S)
        active = tl.max(present_E.to(tl.int32), axis=0) > 0
        logits_E = tl.zeros((E_PAD,), tl.float32)
        for d0 in range(0, D, BLOCK_ROUTER):
            d = d0 + tl.arange(0, BLOCK_ROUTER)
            token = tl.load(x_ptr + d).to(tl.float32)
            # Columns of absent experts may hold anything and are not read.
            router = tl.load(
                routers_ptr + (path * D + d[:, None]) * E + e_E[None, :],
                mask=present_E[None, :],
                other=0.0,
            )
            logits_E += tl.sum(token[:, None] * router, axis=0)
        live_E = tl.where(present_E, logits_E, float("-inf"))
        top = tl.max(live_E, axis=0)
        count = tl.load(top_k_ptr + path)
        total = 0.0
        for k in tl.static_range(K):
            best = tl.max(live_E, axis=0)
            index = tl.argmax(live_E, axis=0, tie_break_left=True)
            # With fewer experts than top_k the best of what is left is -inf, and its share 0.
            share = tl.where(k < count, tl.exp(best - top), 0.0)
            chosen = (k < count) & (best > float("-inf"))
            slot = tl.max(tl.where(present_E & (e_E == index), slots_E, -1), axis=0)
            slot_K = tl.where((k_K == k) & chosen, slot, slot_K)
            gate_K = tl.where(k_K == k, share, gate_K)
            total += share
            live_E = tl.where(e_E == index, float("-inf"), live_E)
        gate_K = gate_K / total * tl.load(scale_ptr + path)
    return slot_K, gate_K, active


@triton.jit
def _moments(x_MK, mean_M, spread_M, seen, BLOCK_K: tl.constexpr):
    """Take one more step along D into each token's mean and sum of squared deviations.

    Chan, Golub and LeVeque 1983: no cancellation where a mean is large, and no second read of x.
    """
    step_M = tl.sum(x_MK, axis=1) / BLOCK_K
    apart_MK = x_MK - step_M[:, None]
    delta_M = step_M - mean_M
    share = BLOCK_K / (seen + BLOCK_K)
    spread_M += tl.sum(apart_MK * apart_MK, axis=1) + delta_M * delta_M * (seen * share)
    return mean_M + delta_M * share, spread_M


@triton.jit
def _normalise(x_MN, mean_M, rstd_M, norm_weight_ptr, norm_bias_ptr, nn_N):
    weight_N = tl.load(norm_weight_ptr + nn_N).to(tl.float32)
    bias_N = tl.load(norm_bias_ptr + nn_N).to(tl.float32)
    return (x_MN - mean_M[:, None]) * rstd_M[:, None] * weight_N[None, :] + bias_N[None, :]


@triton.jit(do_not_specialize=["L", "P", "S"])
def kernel(
    x_ptr,
    y_ptr,
    z_ptr,
    slots_ptr,
    gates_ptr,
    paths_ptr,
    routers_ptr,
    top_k_ptr,
    scale_ptr,
    weights_ptr,
    biases_ptr,
    keep_ptr,
    out_bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    L,
    P,
    S,
    eps,
    D: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    H_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
    E_PAD: tl.constexpr,
    ROUTER: tl.constexpr,
    NORM: tl.constexpr,
    RELU: tl.constexpr,
    KEEP: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ROUTER: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Mix the experts of one row into one tile of its tokens.

    Grid: (B * ceil(L / BLOCK_M) * SPLIT,), the split fastest, then the tile, then the row, so that
    neighbours share a row's weights. It depends on shapes alone: no sort, no count, no atomics.

    A program owns tokens tile * BLOCK_M.. and columns split * D/SPLIT.. of one row b, and writes
    each of them once. It reads all D columns of its tokens, so the splits of a tile repeat the
    first product. The K experts lie side by side as one of H hidden units, and the gates go into
    the hidden units in float32, so the sum over k is part of the second product.

    Written, both (B, L, D) contiguous, in x's dtype, never the memory of x (a tile would overwrite
    the token 0 that a later one routes by):
        y_ptr: y, the experts' sum; with NORM r = x + out_bias + y.
        z_ptr: with NORM the LayerNorm of x; otherwise None.

    Read: x (B, L, D); weights (S, 2, R, D) in x's dtype; biases (S, R + D) float32. With ROUTER
    paths (B), routers (P, D, E) float32, slots (P, E), top_k (P), scale (P); without, slots and
    gates (B, K). With KEEP keep (B, L, K * R) in x's dtype. What a mode does not read is None.

    A path or slot out of range counts as none: nothing is read for it. A row without experts
    reads no weights.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(L, BLOCK_M)
    split = program % SPLIT
    tile = program // SPLIT % tiles
    b = (program // (SPLIT * tiles)).to(tl.int64)
    # int64 to find the row, int32 within it: wider offsets of a tile would cost 10 registers.
    x_ptr += b * L * D
    y_ptr += b * L * D
    if NORM:
        z_ptr += b * L * D

    if ROUTER:
        slot_K, gate_K, active = _routed(
            x_ptr, paths_ptr, routers_ptr, slots_ptr, top_k_ptr, scale_ptr, b, P, S,
            D, E, E_PAD, K, K_PAD, BLOCK_ROUTER,
        )  # fmt: skip
    else:
        slot_K, gate_K, active = _given(slots_ptr, gates_ptr, b, S, K, K_PAD)

    m_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    within_M = (m_M < L)[:, None]
    at_M = m_M[:, None] * D
    mean_M = tl.zeros((BLOCK_M,), tl.float32)
    spread_M = tl.zeros((BLOCK_M,), tl.float32)
    first = split * (D // SPLIT)

    if active:
        h_H = tl.arange(0, H_PAD)
        unit_H = h_H % R
        k_K = tl.arange(0, K_PAD)
        mine_HK = (h_H // R)[:, None] == k_K[None, :]
        slot_H = tl.max(tl.where(mine_HK, slot_K[None, :], -1), axis=1)
        gate_H = tl.sum(tl.where(mine_HK, gate_K[None, :], 0.0), axis=1)
        there_H = slot_H >= 0
        down_H = weights_ptr + (slot_H * (2 * R) + unit_H)[:, None] * D

        hidden_MH = tl.zeros((BLOCK_M, H_PAD), tl.float32)
        for k0 in range(0, D, BLOCK_K):
            kk_K = k0 + tl.arange(0, BLOCK_K)
            x_MK = read(x_ptr, at_M, kk_K, within_M)
            down_HK = tl.load(down_H + kk_K[None, :], mask=there_H[:, None], other=0.0)
            hidden_MH = dot(x_MK, tl.trans(down_HK), hidden_MH, UPCAST)
            if NORM:
                mean_M, spread_M = _moments(x_MK.to(tl.float32), mean_M, spread_M, k0, BLOCK_K)

        down_bias_H = tl.load(biases_ptr + slot_H * (R + D) + unit_H, mask=there_H, other=0.0)
        hidden_MH += down_bias_H[None, :]
        if RELU:
            # A NaN must come out as one: the plain maximum of a GPU is 0 there.
            hidden_MH = tl.maximum(hidden_MH, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if KEEP:
            keep_MH = tl.load(
                keep_ptr + b * L * (K * R) + m_M[:, None] * (K * R) + h_H[None, :],
                mask=within_M & (h_H < K * R)[None, :],
                other=0.0,
            )
            hidden_MH *= keep_MH.to(tl.float32)
        hidden_MH = (hidden_MH * gate_H[None, :]).to(x_ptr.dtype.element_ty)

        if NORM:
            rstd_M = tl.rsqrt(spread_M / D + eps)
        up_H = down_H + R * D
        up_bias_K = biases_ptr + (slot_K * (R + D) + R)[:, None]
        for n0 in range(0, D // SPLIT, BLOCK_N):
            nn_N = first + n0 + tl.arange(0, BLOCK_N)
            up_HN = tl.load(up_H + nn_N[None, :], mask=there_H[:, None], other=0.0)
            up_bias_KN = tl.load(up_bias_K + nn_N[None, :], mask=(slot_K >= 0)[:, None], other=0.0)
            bias_N = tl.sum(gate_K[:, None] * up_bias_KN, axis=0)
            if NORM:
                x_MN = read(x_ptr, at_M, nn_N, within_M).to(tl.float32)
                bias_N += tl.load(out_bias_ptr + nn_N).to(tl.float32)
                z_MN = _normalise(x_MN, mean_M, rstd_M, norm_weight_ptr, norm_bias_ptr, nn_N)
                write(z_ptr, at_M, nn_N, within_M, z_MN)
                y_MN = x_MN + bias_N[None, :]
            else:
                y_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + bias_N[None, :]
            y_MN = dot(hidden_MH, up_HN, y_MN, UPCAST)
            write(y_ptr, at_M, nn_N, within_M, y_MN)
    else:
        if NORM:
            for k0 in range(0, D, BLOCK_K):
                kk_K = k0 + tl.arange(0, BLOCK_K)
                x_MK = read(x_ptr, at_M, kk_K, within_M).to(tl.float32)
                mean_M, spread_M = _moments(x_MK, mean_M, spread_M, k0, BLOCK_K)
            rstd_M = tl.rsqrt(spread_M / D + eps)
        for n0 in range(0, D // SPLIT, BLOCK_N):
            nn_N = first + n0 + tl.arange(0, BLOCK_N)
            y_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            if NORM:
                x_MN = read(x_ptr, at_M, nn_N, within_M).to(tl.float32)
                z_MN = _normalise(x_MN, mean_M, rstd_M, norm_weight_ptr, norm_bias_ptr, nn_N)
                write(z_ptr, at_M, nn_N, within_M, z_MN)
                y_MN = x_MN + tl.load(out_bias_ptr + nn_N).to(tl.float32)[None, :]
            write(y_ptr, at_M, nn_N, within_M, y_MN)


@dataclass(frozen=True, kw_only=True)
class Router:
    """What a row is routed by, as `expert_mixing` takes it."""

    paths_B: Tensor
    routers_PDE: Tensor
    top_k_P: Tensor
    scale_P: Tensor


@dataclass(frozen=True, kw_only=True)
class Norm:
    """The MLP's side of `expert_mixing_norm`, and where its LayerNorm goes."""

    z_BLD: Tensor
    out_bias_D: Tensor
    weight_D: Tensor
    bias_D: Tensor
    eps: float


def prepare(
    x_BLD: Tensor,
    y_BLD: Tensor,
    *,
    weights_S2RD: Tensor,
    biases_SF: Tensor,
    slots: Tensor,
    max_top_k: int,
    router: Router | None = None,
    gates_BK: Tensor | None = None,
    keep_BLH: Tensor | None = None,
    norm: Norm | None = None,
    relu: bool = True,
    launch: Launch | None = None,
) -> Call:
    """Prepare the launch that writes y (with `norm` r, and z).

    Args:
        x_BLD: read; y_BLD: written, not the memory of x.
        weights_S2RD: slot pool; biases_SF likewise.
        slots: with `router` slots_PE, the slot of each path's e-th expert; otherwise slots_BK.
        max_top_k: K.
        router: how to choose slots and gates; otherwise `gates_BK` says.
        keep_BLH: a dropout mask, or None.
        norm: for the (r, z) form, or None.
        relu: False for linear experts.
        launch: how to cut it up; without it the table chooses.
    """
    B, L, D = x_BLD.shape
    S, _, R, _ = weights_S2RD.shape
    E = slots.shape[1] if router else 1
    if launch is None:
        launch = find(
            B,
            L,
            hidden=max_top_k * R,
            itemsize=x_BLD.element_size(),
            keep=keep_BLH is not None,
        )
    launch = launch.fit(D)
    return Call(
        kernel=kernel,
        grid=(B * triton.cdiv(L, launch.block_m) * launch.split,),
        arguments={
            "x_ptr": x_BLD,
            "y_ptr": y_BLD,
            "z_ptr": norm.z_BLD if norm else None,
            "slots_ptr": slots,
            "gates_ptr": gates_BK,
            "paths_ptr": router.paths_B if router else None,
            "routers_ptr": router.routers_PDE if router else None,
            "top_k_ptr": router.top_k_P if router else None,
            "scale_ptr": router.scale_P if router else None,
            "weights_ptr": weights_S2RD,
            "biases_ptr": biases_SF,
            "keep_ptr": keep_BLH,
            "out_bias_ptr": norm.out_bias_D if norm else None,
            "norm_weight_ptr": norm.weight_D if norm else None,
            "norm_bias_ptr": norm.bias_D if norm else None,
            "L": L,
            "P": len(slots) if router else 0,
            "S": S,
            "eps": norm.eps if norm else 0.0,
        },
        constants={
            "D": D,
            "R": R,
            "K": max_top_k,
            "E": E,
            "H_PAD": max(16, triton.next_power_of_2(max_top_k * R)),
            "K_PAD": triton.next_power_of_2(max_top_k),
            "E_PAD": triton.next_power_of_2(max(E, 1)),
            "ROUTER": router is not None,
            "NORM": norm is not None,
            "RELU": relu,
            "KEEP": keep_BLH is not None,
            "UPCAST": upcast(x_BLD),
            "BLOCK_M": launch.block_m,
            "BLOCK_K": launch.block_k,
            "BLOCK_N": launch.block_n,
            "BLOCK_ROUTER": launch.block_k,
            "SPLIT": launch.split,
        },
        launch=launch,
    )


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
    """Launch what `reference.mix` defines; a slot out of range adds nothing."""
    y_BLD = torch.empty_like(x_BLD)
    prepare(
        x_BLD,
        y_BLD,
        weights_S2RD=weights_S2RD,
        biases_SF=biases_SF,
        slots=slots_BK,
        gates_BK=gates_BK,
        keep_BLH=keep_BLH,
        max_top_k=slots_BK.shape[1],
        relu=relu,
    ).run()
    return y_BLD


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
    """Launch what `reference.expert_mixing` defines; a path or slot out of range is none."""
    y_BLD = torch.empty_like(x_BLD)
    prepare(
        x_BLD,
        y_BLD,
        weights_S2RD=weights_S2RD,
        biases_SF=biases_SF,
        slots=slots_PE,
        router=Router(paths_B=paths_B, routers_PDE=routers_PDE, top_k_P=top_k_P, scale_P=scale_P),
        max_top_k=max_top_k,
    ).run()
    return y_BLD


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
    """Launch what `reference.expert_mixing_norm` defines; a path or slot out of range is none."""
    r_BLD, z_BLD = torch.empty_like(x_BLD), torch.empty_like(x_BLD)
    prepare(
        x_BLD,
        r_BLD,
        weights_S2RD=weights_S2RD,
        biases_SF=biases_SF,
        slots=slots_PE,
        router=Router(paths_B=paths_B, routers_PDE=routers_PDE, top_k_P=top_k_P, scale_P=scale_P),
        norm=Norm(
            z_BLD=z_BLD,
            out_bias_D=out_bias_D,
            weight_D=norm_weight_D,
            bias_D=norm_bias_D,
            eps=eps,
        ),
        max_top_k=max_top_k,
    ).run()
    return r_BLD, z_BLD
