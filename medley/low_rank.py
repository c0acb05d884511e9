"""The preallocated slots of one tower for low-rank updates of its MLPs' linear layers.

Like the pool of experts: shapes and addresses stay, so that a captured CUDA graph does, and only
`pack` may run on any thread. Unlike it: there is no router, a task has one slot in all blocks, and
the memory is taken by the first task, so that a server without any pays neither memory nor an
operation.

Legend: N blocks, S slots, R rank, I inputs and O outputs of a layer, P paths, B rows, L tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.expert_mixing import add_low_rank_
from medley.errors import CapacityError
from medley.experts import BlockLowRank, LowRank
from medley.pool import Capacity
from medley.streams import Streams, streams_of
from medley.tower import Beside

__all__ = ["Layer", "LowRankPool", "LowRankRows", "PackedLowRank"]


@dataclass(frozen=True)
class Layer:
    """A linear layer that takes updates.

    `gain` is what its own output has been multiplied by, (O,) on the host or one for all: a form
    that folds constants into weights needs them in the updates too.
    """

    inputs: int
    outputs: int
    gain: Tensor | float = 1.0


@dataclass(frozen=True)
class PackedLowRank:
    """A path's updates in the shapes and the dtype of a pool, on the host, by block."""

    blocks: Mapping[int, tuple[_Factors, _Factors]]
    scale: float

    @property
    def size_bytes(self) -> int:
        """What they take on the host."""
        layers = (layer for block in self.blocks.values() for layer in block)
        return sum(layer.down_RI.nbytes + layer.up_RO.nbytes for layer in layers)


@dataclass(frozen=True)
class _Factors:
    down_RI: Tensor
    up_RO: Tensor


@dataclass(frozen=True)
class _Slots:
    """The memory: of each of the two layers, and the tables."""

    down_NSRI: tuple[Tensor, Tensor]
    up_NSRO: tuple[Tensor, Tensor]
    scale_S: Tensor  # float32
    slots_NP: Tensor  # int64, -1 for none


@dataclass(frozen=True)
class LowRankRows:
    """Which updates the rows of one batch take, in all blocks."""

    slots: _Slots
    slots_NB: Tensor

    def beside(self, block: int) -> Beside:
        """Return what adds the updates to the layers of a block, in place."""
        slots = self.slots

        def add(linear: int, x_BLI: Tensor, y_BLO: Tensor) -> Tensor:
            down_SRI, up_SRO = slots.down_NSRI[linear][block], slots.up_NSRO[linear][block]
            slots_B = self.slots_NB[block]
            return add_low_rank_(y_BLO, x_BLI, slots_B, down_SRI, up_SRO, slots.scale_S)

        return add


