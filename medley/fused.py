"""The image tower as it is run: by the library's own modules, or in a fast form near them.

The fast form of an open_clip block is its raw weights and few operations: LayerScale, the softmax
scale and the constant of QuickGELU are folded into the weights, the experts and the MLP share one
pass over the residual stream, and the last block computes token 0 only where nothing else is
pooled. Blocks of other libraries stay the modules they are, in the dtype asked for.

Legend: B rows, L tokens, D width, M hidden width of the MLP, H heads, E joint embedding width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from open_clip.transformer import (
    LayerScale,
    QuickGELU,
    ResidualAttentionBlock,
    VisionTransformer,
)
from torch import Tensor, nn
from torch.nn import functional as F

from medley.low_rank import Layer, LowRankRows
from medley.mini import Stem
from medley.pool import ExpertPool
from medley.precision import Precision, dtype_of
from medley.tower import Beside, Block, ImageTower, OpenClipBlock, image_tower

__all__ = [
    "FusedBlock",
    "ImagePass",
    "Mixing",
    "Step",
    "exact_pass",
    "fast_pass",
    "image_pass",
]

QUICK = 1.702  # QuickGELU is x * sigmoid(1.702 x)
# Above it, torch's fused attention in bfloat16 on a CPU takes twice the time of plain products
# (batch 8, 197 tokens, 12 heads: 7.7 and 4.0 ms), below it half of it (2 cores, 2026-11).
LONG = 128  # tokens


@dataclass(frozen=True)
class Mixing:
    """What the paths of one batch add to one block; None where no row can have any of a kind."""

    block: int
    paths_B: Tensor
    experts: ExpertPool | None
    low_rank: LowRankRows | None

    def to(self, out_BLD: Tensor, x_BLD: Tensor) -> Tensor:
        """Return a block's output with what the experts make of x added, (B, L, D)."""
        if self.experts is None:
            return out_BLD
        return out_BLD + self.experts.mixing(self.block, x_BLD, self.paths_B)

    def around(
        self, x_BLD: Tensor, out_bias_D: Tensor, norm: tuple[Tensor, Tensor], eps: float
    ) -> tuple[Tensor, Tensor]:
        """Return x with the experts and a bias added, and the LayerNorm of x; both (B, L, D)."""
        assert self.experts is not None
        pool, block = self.experts, self.block
        return pool.mixing_norm(block, x_BLD, self.paths_B, out_bias_D, *norm, eps=eps)

    @property
    def beside(self) -> Beside | None:
        """What adds low-rank updates inside the MLP."""
        return None if self.low_rank is None else self.low_rank.beside(self.block)


class Step(Protocol):
    """One block as the tower runs it, alone or with what paths add."""

    @property
    def layers(self) -> tuple[Layer, Layer] | None:
        """The layers of its MLP that take low-rank updates, if they do."""

    def __call__(self, x_BLD: Tensor, mixing: Mixing | None) -> Tensor:
        """Return the residual stream after the block; without mixing nothing is added."""


@dataclass(frozen=True)
class LibraryStep:
    """A block by the library's own modules, in the library's order of operations."""

    block: Block

    @property
    def layers(self) -> tuple[Layer, Layer] | None:
        """See `Step`."""
        linears = self.block.linears
        if linears is None:
            return None
        fc, proj = linears
        return Layer(fc.in_features, fc.out_features), Layer(proj.in_features, proj.out_features)

    def __call__(self, x_BLD: Tensor, mixing: Mixing | None) -> Tensor:
        """See `Step`."""
        x_BLD = self.block.attend(x_BLD, None)
        if mixing is None:
            return x_BLD + self.block.mlp(x_BLD)
        return mixing.to(x_BLD + self.block.mlp(x_BLD, mixing.beside), x_BLD)


