"""Tensors with NaN or canaries beside them in memory, where a stray read or write shows."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["Canaries", "moved", "surrounded"]

_T = TypeVar("_T")
_CANARY = 1234.0
_BAND = 4096  # elements on either side


class Canaries:
    """A copy of a tensor, `inner`, with values beside it that nothing may change."""

    def __init__(self, tensor: Tensor) -> None:
        self._whole = tensor.new_full((tensor.numel() + 2 * _BAND,), _CANARY)
        self.inner = self._whole[_BAND : _BAND + tensor.numel()].view(tensor.shape).copy_(tensor)

    def check(self) -> None:
        """Fail if one has changed."""
        beside = torch.cat([self._whole[:_BAND], self._whole[-_BAND:]])
        assert (beside == self._whole.new_tensor(_CANARY)).all(), "written beside the answer"


def surrounded(tensor: Tensor) -> Tensor:
    """The same values with NaN before and behind them in memory."""
    whole = torch.full((tensor.numel() + 2 * _BAND,), torch.nan, dtype=tensor.dtype)
    view = whole[_BAND : _BAND + tensor.numel()].view(tensor.shape)
    return view.copy_(tensor)


def moved(problem: _T, device: str) -> _T:
    """The same problem on a device, with all that lies beside each tensor in memory."""
    if not is_dataclass(problem) or isinstance(problem, type):
        return problem
    values: dict[str, Any] = {field.name: getattr(problem, field.name) for field in fields(problem)}
    tensors = {n: _moved(v, device) for n, v in values.items() if isinstance(v, Tensor)}
    return replace(problem, **tensors)


def _moved(tensor: Tensor, device: str) -> Tensor:
    elements = tensor.untyped_storage().nbytes() // tensor.itemsize
    whole = tensor.as_strided((elements,), (1,), 0).to(device)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
