"""Top-k expert mixing: what the experts of each row's own path add to the output of a block."""

from kernels.expert_mixing.reference import (
    choose,
    expert_mixing,
    expert_mixing_norm,
    mix,
    route,
)

__all__ = ["choose", "expert_mixing", "expert_mixing_norm", "mix", "route"]
