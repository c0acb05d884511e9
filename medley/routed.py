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

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from medley.backbone import Backbone
from medley.errors import BackboneError, CapacityError
from medley.experts import BlockExperts, BlockLowRank, TaskExperts, TaskLowRank, TaskUpdate
from medley.extractor import Extractor
from medley.fused import LibraryStep, Mixing, Step, image_pass
from medley.low_rank import LowRankPool
from medley.pool import Capacity, ExpertPool
from medley.precision import Precision, dtype_of
from medley.routed_text import RoutedText
from medley.whole import WholeModels

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


class Packed(Protocol):
    """Some of a task version, on the host, as one store takes it."""

    @property
    def size_bytes(self) -> int:
        """What it takes on the host."""


class _Store(Protocol):
    """Where paths of one kind keep what they add to one tower, or to both."""

    @property
    def paths(self) -> frozenset[int]: ...
    def has_room(self, packed: Any, without: Collection[int] = ()) -> bool: ...
    def load(self, path: int, packed: Any) -> None: ...
    def unload(self, path: int) -> None: ...


@dataclass(frozen=True)
class PackedTask:
    """A task version in the form in which one model takes it."""

    parts: Mapping[str, Packed]  # by the name of the store
    first_block: int  # image blocks before it are the backbone's own

    @property
    def size_bytes(self) -> int:
        """What it takes on the host."""
        return sum(part.size_bytes for part in self.parts.values())


