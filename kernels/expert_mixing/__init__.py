"""Top-k expert mixing: what the experts of each row's own path add to the output of a block."""

from kernels.expert_mixing.ops import expert_mixing, expert_mixing_norm, mix
from kernels.expert_mixing.reference import choose, route

__all__ = ["choose", "expert_mixing", "expert_mixing_norm", "mix", "route"]