@dataclass(frozen=True, eq=False)
class FusedBlock:
    """open_clip's ResidualAttentionBlock as raw weights, all of one dtype."""

    heads: int
    qkv: tuple[Tensor, Tensor]  # weight (3 D, D) and bias; queries hold the softmax scale
    out: tuple[Tensor, Tensor]  # (D, D)
    fc: tuple[Tensor, Tensor]  # (M, D)
    proj: tuple[Tensor, Tensor]  # (D, M)
    norm_1: tuple[Tensor, Tensor]
    norm_2: tuple[Tensor, Tensor]
    eps: tuple[float, float]
    act: Callable[[Tensor], Tensor]
    layers: tuple[Layer, Layer]  # see `Step`
    token_0: bool = False  # compute and return token 0 only

    @staticmethod
    def of(block: ResidualAttentionBlock, dtype: torch.dtype) -> FusedBlock | None:
        """Fold a block's constants into its weights; None where it is not quite such a block."""
        if not _is_plain(block):
            return None
        attn, fc, proj = block.attn, block.mlp.c_fc, block.mlp.c_proj
        query_scale = attn.in_proj_weight.new_ones(3, attn.embed_dim)
        query_scale[0] = attn.head_dim**-0.5
        act, inner = _activation(block.mlp.gelu)
        gamma = _gamma(block.ls_2)
        outer = gamma / inner if isinstance(gamma, float) else gamma.detach().cpu() / inner

        def scaled(weight: Tensor, bias: Tensor, rows: Tensor | float) -> tuple[Tensor, Tensor]:
            rows = torch.as_tensor(rows, device=weight.device)
            folded = (weight * rows.reshape(-1, 1), bias * rows)
            return folded[0].detach().to(dtype), folded[1].detach().to(dtype)

        def norm(layer: nn.LayerNorm) -> tuple[Tensor, Tensor]:
            return layer.weight.detach().to(dtype), layer.bias.detach().to(dtype)

        return FusedBlock(
            heads=attn.num_heads,
            qkv=scaled(attn.in_proj_weight, attn.in_proj_bias, query_scale.flatten()),
            out=scaled(attn.out_proj.weight, attn.out_proj.bias, _gamma(block.ls_1)),
            fc=scaled(fc.weight, fc.bias, inner),
            proj=scaled(proj.weight / inner, proj.bias, gamma),
            norm_1=norm(block.ln_1),
            norm_2=norm(block.ln_2),
            eps=(block.ln_1.eps, block.ln_2.eps),
            act=act,
            layers=(
                Layer(fc.in_features, fc.out_features, inner),
                Layer(proj.in_features, proj.out_features, outer),
            ),
        )

    def __call__(self, x_BLD: Tensor, mixing: Mixing | None) -> Tensor:
        """See `Step`."""
        x_BLD = self._attend_0(x_BLD) if self.token_0 else self._attend(x_BLD)
        width, bias_D, eps = x_BLD.shape[-1], self.proj[1], self.eps[1]
        if mixing is None or mixing.experts is None:
            r_BLD = x_BLD + bias_D
            z_BLD = F.layer_norm(x_BLD, (width,), *self.norm_2, eps)
        else:
            r_BLD, z_BLD = mixing.around(x_BLD, bias_D, self.norm_2, eps)
        beside = None if mixing is None else mixing.beside
        hidden_BLM = F.linear(z_BLD, *self.fc)
        hidden_BLM = self.act(hidden_BLM if beside is None else beside(0, z_BLD, hidden_BLM))
        # In place: a product that adds up on r needs no pass of its own for the residual.
        r_BLD.view(-1, width).addmm_(hidden_BLM.flatten(0, 1), self.proj[0].mT)
        return r_BLD if beside is None else beside(1, hidden_BLM, r_BLD)

    def _attend(self, x_BLD: Tensor) -> Tensor:
        z_BLD = F.layer_norm(x_BLD, x_BLD.shape[-1:], *self.norm_1, self.eps[0])
        q_BLD, k_BLD, v_BLD = F.linear(z_BLD, *self.qkv).chunk(3, dim=-1)
        return F.linear(self._attention(q_BLD, k_BLD, v_BLD), *self.out).add_(x_BLD)

    def _attend_0(self, x_BLD: Tensor) -> Tensor:
        width = x_BLD.shape[-1]
        z_BLD = F.layer_norm(x_BLD, (width,), *self.norm_1, self.eps[0])
        weight, bias = self.qkv
        q_B1D = F.linear(z_BLD[:, :1], weight[:width], bias[:width])
        k_BLD, v_BLD = F.linear(z_BLD, weight[width:], bias[width:]).chunk(2, dim=-1)
        attended_B1D = self._attention(q_B1D, k_BLD, v_BLD)
        return F.linear(attended_B1D, *self.out).add_(x_BLD[:, :1])

    def _attention(self, q_BLD: Tensor, k_BLD: Tensor, v_BLD: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q_BLD, k_BLD, v_BLD))
        long = q.shape[2] > LONG
        if long and q.dtype == torch.bfloat16 and q.device.type == "cpu":
            mixed = (q @ k.mT).softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return mixed.transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class ImagePass:
    """How one precision runs an image tower."""

    stem: Callable[[Tensor], Tensor]  # images (B, 3, H, W), float32 -> patch tokens (B, L, D)
    embed: Callable[[Tensor], Tensor]  # patch tokens -> input of the first step
    steps: tuple[Step, ...]
    pool: Callable[[Tensor], Tensor]  # output of the last step -> features (B, E)
    whole_last: Step | None = None  # the last block for all tokens, where its step skips some

    def finish(
        self, x_BLD: Tensor, depth: int, mixing: Callable[[int], Mixing | None] = lambda _: None
    ) -> Tensor:
        """Go on after `depth` blocks to features (B, E), with what `mixing` says of each block."""
        for index in range(depth, len(self.steps)):
            x_BLD = self.steps[index](x_BLD, mixing(index))
        return self.pool(x_BLD)


