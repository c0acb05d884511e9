"""A CLIP tower taken apart into embed, blocks and pool, computing exactly what it did whole.

Experts sit inside the blocks, so the routed model has to walk them itself. The modules stay the
library's own; only the few lines between them are written here, in the library's order of
operations, so that the result is equal bit for bit (tests compare with `encode_image` and
`encode_text`). What cannot be taken apart is refused with a `BackboneError`.

Legend: B rows, L tokens, D width, E joint embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from open_clip.model import CLIP
from open_clip.timm_model import TimmModel
from open_clip.transformer import (
    CustomResidualAttentionBlock,
    ResidualAttentionBlock,
    TextTransformer,
    VisionTransformer,
    text_global_pool,
)
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from medley.errors import BackboneError

__all__ = ["Beside", "Block", "ImageTower", "TextTower", "image_tower", "text_tower"]

Mask = Tensor | None
# Which of the MLP's linear layers (0 or 1), its input, its output -> the output to go on with. The
# output is nobody else's: it may be written into.
Beside = Callable[[int, Tensor, Tensor], Tensor]
Linears = tuple[nn.Linear, nn.Linear]


class Block(Protocol):
    """One residual block in its two halves."""

    @property
    def block(self) -> Any:
        """The library's module."""

    @property
    def linears(self) -> Linears | None:
        """The two linear layers that the MLP consists of; None where it is made otherwise."""

    def attend(self, x_BLD: Tensor, mask: Mask) -> Tensor:
        """Return the residual stream after attention, (B, L, D)."""

    def mlp(self, x_BLD: Tensor, beside: Beside | None = None) -> Tensor:
        """Return what the MLP adds to the residual stream, (B, L, D).

        Args:
            x_BLD: the residual stream after attention.
            beside: what goes on beside the two linear layers, only where there are `linears`.
        """


@dataclass(frozen=True)
class OpenClipBlock:
    """open_clip's ResidualAttentionBlock."""

    block: ResidualAttentionBlock

    @property
    def linears(self) -> Linears | None:
        """See `Block`."""
        return _linears(self.block.mlp)

    def attend(self, x_BLD: Tensor, mask: Mask) -> Tensor:
        """See `Block`."""
        block = self.block
        return x_BLD + block.ls_1(block.attention(q_x=block.ln_1(x_BLD), attn_mask=mask))

    def mlp(self, x_BLD: Tensor, beside: Beside | None = None) -> Tensor:
        """See `Block`."""
        block = self.block
        return block.ls_2(_mlp(block.mlp, block.ln_2(x_BLD), beside))


@dataclass(frozen=True)
class CustomOpenClipBlock:
    """open_clip's CustomResidualAttentionBlock (QK-norm, scaled heads and the like)."""

    block: CustomResidualAttentionBlock

    @property
    def linears(self) -> Linears | None:
        """See `Block`."""
        return _linears(self.block.mlp)

    def attend(self, x_BLD: Tensor, mask: Mask) -> Tensor:
        """See `Block`."""
        block = self.block
        attended = block.ln_attn(block.attn(block.ln_1(x_BLD), attn_mask=mask))
        return x_BLD + block.ls_1(attended)

    def mlp(self, x_BLD: Tensor, beside: Beside | None = None) -> Tensor:
        """See `Block`."""
        block = self.block
        return block.ls_2(_mlp(block.mlp, block.ln_2(x_BLD), beside))


@dataclass(frozen=True)
class TimmBlock:
    """timm's vision transformer Block (SigLIP and others); it takes no mask."""

    block: Any

    @property
    def linears(self) -> Linears | None:
        """See `Block`."""
        return _linears(self.block.mlp) if type(self.block.mlp) is Mlp else None

    def attend(self, x_BLD: Tensor, mask: Mask) -> Tensor:
        """See `Block`."""
        block = self.block
        return x_BLD + block.drop_path1(block.ls1(block.attn(block.norm1(x_BLD))))

    def mlp(self, x_BLD: Tensor, beside: Beside | None = None) -> Tensor:
        """See `Block`."""
        block = self.block
        return block.drop_path2(block.ls2(_mlp(block.mlp, block.norm2(x_BLD), beside)))


@dataclass(frozen=True)
class ImageTower:
    """An image tower in parts; width is D, output is the un-normalised feature (B, E)."""

    stem: Callable[[Tensor], Tensor]  # images (B, 3, H, W) -> patch tokens (B, L, D)
    embed: Callable[[Tensor], Tensor]  # patch tokens -> input of the first block
    blocks: tuple[Block, ...]
    pool: Callable[[Tensor], Tensor]  # output of the last block -> features (B, E)
    width: int
    behind: tuple[str, ...]  # names, in the tower's module, of all that comes after the blocks
    pools_token_0: bool = False  # the features depend on no other token of the last block


@dataclass(frozen=True)
class TextTower:
    """A text tower in parts; `embed` also answers the attention mask of its blocks.

    Where it is causal, token 0 sees only itself, so a router that reads it says the same for every
    prompt, and positions after the end of the text may be left out.
    """

    embed: Callable[[Tensor], tuple[Tensor, Mask]]  # token ids (B, L) -> (B, L, D), mask
    blocks: tuple[Block, ...]
    pool: Callable[[Tensor, Tensor], Tensor]  # output of the last block, token ids -> features
    width: int
    causal: bool


def image_tower(visual: nn.Module) -> ImageTower:
    """Take an open_clip image tower apart.

    Raises:
        BackboneError: if it is neither open_clip's VisionTransformer nor a timm vision transformer
            with plain blocks.
    """
    if isinstance(visual, VisionTransformer):
        return _open_clip_image_tower(visual)
    if isinstance(visual, TimmModel):
        return _timm_image_tower(visual)
    raise BackboneError(
        f"image tower {type(visual).__name__} is not a vision transformer; experts need its blocks"
    )


