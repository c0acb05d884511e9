"""Paths with weights of their own: for each a copy of the towers that shares what does not change.

Such a path costs what a model costs: the memory of its own weights, and a pass of its own over
every batch in which one of its rows may be. On a CPU that is where one is; on a GPU, where nothing
is read back, every batch. Only `pack` may run on any thread.

Legend: B rows, N prompts, L tokens, E joint embedding width.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, count

import torch
from torch import Tensor, nn

from medley.backbone import Backbone, Clip
from medley.errors import CapacityError
from medley.experts import TaskWeights
from medley.fused import FusedBlock, ImagePass, image_pass
from medley.precision import Precision, dtype_of
from medley.streams import Streams, streams_of
from medley.tower import image_tower

__all__ = ["OwnTowers", "PackedWeights", "WholeModels"]

_NO_TOWER = ("logit_scale", "logit_bias")  # parameters that belong to neither tower


@dataclass(frozen=True, eq=False)
class OwnTowers:
    """One path's towers; what they do not own is the backbone's."""

    model: Clip
    image: ImagePass


@dataclass(frozen=True)
class PackedWeights:
    """A path's own weights, on the host: tensors for another device, or towers that are ready."""

    tensors: Mapping[str, Tensor]
    towers: OwnTowers | None
    first_block: int
    size_bytes: int


