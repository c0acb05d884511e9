"""The preallocated slots of one tower: fixed tensors that experts are written into and freed from.

Shapes never change while a server runs, so a captured CUDA graph stays valid whatever tasks come
and go. An expert that several tasks share (a frozen one, reused by later tasks) is recognised by
its digest and kept once. The pool is not thread-safe: the thread that runs the model is the one
that changes it.

Legend: N blocks, S slots, R bottleneck, D width, F = R + D, P paths, E experts a path may name in
one block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.expert_mixing import choose, expert_mixing
from medley.errors import CapacityError
from medley.experts import BlockExperts

__all__ = ["Capacity", "ExpertPool"]


@dataclass(frozen=True)
class Capacity:
    """How much room is set aside; the memory is taken at once."""

    paths: int = 64
    slots: int = 128  # experts in each block of each tower
    experts: int = 32  # experts one path may name in a block
    bottleneck: int = 64
    max_top_k: int = 2


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
    """Slots, routers and slot tables of one tower."""

    def __init__(
        self,
        *,
        blocks: int,
        width: int,
        capacity: Capacity,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        rank, slots, paths = capacity.bottleneck, capacity.slots, capacity.paths
        self.capacity = capacity
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

    def load(
        self, path: int, experts: Mapping[int, BlockExperts], *, top_k: int, scale: float
    ) -> None:
        """Write a path's experts into free slots and fill its row of the tables.

        Raises:
            CapacityError: too few free slots, or more experts, ranks or top-k than there is room
                for. Nothing has changed.
        """
        assert path not in self._held
        digests = {b: [e.digest(i) for i in range(e.num_experts)] for b, e in experts.items()}
        self._check_room(experts, digests, top_k)
        self._held[path] = [(block, digest) for block, row in digests.items() for digest in row]
        for block, block_experts in experts.items():
            count = block_experts.num_experts
            slots = [self._take(block, block_experts, i, d) for i, d in enumerate(digests[block])]
            self.slots_NPE[block, path, :count] = torch.tensor(slots, device=self.slots_NPE.device)
            self.routers_NPDE[block, path, :, :count] = block_experts.router_DE.to(
                self.routers_NPDE
            )
        self.top_k_P[path] = top_k
        self.scale_P[path] = scale

    def unload(self, path: int) -> None:
        """Clear a path's row and free the slots that no other path holds."""
        self.slots_NPE[:, path] = -1
        self.routers_NPDE[:, path] = 0
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
            x_BLD,
            paths_B,
            self.weights_NS2RD[block],
            self.biases_NSF[block],
            self.routers_NPDE[block],
            self.slots_NPE[block],
            self.top_k_P,
            self.scale_P,
            max_top_k=self.capacity.max_top_k,
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

    def _check_room(
        self, experts: Mapping[int, BlockExperts], digests: dict[int, list[str]], top_k: int
    ) -> None:
        capacity = self.capacity
        if top_k > capacity.max_top_k:
            raise CapacityError(f"top_k {top_k} is larger than max_top_k {capacity.max_top_k}")
        for block, block_experts in experts.items():
            rank = block_experts.down_ERD.shape[1]
            if rank > capacity.bottleneck:
                raise CapacityError(f"bottleneck {rank} is larger than {capacity.bottleneck}")
            if block_experts.num_experts > capacity.experts:
                raise CapacityError(
                    f"block {block}: {block_experts.num_experts} experts, "
                    f"room for {capacity.experts}"
                )
            slots = self._blocks[block]
            wanted = len(set(digests[block]) - set(slots.residents))
            if wanted > len(slots.free):
                raise CapacityError(
                    f"block {block}: {wanted} expert slots needed, {len(slots.free)} free"
                )

    def _take(self, block: int, experts: BlockExperts, index: int, digest: str) -> int:
        slots = self._blocks[block]
        resident = slots.residents.get(digest)
        if resident is None:
            resident = slots.residents[digest] = _Resident(slots.free.pop(), holders=0)
            self._write(block, resident.slot, experts, index)
        resident.holders += 1
        return resident.slot

    def _write(self, block: int, slot: int, experts: BlockExperts, index: int) -> None:
        # A smaller rank is padded with zeros: relu(0 + 0) = 0 adds nothing.
        rank, full = experts.down_ERD.shape[1], self.capacity.bottleneck
        weights_2RD, biases_F = self.weights_NS2RD[block, slot], self.biases_NSF[block, slot]
        weights_2RD.zero_()
        biases_F.zero_()
        weights_2RD[0, :rank] = experts.down_ERD[index].to(weights_2RD)
        weights_2RD[1, :rank] = experts.up_ERD[index].to(weights_2RD)
        biases_F[:rank] = experts.down_bias_ER[index].to(biases_F)
        biases_F[full:] = experts.up_bias_ED[index].to(biases_F)
