"""What a learner asks of the loss besides the task: scalars, each weighted by the training loop."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Penalties"]


@dataclass(frozen=True)
class Penalties:
    """Of some blocks, summed; with several processes, what all of them together have."""

    balance: Tensor  # how unevenly experts are used
    redundancy: Tensor  # how alike the subspaces of low-rank updates are

    @classmethod
    def none(cls, like: Tensor) -> Penalties:
        """Zeros, on the device of a tensor."""
        return cls(like.new_zeros(()), like.new_zeros(()))

    def __add__(self, other: Penalties) -> Penalties:
        return Penalties(self.balance + other.balance, self.redundancy + other.redundancy)