def text_tower(model: Any) -> TextTower | None:
    """Take the text tower of an open_clip model apart; None where experts cannot enter it."""
    if isinstance(model, CLIP):
        return _clip_text_tower(model)
    if isinstance(model.text, TextTransformer) and model.text.cls_emb is None:
        return _text_transformer_tower(model.text)
    return None


def _open_clip_image_tower(visual: VisionTransformer) -> ImageTower:
    def stem(images_BCHW: Tensor) -> Tensor:
        x = visual.conv1(images_BCHW)
        return x.reshape(x.shape[0], x.shape[1], -1).permute(0, 2, 1)

    def embed(patches_BLD: Tensor) -> Tensor:
        token = visual.class_embedding.view(1, 1, -1).expand(patches_BLD.shape[0], -1, -1)
        x = torch.cat([token.to(patches_BLD.dtype), patches_BLD], dim=1)
        x = visual.patch_dropout(x + visual.positional_embedding.to(x.dtype))
        return visual.ln_pre(x)

    def pool(x_BLD: Tensor) -> Tensor:
        pooled, _ = visual._pool(x_BLD)
        return pooled if visual.proj is None else pooled @ visual.proj

    blocks = tuple(_open_clip_block(b) for b in visual.transformer.resblocks)
    token_0 = visual.attn_pool is None and visual.pool_type == "tok"
    behind = ("ln_post", "attn_pool", "proj")
    return ImageTower(stem, embed, blocks, pool, visual.transformer.width, behind, token_0)


def _timm_image_tower(visual: TimmModel) -> ImageTower:
    trunk = visual.trunk
    needed = ("patch_embed", "_pos_embed", "norm_pre", "blocks", "norm", "forward_head")
    missing = [name for name in needed if not hasattr(trunk, name)]
    halves = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
    missing += [n for n in halves if not missing and not hasattr(trunk.blocks[0], n)]
    if missing:
        raise BackboneError(
            f"timm tower {type(trunk).__name__} lacks {', '.join(missing)}; "
            "its blocks cannot take experts"
        )

    def embed(patches_BLD: Tensor) -> Tensor:
        return trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(patches_BLD)))

    def pool(x_BLD: Tensor) -> Tensor:
        return visual.head(trunk.forward_head(trunk.norm(x_BLD)))

    blocks = tuple(TimmBlock(b) for b in trunk.blocks)
    behind = ("trunk.norm", "trunk.attn_pool", "trunk.fc_norm", "trunk.head", "head")
    return ImageTower(trunk.patch_embed, embed, blocks, pool, trunk.embed_dim, behind)


def _clip_text_tower(model: CLIP) -> TextTower:
    def embed(tokens_BL: Tensor) -> tuple[Tensor, Mask]:
        dtype = model.transformer.get_cast_dtype()
        x = model.token_embedding(tokens_BL).to(dtype)
        length = tokens_BL.shape[1]
        mask = model.attn_mask[:length, :length]
        return x + model.positional_embedding[:length].to(dtype), mask

    def pool(x_BLD: Tensor, tokens_BL: Tensor) -> Tensor:
        pooled = text_global_pool(
            model.ln_final(x_BLD), tokens_BL, model.text_pool_type, model.text_eos_id
        )
        return _project(pooled, model.text_projection)

    blocks = tuple(_open_clip_block(b) for b in model.transformer.resblocks)
    return TextTower(embed, blocks, pool, model.transformer.width, causal=True)


def _text_transformer_tower(text: TextTransformer) -> TextTower:
    def pool(x_BLD: Tensor, tokens_BL: Tensor) -> Tensor:
        pooled = text_global_pool(text.ln_final(x_BLD), tokens_BL, text.pool_type, text.eos_id)
        return _project(pooled, text.text_projection)

    def embed(tokens_BL: Tensor) -> tuple[Tensor, Mask]:
        x, mask = text._embeds(tokens_BL)
        length = tokens_BL.shape[1]
        return x, None if mask is None else mask[..., :length, :length]

    blocks = tuple(_open_clip_block(b) for b in text.transformer.resblocks)
    return TextTower(embed, blocks, pool, text.transformer.width, causal=text.attn_mask is not None)


def _open_clip_block(block: nn.Module) -> Block:
    if isinstance(block, ResidualAttentionBlock):
        return OpenClipBlock(block)
    if isinstance(block, CustomResidualAttentionBlock):
        return CustomOpenClipBlock(block)
    raise BackboneError(f"block {type(block).__name__} is unknown; experts cannot enter it")


def _project(pooled_BD: Tensor, projection: nn.Linear | Tensor | None) -> Tensor:
    if projection is None:
        return pooled_BD
    if isinstance(projection, nn.Linear):
        return projection(pooled_BD)
    return pooled_BD @ projection


def _linears(mlp: nn.Module) -> Linears | None:
    found = [layer for layer in mlp.children() if isinstance(layer, nn.Linear)]
    if len(found) != 2 or any(type(layer) is not nn.Linear for layer in found):
        return None
    return found[0], found[1]


def _mlp(mlp: nn.Module, x_BLD: Tensor, beside: Beside | None) -> Tensor:
    """Run an MLP, whose layers follow each other in the order in which it names them."""
    if beside is None:
        return mlp(x_BLD)
    count = 0
    for layer in mlp.children():
        y = layer(x_BLD)
        if isinstance(layer, nn.Linear):
            y, count = beside(count, x_BLD, y), count + 1
        x_BLD = y
    return x_BLD
