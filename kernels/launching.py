"""A kernel's launch, prepared: what all fused kernels have in common when they are run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Call", "Launch"]


class Launch(Protocol):
    """What the compiler is told of a launch."""

    @property
    def num_warps(self) -> int:
        """Warps of a program."""

    @property
    def num_stages(self) -> int:
        """Depth of the loads' pipeline."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a kernel is compiled for, and what it runs on."""

    kernel: Any  # as `triton.jit` makes it
    grid: tuple[int]
    arguments: Mapping[str, Tensor | int | float | None]
    constants: Mapping[str, int]  # its constexpr parameters
    launch: Launch

    def run(self) -> None:
        """Launch on the device of the tensors and the current stream; nothing for an empty grid."""
        if self.grid[0] == 0:
            return
        with torch.cuda.device_of(next(iter(self.arguments.values()))):
            self.kernel[self.grid](
                **self.arguments,
                **self.constants,
                num_warps=self.launch.num_warps,
                num_stages=self.launch.num_stages,
                enable_fp_fusion=True,  # said, since Triton 3.10 turns the default around
            )