class WholeModels:
    """A few paths with towers of their own.

    Args:
        backbone: whose weights they start from.
        image: how the backbone's own image tower is run.
        precision: the same for theirs.
        models: how many there may be.
        streams: where copies run; those of the device unless a test has others.
    """

    def __init__(
        self,
        backbone: Backbone,
        image: ImagePass,
        *,
        precision: Precision,
        models: int,
        streams: Streams | None = None,
    ) -> None:
        self._backbone, self._image, self._precision = backbone, image, precision
        self._models = models
        self._streams = streams or streams_of(backbone.device)
        self._loaded: dict[int, tuple[int, OwnTowers]] = {}  # by path, with what numbers them
        self._numbers = count()

    @property
    def paths(self) -> frozenset[int]:
        """The paths that are loaded."""
        return frozenset(self._loaded)

    @property
    def free_models(self) -> int:
        """How many more there is room for."""
        return self._models - len(self._loaded)

    @property
    def numbers(self) -> tuple[int, ...]:
        """Which models there are: none that is gone ever has the number of one that is there."""
        return tuple(number for number, _ in self._loaded.values())

    @torch.no_grad()
    def pack(self, task: TaskWeights) -> PackedWeights:
        """Do what loading takes on the host, where that is the device all of it; any thread may.

        Raises:
            ValueError: there is no such block or parameter, a shape does not fit, or a parameter
                lies before `first_block`.
        """
        self._check(task)
        host = self._backbone.device.type == "cpu"
        tensors = {name: self._changed(name, delta) for name, delta in task.deltas.items()}
        if not host:
            size = sum(tensor.nbytes for tensor in tensors.values())
            return PackedWeights(tensors, None, task.first_block, size)
        towers = self._towers(tensors, task.first_block)
        return PackedWeights({}, towers, task.first_block, self._size_bytes(towers, task))

    def has_room(self, packed: PackedWeights, without: Collection[int] = ()) -> bool:
        """Whether `load` would find room, were the paths `without` gone."""
        return len(self._loaded.keys() - set(without)) < self._models

    @torch.no_grad()
    def load(self, path: int, packed: PackedWeights) -> None:
        """Take a path's towers, made here and now where the device is not the host.

        Raises:
            CapacityError: there are as many as there may be. Nothing has changed.
        """
        assert path not in self._loaded
        if not self.free_models:
            raise CapacityError(f"all {self._models} models of tasks with own weights are taken")
        towers = packed.towers or self._on_device(packed)
        self._loaded[path] = (next(self._numbers), towers)

    def unload(self, path: int) -> None:
        """Let a path's towers go.

        Raises:
            ValueError: no such path is loaded.
        """
        if path not in self._loaded:
            raise ValueError(f"path {path} is not loaded")
        del self._loaded[path]

    def takers(self, paths_B: Tensor) -> Iterator[tuple[ImagePass, Tensor]]:
        """Find the image towers that rows may take, each with which rows do, (B,) bool."""
        for path, (_, towers) in self._loaded.items():
            takes_B = paths_B == path
            if takes_B.device.type != "cpu" or takes_B.any():
                yield towers.image, takes_B

    def encode_text(self, tokens_NL: Tensor, path: int) -> Tensor:
        """Encode token ids by a loaded path's own tower; un-normalised features (N, E)."""
        return self._loaded[path][1].model.encode_text(tokens_NL)

    def _check(self, task: TaskWeights) -> None:
        blocks = len(self._backbone.image.blocks)
        if not 0 <= task.first_block <= blocks:
            raise ValueError(f"first block {task.first_block} is not within 0..{blocks}")
        shapes = self._shapes(task.first_block)
        for name, delta in task.deltas.items():
            if name not in shapes:
                raise ValueError(
                    f"{name} is no parameter of a tower from image block {task.first_block} on"
                )
            if delta.shape != shapes[name]:
                shape, expected = tuple(delta.shape), tuple(shapes[name])
                raise ValueError(f"{name} has shape {shape}, expected {expected}")

    def _shapes(self, first_block: int) -> dict[str, torch.Size]:
        """All that a path may own: the text tower, and the image tower from a block on."""
        image, model = self._backbone.image, self._backbone.model
        own = {id(p) for b in image.blocks[first_block:] for p in b.block.parameters()}
        return {
            name: parameter.shape
            for name, parameter in model.named_parameters()
            if id(parameter) in own
            or _is_under(name, [f"visual.{behind}" for behind in image.behind])
            or not _is_under(name, ["visual", *_NO_TOWER])
        }

    def _changed(self, name: str, delta: Tensor) -> Tensor:
        base = self._backbone.model.get_parameter(name)
        tensor = self._streams.host_tensor(*base.shape, dtype=base.dtype)
        return tensor.copy_(base).add_(delta.to(tensor.device))

    def _on_device(self, packed: PackedWeights) -> OwnTowers:
        main, up, device = self._streams.main, self._streams.up, self._backbone.device
        there = {n: torch.empty_like(t, device=device) for n, t in packed.tensors.items()}
        up.wait_for(main.record())  # memory that was let go may be read by what was launched
        for name, tensor in packed.tensors.items():
            up.copy(there[name], tensor)
        main.wait_for(up.record())
        return self._towers(there, packed.first_block)

    def _towers(self, tensors: Mapping[str, Tensor], first: int) -> OwnTowers:
        base, model = self._image, _sharing(self._backbone.model)
        for name, tensor in tensors.items():
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, nn.Parameter(tensor, requires_grad=False))
        own = image_pass(image_tower(model.visual), model.visual, self._precision)
        if all(isinstance(step, FusedBlock) for step in own.steps):
            model.visual.transformer = nn.Identity()  # not run: its memory is free
        steps = (*base.steps[:first], *own.steps[first:])
        return OwnTowers(model, replace(base, steps=steps, pool=own.pool, whole_last=None))

    def _size_bytes(self, towers: OwnTowers, task: TaskWeights) -> int:
        """What towers on the host own: their parameters, and folded blocks beside them."""
        shared = {id(parameter) for parameter in self._backbone.model.parameters()}
        own = [p for p in towers.model.parameters() if id(p) not in shared]
        size = sum(parameter.nbytes for parameter in own)
        if self._precision == "exact":
            return size
        blocks = self._backbone.image.blocks[task.first_block :]
        folded = sum(p.numel() for block in blocks for p in block.block.parameters())
        return size + folded * dtype_of(self._precision).itemsize


def _sharing(model: Clip) -> Clip:
    """Copy a model's modules, but none of its tensors."""
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _is_under(name: str, parents: Collection[str]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)