class RoutedModel:
    """A backbone with slots for what paths add. Not thread-safe: one thread runs and loads.

    Args:
        backbone: stays as it is; another precision than "exact" copies its image tower.
        precision: how the image tower and what is added to it compute.
        first_expert_block: no path may add anything to image blocks before it. None: the first
            block in which a loaded path does, so that the shared trunk is as deep as the tasks
            allow.
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
        self._image = image_pass(backbone.image, backbone.model.visual, precision)
        dtype, text = dtype_of(precision), backbone.text
        self._vision = self._pool(blocks, backbone.image.width, dtype)
        self._low_rank = self._low_rank_pool(self._image.steps, dtype)
        self._text: RoutedText | None = None
        if text is not None:
            low_rank = self._low_rank_pool([LibraryStep(block) for block in text.blocks])
            self._text = RoutedText(text, self._pool(len(text.blocks), text.width), low_rank)
        models = self.capacity.models
        self._whole = WholeModels(backbone, self._image, precision=precision, models=models)
        self._stores = self._named_stores()
        self._free_paths = list(reversed(range(self.capacity.paths)))
        self._fixed_first = first_expert_block
        self._firsts: dict[int, int] = {}  # path -> the first image block that is its own

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

    @property
    def free_low_rank_slots(self) -> int:
        """How many more tasks with low-rank updates there is room for."""
        pools = [self._low_rank, self._text.low_rank if self._text else None]
        return min((pool.free_slots for pool in pools if pool is not None), default=0)

    @property
    def free_models(self) -> int:
        """How many more tasks with weights of their own there is room for."""
        return self._whole.free_models

    @property
    def layout(self) -> Hashable:
        """What `finish` reads, beside tensors that stay where they are: as long as it is equal."""
        return self._low_rank is not None and self._low_rank.is_there, self._whole.numbers

    def pack(self, task: TaskUpdate) -> PackedTask:
        """Do what loading a task version takes on the host; any thread may.

        Raises:
            CapacityError: it has more experts, ranks or top-k than there is room for.
            BackboneError: it adds to a tower that takes no such thing, or to image blocks before
                `first_expert_block`.
            ValueError: tensors of other shapes than these towers have.
        """
        parts: dict[str, Packed]
        if isinstance(task, TaskExperts):
            parts, first = self._packed_experts(task), self._first(task.vision)
        elif isinstance(task, TaskLowRank):
            parts, first = self._packed_low_rank(task), self._first(task.vision)
        else:
            parts, first = {"weights": self._whole.pack(task)}, task.first_block
        if first < (self._fixed_first or 0):
            raise BackboneError(
                f"it adds to image block {first}, but the trunk of this model ends at block "
                f"{self._fixed_first}"
            )
        return PackedTask(parts, first)

    def has_room(self, task: PackedTask, without: Collection[int] = ()) -> bool:
        """Whether `load` would find room, were the paths `without` gone."""
        if not self._free_paths and self.paths.isdisjoint(without):
            return False
        return all(self._stores[name].has_room(part, without) for name, part in task.parts.items())

    def load(self, task: TaskUpdate | PackedTask) -> int:
        """Load a task version into free slots; one that is packed asks little of this thread.

        Returns:
            its path, >= 0.

        Raises:
            CapacityError: no free path, too few free slots, or the device's memory is at an end;
                nothing has changed.
            BackboneError, ValueError: as for `pack`.
        """
        if not self._free_paths:
            raise CapacityError(f"all {self.capacity.paths} paths are taken")
        packed = task if isinstance(task, PackedTask) else self.pack(task)
        path = self._free_paths[-1]
        try:
            for name, part in packed.parts.items():
                self._stores[name].load(path, part)
        except BaseException as error:
            self._clear(path)
            if isinstance(error, torch.OutOfMemoryError):
                raise CapacityError("the device has no memory left for it") from error
            raise
        self._firsts[path] = packed.first_block
        return self._free_paths.pop()

    def unload(self, path: int) -> None:
        """Free a path and the slots that no other path shares.

        Raises:
            ValueError: no such path is loaded.
        """
        if path not in self._firsts:
            raise ValueError(f"path {path} is not loaded")
        self._clear(path)
        del self._firsts[path]
        self._free_paths.append(path)

    def encode_image(self, images_BCHW: Tensor, paths_B: Tensor) -> Tensor:
        """Encode normalised images, each by its own path; un-normalised features (B, E)."""
        return self.finish(self.frozen(images_BCHW), paths_B)

    def encode_text(self, tokens_NL: Tensor, path: int = ZERO_SHOT) -> Tensor:
        """Encode token ids with what one path adds; un-normalised features (N, E).

        In a causal tower no router runs: what a path's router says is the same for every prompt.
        """
        if path in self._whole.paths:
            return self._whole.encode_text(tokens_NL, path)
        features_NE = None if self._text is None else self._text.encode(tokens_NL, path)
        return self.backbone.model.encode_text(tokens_NL) if features_NE is None else features_NE

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
        x_BLD, depth = frozen.hidden_BLD, frozen.depth
        if paths_B is None:
            return self._image.finish(x_BLD, depth)
        assert depth <= self.first_expert_block
        features_BE = None
        takers = list(self._whole.takers(paths_B))
        if not takers or not _are_all(takers):
            features_BE = self._image.finish(x_BLD, depth, self._mixing(paths_B))
        for image, takes_B in takers:
            own_BE = image.finish(x_BLD, depth)
            if features_BE is None:
                features_BE = own_BE
            features_BE = torch.where(takes_B[:, None], own_BE, features_BE)
        assert features_BE is not None
        return features_BE

    def _all_tokens(self, index: int, before_BLD: Tensor, after_BLD: Tensor, tap: str) -> Tensor:
        """What a tap after a block pools: where the last step skips tokens, run it for all."""
        whole_last = self._image.whole_last
        if whole_last is None or index + 1 < len(self._image.steps) or tap.endswith(":cls"):
            return after_BLD
        return whole_last(before_BLD, None)

    def _mixing(self, paths_B: Tensor) -> Callable[[int], Mixing]:
        """What is added to each block; on a CPU, where looking is free, no kind that no row has."""
        experts: ExpertPool | None = self._vision
        if paths_B.device.type == "cpu" and self._vision.paths.isdisjoint(paths_B.tolist()):
            experts = None
        low_rank = None if self._low_rank is None else self._low_rank.rows(paths_B)
        return lambda block: Mixing(block, paths_B, experts, low_rank)

    def _pool(self, blocks: int, width: int, dtype: torch.dtype = torch.float32) -> ExpertPool:
        return ExpertPool(
            blocks=blocks,
            width=width,
            capacity=self.capacity,
            device=self.backbone.device,
            dtype=dtype,
        )

    def _low_rank_pool(
        self, steps: Sequence[Step], dtype: torch.dtype = torch.float32
    ) -> LowRankPool | None:
        layers = [step.layers for step in steps]
        found = [both for both in layers if both is not None]
        if (
            len({(fc.inputs, fc.outputs, proj.outputs) for fc, proj in found}) != 1
            or None in layers
        ):
            return None
        device = self.backbone.device
        return LowRankPool(found, capacity=self.capacity, device=device, dtype=dtype)

    def _named_stores(self) -> dict[str, _Store]:
        stores: dict[str, _Store | None] = {
            "image experts": self._vision,
            "text experts": self._text,
            "image updates": self._low_rank,
            "text updates": self._text.low_rank if self._text else None,
            "weights": self._whole,
        }
        return {name: store for name, store in stores.items() if store is not None}

    def _packed_experts(self, task: TaskExperts) -> dict[str, Packed]:
        top_k, scale = task.top_k, task.scale
        parts: dict[str, Packed] = {
            "image experts": self._vision.pack(task.vision, top_k=top_k, scale=scale)
        }
        if task.text:
            if self._text is None:
                raise BackboneError(f"the text tower of {self.backbone.name} takes no experts")
            parts["text experts"] = self._text.pool.pack(task.text, top_k=top_k, scale=scale)
        return parts

    def _packed_low_rank(self, task: TaskLowRank) -> dict[str, Packed]:
        parts: dict[str, Packed] = {}
        text = self._text.low_rank if self._text else None
        for tower, pool, updates in (
            ("image", self._low_rank, task.vision),
            ("text", text, task.text),
        ):
            if updates and pool is None:
                raise BackboneError(
                    f"the {tower} tower of {self.backbone.name} takes no low-rank updates"
                )
            if updates and pool is not None:
                parts[f"{tower} updates"] = pool.pack(updates, scale=task.scale)
        return parts

    def _first(self, updates: Mapping[int, BlockExperts] | Mapping[int, BlockLowRank]) -> int:
        return min(updates, default=len(self._image.steps))

    def _clear(self, path: int) -> None:
        for store in self._stores.values():
            if path in store.paths:
                store.unload(path)

    def _depth(self, tap: str) -> int:
        place, _, _ = tap.partition(":")
        blocks = len(self.backbone.image.blocks)
        if place in ("stem", "embedding") or tap in self.extractors:
            return 0
        if place.startswith("block") and place[5:].isdigit() and 0 < int(place[5:]) <= blocks:
            return int(place[5:])
        raise BackboneError(f"{self.backbone.name} with {blocks} blocks has no feature {tap!r}")


def _are_all(takers: Sequence[tuple[object, Tensor]]) -> bool:
    """Whether every row has towers of its own, as far as can be seen without asking a device."""
    takes_PB = torch.stack([takes_B for _, takes_B in takers])
    return takes_PB.device.type == "cpu" and bool(takes_PB.any(0).all())


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
