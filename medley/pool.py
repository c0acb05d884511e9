"""The preallocated slots of one tower: fixed tensors that experts are written into and freed from.

Shapes and addresses never change while a server runs, so a captured CUDA graph stays valid whatever
tasks come and go. An expert that several tasks share (a frozen one, reused by later tasks) is
recognised by its digest and kept once. The pool is not thread-safe: the thread that runs the model
is the one that changes it. Only `pack`, where the work is, may run on any thread.

Legend: N blocks, S slots, R bottleneck, D width, F = R + D, P paths, E experts a path may name in
one block, G experts that a path names in a block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.expert_mixing import choose, expert_mixing, expert_mixing_norm
from medley.errors import CapacityError
from medley.experts import BlockExperts
from medley.streams import Streams, streams_of

__all__ = ["Capacity", "ExpertPool", "PackedExperts"]


@dataclass(frozen=True)
class Capacity:
    """How much room there is.

    The memory of experts is set aside at once, that of low-rank updates by the first task that has
    any, and that of a model by each task that has one.

    Raises:
        ValueError: `max_top_k` is larger than `experts`.
    """

    paths: int = 64
    slots: int = 128  # experts in each block of each tower
    experts: int = 32  # experts one path may name in a block
    bottleneck: int = 64
    max_top_k: int = 2
    low_rank_slots: int = 16  # tasks with low-rank updates
    low_rank: int = 64  # the largest rank
    models: int = 2  # tasks with weights of their own

    def __post_init__(self) -> None:
        if self.max_top_k > self.experts:
            raise ValueError(f"max_top_k {self.max_top_k} is larger than experts {self.experts}")


@dataclass(frozen=True)
class PackedExperts:
    """A path's experts in the shapes and the dtype of a pool, on the host, by block."""

    blocks: Mapping[int, _PackedBlock]
    top_k: int
    scale: float

    @property
    def size_bytes(self) -> int:
        """What they take on the host."""
        return sum(block.size_bytes for block in self.blocks.values())


@dataclass(frozen=True)
class _PackedBlock:
    digests: tuple[str, ...]
    weights_G2RD: Tensor
    biases_GF: Tensor
    router_DE: Tensor

    @property
    def size_bytes(self) -> int:
        return self.weights_G2RD.nbytes + self.biases_GF.nbytes + self.router_DE.nbytes


@dataclass
class _Resident:
    slot: int
    holders: int


@dataclass
class _BlockSlots:
    """Which experts of one block are resident, by digest."""

    free: list[int]
    residents: dict[str, _Resident] = field(default_factory=dict)