class LowRankPool:
    """Slots for low-rank updates of one tower.

    Args:
        blocks: the two layers of each; all blocks have the same shapes.
        capacity: the slots.
        device: where the model computes.
        dtype: of the factors.
        streams: where copies run; those of the device unless a test has others.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[Layer, Layer]],
        *,
        capacity: Capacity,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        streams: Streams | None = None,
    ) -> None:
        self.capacity = capacity
        self._blocks = blocks
        self._device, self._dtype = device, dtype
        self._streams = streams or streams_of(device)
        self._slots: _Slots | None = None
        self._free = list(reversed(range(capacity.low_rank_slots)))
        self._held: dict[int, int] = {}  # path -> slot

    @property
    def paths(self) -> frozenset[int]:
        """The paths that are loaded."""
        return frozenset(self._held)

    @property
    def free_slots(self) -> int:
        """How many more tasks there is room for."""
        return len(self._free)

    @property
    def is_there(self) -> bool:
        """Whether the memory has been taken; from then on it stays where it is."""
        return self._slots is not None

    def pack(self, updates: Mapping[int, BlockLowRank], *, scale: float) -> PackedLowRank:
        """Do what loading takes on the host; any thread may.

        Raises:
            CapacityError: more ranks than there is room for.
            ValueError: a block is not there, the scale is no float32, or shapes do not fit.
        """
        if not abs(scale) <= torch.finfo(torch.float32).max:
            raise ValueError(f"scale is {scale}, which float32 does not hold")
        for block in updates:
            if not 0 <= block < len(self._blocks):
                raise ValueError(f"there is no block {block}, the tower has {len(self._blocks)}")
        return PackedLowRank({b: self._packed(b, update) for b, update in updates.items()}, scale)

    def has_room(self, packed: PackedLowRank, without: Collection[int] = ()) -> bool:
        """Whether `load` would find room, were the paths `without` gone."""
        return bool(self._free) or not self._held.keys().isdisjoint(without)

    def load(self, path: int, packed: PackedLowRank) -> None:
        """Copy a path's updates into a free slot and fill its row of the tables.

        The copies run beside what computes now; what is launched after this waits for them.

        Raises:
            CapacityError: no free slot. Nothing has changed.
        """
        assert path not in self._held
        if not self._free:
            taken = self.capacity.low_rank_slots
            raise CapacityError(f"all {taken} slots of low-rank updates are taken")
        slots = self._slots = self._slots or self._memory()
        slot = self._held[path] = self._free.pop()
        main, up = self._streams.main, self._streams.up
        up.wait_for(main.record())  # a slot that is free now may be read by what was launched
        for block, layers in packed.blocks.items():
            for linear, factors in enumerate(layers):
                up.copy(slots.down_NSRI[linear][block, slot], factors.down_RI)
                up.copy(slots.up_NSRO[linear][block, slot], factors.up_RO)
        main.wait_for(up.record())
        main.run(lambda: _write_row(slots, path, slot, packed))

    def unload(self, path: int) -> None:
        """Clear a path's row and free its slot.

        Raises:
            ValueError: no such path is loaded.
        """
        if path not in self._held:
            raise ValueError(f"path {path} is not loaded")
        assert self._slots is not None
        slots_NP = self._slots.slots_NP
        self._streams.main.run(lambda: slots_NP[:, path].fill_(-1))
        self._free.append(self._held.pop(path))

    def rows(self, paths_B: Tensor) -> LowRankRows | None:
        """Find the updates of a batch's rows; None where no row can take any.

        Where looking costs nothing, on a CPU, that is where no row does.
        """
        slots = self._slots
        if slots is None:
            return None
        slots_NB = slots.slots_NP.index_select(1, paths_B.clamp_min(0))
        slots_NB = slots_NB.masked_fill_(paths_B < 0, -1)
        if slots_NB.device.type == "cpu" and not (slots_NB >= 0).any():
            return None
        return LowRankRows(slots, slots_NB)

    def _packed(self, block: int, update: BlockLowRank) -> tuple[_Factors, _Factors]:
        fc, proj = self._blocks[block]
        return (
            self._factors(f"block {block}: fc", update.fc, fc),
            self._factors(f"block {block}: proj", update.proj, proj),
        )

    def _factors(self, name: str, update: LowRank, layer: Layer) -> _Factors:
        rank, full = len(update.down_RI), self.capacity.low_rank
        for factor, tensor, width in (
            ("down_RI", update.down_RI, layer.inputs),
            ("up_RO", update.up_RO, layer.outputs),
        ):
            if tensor.shape != (rank, width):
                shape = tuple(tensor.shape)
                raise ValueError(f"{name}.{factor} has shape {shape}, expected {(rank, width)}")
        if rank > full:
            raise CapacityError(f"rank {rank} is larger than {full}")
        down_RI = self._streams.host_tensor(full, layer.inputs, dtype=self._dtype)
        up_RO = self._streams.host_tensor(full, layer.outputs, dtype=self._dtype)
        # A smaller rank is padded with zeros, which add nothing.
        down_RI[:rank] = update.down_RI
        up_RO[:rank] = update.up_RO.cpu() * layer.gain
        return _Factors(down_RI, up_RO)

    def _memory(self) -> _Slots:
        capacity, count = self.capacity, len(self._blocks)

        def factors(width: int) -> Tensor:
            # Not zeros: nothing reads a slot before it is written, and the host gives a page of
            # memory to nobody before.
            shape = (count, capacity.low_rank_slots, capacity.low_rank, width)
            return torch.empty(shape, dtype=self._dtype, device=self._device)

        # Written later, maybe outside of inference mode, whatever mode this is.
        with torch.inference_mode(mode=False):
            fc, proj = self._blocks[0]
            return _Slots(
                (factors(fc.inputs), factors(proj.inputs)),
                (factors(fc.outputs), factors(proj.outputs)),
                torch.zeros(capacity.low_rank_slots, device=self._device),
                torch.full((count, capacity.paths), -1, dtype=torch.int64, device=self._device),
            )


def _write_row(slots: _Slots, path: int, slot: int, packed: PackedLowRank) -> None:
    for block in packed.blocks:
        slots.slots_NP[block, path] = slot
    slots.scale_S[slot] = packed.scale
