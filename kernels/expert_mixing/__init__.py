"""What each row's own path adds: experts to the output of a block, low-rank updates to a layer."""

from kernels.expert_mixing.ops import (
    add_low_rank_,
    expert_mixing,
    expert_mixing_norm,
    mix,
)
from kernels.expert_mixing.reference import choose, route

__all__ = [
    "add_low_rank_",
    "choose",
    "expert_mixing",
    "expert_mixing_norm",
    "mix",
    "route",
]
