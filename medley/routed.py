"""The routed model: one frozen backbone whose every row follows a path of its own.

A path is zero-shot or one task version; it is an argument of each call, never a state. Experts join
the residual stream of the blocks from `first_expert_block` on:

    x <- x + attention(ln_1(x));    x <- x + mlp(ln_2(x)) + mixing(x)

Blocks before it are the same for every path and run once. A zero-shot row adds an exact zero and so
stays what the backbone computes without experts, bit for bit at equal batch size; with precision
"exact" that is what open_clip computes.

Legend: B rows, N prompts, L tokens, D width, E joint embedding width, F width of a tap.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from medley.backbone import Backbone
from medley.errors import BackboneError, CapacityError
from medley.experts import TaskExperts
from medley.extractor import Extractor
from medley.fused import ImagePass, Mixing, exact_pass, fast_pass
from medley.pool import Capacity, ExpertPool, PackedExperts
from medley.precision import Precision, dtype_of
from medley.routed_text import RoutedText

__all__ = ["ZERO_SHOT", "Frozen", "PackedTask", "RoutedModel"]

ZERO_SHOT = -1


@dataclass(frozen=True)
class Frozen:
    """What the untouched backbone says about a batch, whatever paths its images take.

    After all blocks the hidden state may be that of token 0 alone.
    """

    hidden_BLD: Tensor  # after `depth` blocks: expert paths set out from here
    taps: dict[str, Tensor]  # pooled features by name, float32 (B, F)
    features_BE: Tensor | None  # zero-shot image features, if the pass went through all blocks
    depth: int  # first_expert_block as it was

    def rows(self, index_R: Tensor) -> Frozen:
        """What it says about some of the rows, in the order of the index; one may come twice."""
        taps = {tap: features_BF[index_R] for tap, features_BF in self.taps.items()}
        features_BE = None if self.features_BE is None else self.features_BE[index_R]
        return Frozen(self.hidden_BLD[index_R], taps, features_BE, self.depth)


@dataclass(frozen=True)
class PackedTask:
    """A task version's experts as the pools of one model take them."""

    vision: PackedExperts
    text: PackedExperts | None

    @property
    def size_bytes(self) -> int:
        """What they take on the host."""
        return self.vision.size_bytes + (self.text.size_bytes if self.text else 0)


