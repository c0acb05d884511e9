"""The routed model: one frozen backbone whose every row follows a path of its own.

A path is zero-shot or one task version; it is an argument of each call, never a state. Experts join
the residual stream of the blocks from `first_expert_block` on:

    x <- x + attention(ln_1(x));    x <- x + mlp(ln_2(x)) + mixing(x)

Blocks before it are the same for every path and run once. A zero-shot row adds an exact zero and so
stays what open_clip computes, bit for bit, at equal dtype and batch size.

Legend: B rows, N prompts, L tokens, D width, E joint embedding width, F width of a tap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from medley.backbone import Backbone
from medley.errors import BackboneError, CapacityError
from medley.experts import TaskExperts
from medley.extractor import Extractor
from medley.pool import Capacity, ExpertPool
from medley.tower import Block

__all__ = ["ZERO_SHOT", "Frozen", "RoutedModel"]

ZERO_SHOT = -1


@dataclass(frozen=True)
class Frozen:
    """What the untouched backbone says about a batch, whatever paths its images take."""

    hidden_BLD: Tensor  # after `depth` blocks: expert paths set out from here
    taps: dict[str, Tensor]  # pooled features by name, float32 (B, F)
    features_BE: Tensor | None  # zero-shot image features, if the pass went through all blocks
    depth: int  # first_expert_block as it was


class RoutedModel:
    """A backbone with slots for experts. Not thread-safe: one thread runs it and loads into it."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        first_expert_block: int = 0,
        capacity: Capacity | None = None,
        extractors: Sequence[Extractor] = (),
    ) -> None:
        blocks = len(backbone.image.blocks)
        if not 0 <= first_expert_block <= blocks:
            raise BackboneError(
                f"first_expert_block {first_expert_block} is not within 0..{blocks} "
                f"of {backbone.name}"
            )
        self.backbone = backbone
        self.first_expert_block = first_expert_block
        self.capacity = capacity or Capacity()
        self.extractors = {extractor.tap: extractor for extractor in extractors}
        self._vision = self._pool(blocks, backbone.image.width)
        text = backbone.text
        self._text = None if text is None else self._pool(len(text.blocks), text.width)
        self._free_paths = list(reversed(range(self.capacity.paths)))
        self._text_paths: set[int] = set()

    @property
    def paths(self) -> frozenset[int]:
        """The paths that are loaded."""
        return self._vision.paths

    def load(self, experts: TaskExperts) -> int:
        """Load a task version into free slots.

        Returns:
            its path, >= 0.

        Raises:
            CapacityError: no free path, or too few free slots; nothing has changed.
            BackboneError: text experts for a text tower that takes none, or experts before
                `first_expert_block`.
        """
        self._check(experts)
        path = self._free_paths[-1]
        self._vision.load(path, experts.vision, top_k=experts.top_k, scale=experts.scale)
        if experts.text:
            assert self._text is not None
            try:
                self._text.load(path, experts.text, top_k=experts.top_k, scale=experts.scale)
            except CapacityError:
                self._vision.unload(path)
                raise
            self._text_paths.add(path)
        return self._free_paths.pop()

    def unload(self, path: int) -> None:
        """Free a path and the slots that no other path shares."""
        self._vision.unload(path)
        if path in self._text_paths:
            assert self._text is not None
            self._text.unload(path)
            self._text_paths.remove(path)
        self._free_paths.append(path)

    def encode_image(self, images_BCHW: Tensor, paths_B: Tensor) -> Tensor:
        """Encode normalised images, each by its own path; un-normalised features (B, E)."""
        return self.finish(self.frozen(images_BCHW), paths_B)

    def encode_text(self, tokens_NL: Tensor, path: int = ZERO_SHOT) -> Tensor:
        """Encode token ids by one path's text experts; un-normalised features (N, E)."""
        text, pool = self.backbone.text, self._text
        if path not in self._text_paths or text is None or pool is None:
            return self.backbone.model.encode_text(tokens_NL)
        paths_N = torch.full((len(tokens_NL),), path, device=tokens_NL.device)
        x_NLD, mask = text.embed(tokens_NL)
        for index, block in enumerate(text.blocks):
            x_NLD = _routed_block(block, index, x_NLD, mask, pool, paths_N)
        return text.pool(x_NLD, tokens_NL)

    def frozen(
        self, images_BCHW: Tensor, *, taps: Sequence[str] = (), features: bool = False
    ) -> Frozen:
        """Run the untouched backbone as deep as is asked for, and at least to `first_expert_block`.

        Args:
            images_BCHW: normalised images.
            taps: features for DDAS: "stem:<pool>", "block<n>:<pool>" (after n blocks), "embedding";
                pools are mean, mean_std (2 D wide) and cls (token 0). Or those of `extractors`.
            features: whether the zero-shot features are wanted.

        Raises:
            BackboneError: if a tap's name means nothing in this backbone.
        """
        tower = self.backbone.image
        depth_of = {tap: self._depth(tap) for tap in taps}
        whole = features or "embedding" in taps
        depth = len(tower.blocks) if whole else max([self.first_expert_block, *depth_of.values()])
        patches_BLD = tower.stem(images_BCHW)
        found = {t: _pooled(patches_BLD, t) for t in taps if t.startswith("stem:")}
        found |= {t: self.extractors[t](images_BCHW) for t in taps if t in self.extractors}
        x_BLD = hidden_BLD = tower.embed(patches_BLD)
        for index in range(depth):
            x_BLD = _plain_block(tower.blocks[index], x_BLD)
            if index + 1 == self.first_expert_block:
                hidden_BLD = x_BLD
            found |= {t: _pooled(x_BLD, t) for t, n in depth_of.items() if n == index + 1}
        features_BE = tower.pool(x_BLD) if depth == len(tower.blocks) else None
        if features_BE is not None and "embedding" in taps:
            found["embedding"] = F.normalize(features_BE.float(), dim=-1)
        return Frozen(hidden_BLD, found, features_BE, self.first_expert_block)

    def finish(self, frozen: Frozen, paths_B: Tensor | None) -> Tensor:
        """Go on from `frozen` to un-normalised features (B, E), each row by its own path.

        Args:
            frozen: of this model.
            paths_B: int64, -1 for zero-shot. None: all are, and no expert operation runs.
        """
        tower, x_BLD = self.backbone.image, frozen.hidden_BLD
        for index in range(frozen.depth, len(tower.blocks)):
            block = tower.blocks[index]
            if paths_B is None:
                x_BLD = _plain_block(block, x_BLD)
            else:
                x_BLD = _routed_block(block, index, x_BLD, None, self._vision, paths_B)
        return tower.pool(x_BLD)

    def _pool(self, blocks: int, width: int) -> ExpertPool:
        return ExpertPool(
            blocks=blocks, width=width, capacity=self.capacity, device=self.backbone.device
        )

    def _check(self, experts: TaskExperts) -> None:
        if not self._free_paths:
            raise CapacityError(f"all {self.capacity.paths} paths are taken")
        if experts.text and self._text is None:
            raise BackboneError(f"the text tower of {self.backbone.name} takes no experts")
        early = [block for block in experts.vision if block < self.first_expert_block]
        if early:
            raise BackboneError(
                f"experts in image blocks {early}, but this model's trunk ends at block "
                f"{self.first_expert_block}"
            )

    def _depth(self, tap: str) -> int:
        place, _, _ = tap.partition(":")
        blocks = len(self.backbone.image.blocks)
        if place in ("stem", "embedding") or tap in self.extractors:
            return 0
        if place.startswith("block") and place[5:].isdigit() and 0 < int(place[5:]) <= blocks:
            return int(place[5:])
        raise BackboneError(f"{self.backbone.name} with {blocks} blocks has no feature {tap!r}")


def _plain_block(block: Block, x_BLD: Tensor) -> Tensor:
    x_BLD = block.attend(x_BLD, None)
    return x_BLD + block.mlp(x_BLD)


def _routed_block(
    block: Block, index: int, x_BLD: Tensor, mask: Tensor | None, pool: ExpertPool, paths_B: Tensor
) -> Tensor:
    x_BLD = block.attend(x_BLD, mask)
    return x_BLD + block.mlp(x_BLD) + pool.mixing(index, x_BLD, paths_B)


def _pooled(x_BLD: Tensor, tap: str) -> Tensor:
    x_BLD = x_BLD.float()
    pool = tap.partition(":")[2]
    if pool == "mean":
        return x_BLD.mean(1)
    if pool == "mean_std":
        return torch.cat([x_BLD.mean(1), x_BLD.std(1)], dim=-1)
    if pool == "cls":
        return x_BLD[:, 0]
    raise BackboneError(f"feature {tap!r}: pool {pool!r} is none of mean, mean_std, cls")