class ExpertPool:
    """Slots, routers and slot tables of one tower.

    Args:
        blocks: of the tower.
        width: of its residual stream.
        capacity: the slots.
        device: where the model computes.
        dtype: of the weights; biases and routers are float32.
        streams: where copies run; those of the device unless a test has others.
    """

    def __init__(
        self,
        *,
        blocks: int,
        width: int,
        capacity: Capacity,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        streams: Streams | None = None,
    ) -> None:
        rank, slots, paths = capacity.bottleneck, capacity.slots, capacity.paths
        self.capacity = capacity
        self._streams = streams or streams_of(device)
        self.weights_NS2RD = torch.zeros(blocks, slots, 2, rank, width, dtype=dtype, device=device)
        self.biases_NSF = torch.zeros(blocks, slots, rank + width, device=device)
        self.routers_NPDE = torch.zeros(blocks, paths, width, capacity.experts, device=device)
        self.slots_NPE = torch.full(
            (blocks, paths, capacity.experts), -1, dtype=torch.int64, device=device
        )
        self.top_k_P = torch.ones(paths, dtype=torch.int64, device=device)
        self.scale_P = torch.zeros(paths, device=device)
        self._blocks = [_BlockSlots(free=list(range(slots))) for _ in range(blocks)]
        self._held: dict[int, list[tuple[int, str]]] = {}  # path -> (block, digest) it holds

    def pack(
        self, experts: Mapping[int, BlockExperts], *, top_k: int, scale: float
    ) -> PackedExperts:
        """Do what loading takes on the host; any thread may.

        Raises:
            CapacityError: more experts, ranks or top-k than there is room for.
            ValueError: a block is not there, top_k is less than 1, the scale is no float32, or
                shapes do not fit.
        """
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}, must be at least 1")
        if not abs(scale) <= torch.finfo(torch.float32).max:  # half loaded it would be refused
            raise ValueError(f"scale is {scale}, which float32 does not hold")
        if top_k > self.capacity.max_top_k:
            raise CapacityError(f"top_k {top_k} is larger than max_top_k {self.capacity.max_top_k}")
        for block, block_experts in experts.items():
            self._check(block, block_experts)
        blocks = {block: self._packed(block_experts) for block, block_experts in experts.items()}
        return PackedExperts(blocks, top_k, scale)

    def load(self, path: int, packed: PackedExperts) -> None:
        """Copy a path's experts into free slots and fill its row of the tables.

        The copies run beside what computes now; what is launched after this waits for them.

        Raises:
            CapacityError: too few free slots. Nothing has changed.
        """
        assert path not in self._held
        lack = self._lack(packed)
        if lack is not None:
            raise CapacityError(lack)
        self._held[path] = [(b, digest) for b, p in packed.blocks.items() for digest in p.digests]
        main, up = self._streams.main, self._streams.up
        up.wait_for(main.record())  # a slot that is free now may be read by what was launched
        slots = {
            block: [self._take(block, experts, i) for i in range(len(experts.digests))]
            for block, experts in packed.blocks.items()
        }
        main.wait_for(up.record())
        main.run(lambda: self._write_row(path, packed, slots))

    def has_room(self, packed: PackedExperts, without: Collection[int] = ()) -> bool:
        """Whether `load` would find room, were the paths `without` gone."""
        return self._lack(packed, without) is None

    def unload(self, path: int) -> None:
        """Clear a path's row and free the slots that no other path holds.

        Raises:
            ValueError: no such path is loaded.
        """
        if path not in self._held:
            raise ValueError(f"path {path} is not loaded")
        self._streams.main.run(lambda: self.slots_NPE[:, path].fill_(-1))
        for block, digest in self._held.pop(path):
            slots = self._blocks[block]
            resident = slots.residents[digest]
            resident.holders -= 1
            if resident.holders == 0:
                del slots.residents[digest]
                slots.free.append(resident.slot)

    def mixing(self, block: int, x_BLD: Tensor, paths_B: Tensor) -> Tensor:
        """Return what each row's experts add to the output of `block`, (B, L, D)."""
        return expert_mixing(
            x_BLD, paths_B, *self._tables(block), max_top_k=self.capacity.max_top_k
        )

    def mixing_norm(
        self,
        block: int,
        x_BLD: Tensor,
        paths_B: Tensor,
        out_bias_D: Tensor,
        norm_weight_D: Tensor,
        norm_bias_D: Tensor,
        *,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """Return x with the experts of `block` and a bias added, and the LayerNorm of x."""
        return expert_mixing_norm(
            x_BLD,
            paths_B,
            *self._tables(block),
            out_bias_D,
            norm_weight_D,
            norm_bias_D,
            max_top_k=self.capacity.max_top_k,
            eps=eps,
        )

    def gates(self, block: int, x_BLD: Tensor, paths_B: Tensor) -> Tensor:
        """Return the gates of each row's experts in `block`, (B, E) float32, zero if not chosen."""
        expert_BK, gates_BK, active_B = choose(
            x_BLD,
            paths_B,
            self.routers_NPDE[block],
            self.slots_NPE[block],
            self.top_k_P,
            max_top_k=self.capacity.max_top_k,
        )
        gates_BE = gates_BK.new_zeros(len(paths_B), self.capacity.experts)
        return gates_BE.scatter_add_(1, expert_BK, gates_BK) * active_B[:, None]

    @property
    def paths(self) -> frozenset[int]:
        """The paths that are loaded."""
        return frozenset(self._held)

    @property
    def free_slots(self) -> int:
        """Free slots of the fullest block."""
        return min((len(block.free) for block in self._blocks), default=0)

    def _tables(self, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What the ops read of a block, in their order."""
        return (
            self.weights_NS2RD[block],
            self.biases_NSF[block],
            self.routers_NPDE[block],
            self.slots_NPE[block],
            self.top_k_P,
            self.scale_P,
        )

    def _check(self, block: int, experts: BlockExperts) -> None:
        blocks, _, _, full, width = self.weights_NS2RD.shape
        if not 0 <= block < blocks:
            raise ValueError(f"there is no block {block}, the tower has {blocks}")
        count, rank = experts.num_experts, experts.down_ERD.shape[1]
        for name, shape in (
            ("down_ERD", (count, rank, width)),
            ("down_bias_ER", (count, rank)),
            ("up_ERD", (count, rank, width)),
            ("up_bias_ED", (count, width)),
            ("router_DE", (width, count)),
        ):
            given = tuple(getattr(experts, name).shape)
            if given != shape:
                raise ValueError(f"block {block}: {name} has shape {given}, expected {shape}")
        if rank > full:
            raise CapacityError(f"bottleneck {rank} is larger than {full}")
        if count > self.capacity.experts:
            raise CapacityError(f"block {block}: {count} experts, room for {self.capacity.experts}")

    def _packed(self, experts: BlockExperts) -> _PackedBlock:
        count, rank = experts.num_experts, experts.down_ERD.shape[1]
        _, _, two, full, width = self.weights_NS2RD.shape
        host, dtype = self._streams.host_tensor, self.weights_NS2RD.dtype
        weights_G2RD = host(count, two, full, width, dtype=dtype)
        biases_GF = host(count, full + width, dtype=torch.float32)
        router_DE = host(width, self.capacity.experts, dtype=torch.float32)
        # A smaller rank is padded with zeros: relu(0 + 0) = 0 adds nothing.
        weights_G2RD[:, 0, :rank] = experts.down_ERD
        weights_G2RD[:, 1, :rank] = experts.up_ERD
        biases_GF[:, :rank] = experts.down_bias_ER
        biases_GF[:, full:] = experts.up_bias_ED
        router_DE[:, :count] = experts.router_DE
        digests = tuple(experts.digest(i) for i in range(count))
        return _PackedBlock(digests, weights_G2RD, biases_GF, router_DE)

    def _lack(self, packed: PackedExperts, without: Collection[int] = ()) -> str | None:
        """What is missing in the first block that has no room; None if all have."""
        let_go = Counter(held for path in without for held in self._held.get(path, ()))
        for block, experts in packed.blocks.items():
            slots = self._blocks[block]
            staying = {d for d, r in slots.residents.items() if r.holders > let_go[block, d]}
            wanted = len(set(experts.digests) - staying)
            free = len(slots.free) + len(slots.residents) - len(staying)
            if wanted > free:
                return f"block {block}: {wanted} expert slots needed, {free} free"
        return None

    def _take(self, block: int, experts: _PackedBlock, index: int) -> int:
        slots, digest = self._blocks[block], experts.digests[index]
        resident = slots.residents.get(digest)
        if resident is None:
            resident = slots.residents[digest] = _Resident(slots.free.pop(), holders=0)
            up, slot = self._streams.up, resident.slot
            up.copy(self.weights_NS2RD[block, slot], experts.weights_G2RD[index])
            up.copy(self.biases_NSF[block, slot], experts.biases_GF[index])
        resident.holders += 1
        return resident.slot

    def _write_row(self, path: int, packed: PackedExperts, slots: Mapping[int, list[int]]) -> None:
        for block, experts in packed.blocks.items():
            row_G = torch.tensor(slots[block], dtype=torch.int64)
            self.slots_NPE[block, path, : len(row_G)] = row_G.to(self.slots_NPE.device)
            self.routers_NPDE[block, path].copy_(experts.router_DE, non_blocking=True)
        self.top_k_P[path] = packed.top_k
        self.scale_P[path] = packed.scale
