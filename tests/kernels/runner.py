"""Where a kernel runs: in Triton's interpreter, or compiled on a CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar

from torch import Tensor

from tests.kernels.memory import moved

__all__ = ["OnDevice", "Runner"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Runner(Protocol):
    """Takes and gives back what is on the host."""

    def call(self, function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call a function where its kernels run, and raise here what it raises."""


class OnDevice:
    """Calls functions in this process, with the tensors of their problems on a device."""

    def __init__(self, device: str) -> None:
        self._device = device

    def call(self, function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        there: tuple[Any, ...] = tuple(moved(arg, self._device) for arg in args)
        return _fetched(function(*there, **kwargs))


def _fetched(answer: Any) -> Any:
    if isinstance(answer, Tensor):
        return answer.cpu()
    return type(answer)(map(_fetched, answer)) if isinstance(answer, list | tuple) else answer