def image_pass(tower: ImageTower, visual: nn.Module, precision: Precision) -> ImagePass:
    """Run an image tower, which is made of the module `visual`, in a precision."""
    if precision == "exact":
        return exact_pass(tower)
    return fast_pass(visual, dtype_of(precision))


def exact_pass(tower: ImageTower) -> ImagePass:
    """Run a tower as the library does, bit for bit."""
    return ImagePass(tower.stem, tower.embed, tuple(map(LibraryStep, tower.blocks)), tower.pool)


@torch.no_grad()
def fast_pass(visual: nn.Module, dtype: torch.dtype) -> ImagePass:
    """Copy an image tower's weights to a dtype, in the fastest form that its blocks have.

    Args:
        visual: an open_clip image tower, float32; stays as it is.
        dtype: float32 or bfloat16.
    """
    original, copied = image_tower(visual), copy.deepcopy(visual).to(dtype)
    tower, stem_dtype = image_tower(copied), dtype
    if isinstance(visual, VisionTransformer) and isinstance(visual.conv1, Stem):
        # In bfloat16 its fifty convolutions err by 5 %, 13 times as much as all the rest, and take
        # half the time (batch 8).
        copied.conv1, stem_dtype = visual.conv1.folded(), torch.float32
    blocks = zip(original.blocks, tower.blocks, strict=True)
    steps = tuple(_step(block, copied_block, dtype) for block, copied_block in blocks)
    if all(isinstance(step, FusedBlock) for step in steps):
        copied.transformer = nn.Identity()  # not run any more: its memory is free
    last, whole_last = steps[-1], None
    if tower.pools_token_0 and isinstance(last, FusedBlock):
        steps, whole_last = (*steps[:-1], replace(last, token_0=True)), last

    return ImagePass(
        stem=lambda images_BCHW: tower.stem(images_BCHW.to(stem_dtype)),
        embed=lambda patches_BLD: tower.embed(patches_BLD.to(dtype)),
        steps=steps,
        pool=_float_pool(visual, original) or tower.pool,
        whole_last=whole_last,
    )


def _step(block: Block, copied: Block, dtype: torch.dtype) -> Step:
    fused = FusedBlock.of(block.block, dtype) if isinstance(block, OpenClipBlock) else None
    return fused or LibraryStep(copied)


def _float_pool(visual: nn.Module, tower: ImageTower) -> Callable[[Tensor], Tensor] | None:
    """The library's own pooling in float32, where that is no more than a norm and a projection."""
    if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None:
        return None
    return lambda x_BLD: tower.pool(x_BLD.float())


def _is_plain(block: ResidualAttentionBlock) -> bool:
    """Whether the block is made of the modules that open_clip usually makes it of."""
    return (
        type(block.attn) is nn.MultiheadAttention
        and all(isinstance(norm, nn.LayerNorm) for norm in (block.ln_1, block.ln_2))
        and all(type(linear) is nn.Linear for linear in (block.mlp.c_fc, block.mlp.c_proj))
        and isinstance(block.mlp.gelu, nn.GELU | QuickGELU)
    )


def _gamma(scale: nn.Module) -> Tensor | float:
    return scale.gamma if isinstance(scale, LayerScale) else 1.0


def _activation(layer: nn.Module) -> tuple[Callable[[Tensor], Tensor], float]:
    """Return an activation and the c for which layer(x) = act(c x) / c."""
    if isinstance(layer, QuickGELU):
        return F.silu, QUICK
    assert isinstance(layer, nn.GELU)
    approximate = layer.approximate
    return lambda x: F.gelu(x, approximate=approximate), 1.0