class RoutedModel:
    """A backbone with slots for experts. Not thread-safe: one thread runs it and loads into it.

    Args:
        backbone: stays as it is; another precision than "exact" copies its image tower.
        precision: how the image tower and its experts compute.
        first_expert_block: no path may have image experts before it. None: the first block in which
            a loaded path has any, so that the shared trunk is as deep as the tasks allow.
        capacity: the slots.
        extractors: networks whose features selectors may look at beside the backbone's own.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        precision: Precision = "exact",
        first_expert_block: int | None = 0,
        capacity: Capacity | None = None,
        extractors: Sequence[Extractor] = (),
    ) -> None:
        blocks = len(backbone.image.blocks)
        if first_expert_block is not None and not 0 <= first_expert_block <= blocks:
            raise BackboneError(
                f"first_expert_block {first_expert_block} is not within 0..{blocks} "
                f"of {backbone.name}"
            )
        self.backbone = backbone
        self.precision = precision
        self.capacity = capacity or Capacity()
        self.extractors = {extractor.tap: extractor for extractor in extractors}
        self._image = _image_pass(backbone, precision)
        self._vision = self._pool(blocks, backbone.image.width, dtype_of(precision))
        text = backbone.text
        self._text: RoutedText | None = None
        if text is not None:
            self._text = RoutedText(text, self._pool(len(text.blocks), text.width))
        self._free_paths = list(reversed(range(self.capacity.paths)))
        self._fixed_first = first_expert_block
        self._firsts: dict[int, int] = {}  # path -> its first image block with experts

    @property
    def first_expert_block(self) -> int:
        """How many blocks of the image tower are the same for every loaded path."""
        if self._fixed_first is not None:
            return self._fixed_first
        return min(self._firsts.values(), default=len(self._image.steps))

    @property
    def paths(self) -> frozenset[int]:
        """The paths that are loaded."""
        return frozenset(self._firsts)

    @property
    def free_slots(self) -> int:
        """Free expert slots of the fullest block of either tower."""
        pools = [self._vision] + ([self._text.pool] if self._text else [])
        return min(pool.free_slots for pool in pools)

    def pack(self, experts: TaskExperts) -> PackedTask:
        """Do what loading a task version takes on the host; any thread may.

        Raises:
            CapacityError: it has more experts, ranks or top-k than there is room for.
            BackboneError: text experts for a text tower that takes none, or experts before
                `first_expert_block`.
            ValueError: experts of other shapes than these towers have.
        """
        self._check(experts)
        top_k, scale = experts.top_k, experts.scale
        vision, text = self._vision.pack(experts.vision, top_k=top_k, scale=scale), None
        if experts.text:
            assert self._text is not None
            text = self._text.pool.pack(experts.text, top_k=top_k, scale=scale)
        return PackedTask(vision, text)

    def has_room(self, task: PackedTask, without: Collection[int] = ()) -> bool:
        """Whether `load` would find room, were the paths `without` gone."""
        if not self._free_paths and self.paths.isdisjoint(without):
            return False
        text = (
            self._text is None or task.text is None or self._text.pool.has_room(task.text, without)
        )
        return text and self._vision.has_room(task.vision, without)

    def load(self, task: TaskExperts | PackedTask) -> int:
        """Load a task version into free slots; one that is packed asks little of this thread.

        Returns:
            its path, >= 0.

        Raises:
            CapacityError: no free path, or too few free slots; nothing has changed.
            BackboneError, ValueError: as for `pack`.
        """
        if not self._free_paths:
            raise CapacityError(f"all {self.capacity.paths} paths are taken")
        packed = self.pack(task) if isinstance(task, TaskExperts) else task
        path = self._free_paths[-1]
        self._vision.load(path, packed.vision)
        if packed.text is not None:
            assert self._text is not None
            try:
                self._text.load(path, packed.text)
            except CapacityError:
                self._vision.unload(path)
                raise
        self._firsts[path] = min(packed.vision.blocks, default=len(self._image.steps))
        return self._free_paths.pop()

    def unload(self, path: int) -> None:
        """Free a path and the slots that no other path shares."""
        self._vision.unload(path)
        if self._text is not None and path in self._text:
            self._text.unload(path)
        del self._firsts[path]
        self._free_paths.append(path)

    def encode_image(self, images_BCHW: Tensor, paths_B: Tensor) -> Tensor:
        """Encode normalised images, each by its own path; un-normalised features (B, E)."""
        return self.finish(self.frozen(images_BCHW), paths_B)

    def encode_text(self, tokens_NL: Tensor, path: int = ZERO_SHOT) -> Tensor:
        """Encode token ids by one path's text experts; un-normalised features (N, E).

        In a causal tower no router runs: what a path's router says is the same for every prompt.
        """
        if self._text is None or path not in self._text:
            return self.backbone.model.encode_text(tokens_NL)
        return self._text.encode(tokens_NL, path)

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
        image, last = self._image, len(self._image.steps)
        depth_of = {tap: self._depth(tap) for tap in taps}
        whole = features or "embedding" in taps
        depth = last if whole else max([self.first_expert_block, *depth_of.values()])
        patches_BLD = image.stem(images_BCHW)
        found = {t: _pooled(patches_BLD, t) for t in taps if t.startswith("stem:")}
        found |= {t: self.extractors[t](images_BCHW) for t in taps if t in self.extractors}
        x_BLD = hidden_BLD = image.embed(patches_BLD)
        for index in range(depth):
            before_BLD, x_BLD = x_BLD, image.steps[index](x_BLD, None)
            if index + 1 == self.first_expert_block:
                hidden_BLD = x_BLD
            for tap in (t for t, n in depth_of.items() if n == index + 1):
                found[tap] = _pooled(self._all_tokens(index, before_BLD, x_BLD, tap), tap)
        features_BE = image.pool(x_BLD) if depth == last else None
        if features_BE is not None and "embedding" in taps:
            found["embedding"] = F.normalize(features_BE.float(), dim=-1)
        return Frozen(hidden_BLD, found, features_BE, self.first_expert_block)

    def finish(self, frozen: Frozen, paths_B: Tensor | None) -> Tensor:
        """Go on from `frozen` to un-normalised features (B, E), each row by its own path.

        Args:
            frozen: of this model; no path that was loaded since has experts in its trunk.
            paths_B: int64, -1 for zero-shot. None: all are, and no expert operation runs.
        """
        assert paths_B is None or frozen.depth <= self.first_expert_block
        x_BLD = frozen.hidden_BLD
        for index in range(frozen.depth, len(self._image.steps)):
            mixing = None if paths_B is None else Mixing(self._vision, index, paths_B)
            x_BLD = self._image.steps[index](x_BLD, mixing)
        return self._image.pool(x_BLD)

    def _all_tokens(self, index: int, before_BLD: Tensor, after_BLD: Tensor, tap: str) -> Tensor:
        """What a tap after a block pools: where the last step skips tokens, run it for all."""
        whole_last = self._image.whole_last
        if whole_last is None or index + 1 < len(self._image.steps) or tap.endswith(":cls"):
            return after_BLD
        return whole_last(before_BLD, None)

    def _pool(self, blocks: int, width: int, dtype: torch.dtype = torch.float32) -> ExpertPool:
        return ExpertPool(
            blocks=blocks,
            width=width,
            capacity=self.capacity,
            device=self.backbone.device,
            dtype=dtype,
        )

    def _check(self, experts: TaskExperts) -> None:
        if experts.text and self._text is None:
            raise BackboneError(f"the text tower of {self.backbone.name} takes no experts")
        early = [block for block in experts.vision if block < (self._fixed_first or 0)]
        if early:
            raise BackboneError(
                f"experts in image blocks {early}, but this model's trunk ends at block "
                f"{self._fixed_first}"
            )

    def _depth(self, tap: str) -> int:
        place, _, _ = tap.partition(":")
        blocks = len(self.backbone.image.blocks)
        if place in ("stem", "embedding") or tap in self.extractors:
            return 0
        if place.startswith("block") and place[5:].isdigit() and 0 < int(place[5:]) <= blocks:
            return int(place[5:])
        raise BackboneError(f"{self.backbone.name} with {blocks} blocks has no feature {tap!r}")


def _image_pass(backbone: Backbone, precision: Precision) -> ImagePass:
    if precision == "exact":
        return exact_pass(backbone.image)
    return fast_pass(backbone.model.visual, dtype_of(precision))


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
