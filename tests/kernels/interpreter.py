"""A process in which Triton interprets kernels on the CPU; the tests' own compiles them.

Triton reads TRITON_INTERPRET when a kernel is imported, so one process cannot do both. A process of
its own also survives what a broken kernel does to memory.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")
_TIMEOUT_S = 120


class Interpreter:
    """Calls functions in a process with Triton's interpreter; it starts with the first call."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def call(self, function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call a function of an importable module there, and raise here what it raises.

        Raises:
            BrokenProcessPool: the process died; the next call starts another.
        """
        if self._pool is None:
            context = get_context("spawn")
            self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_interpret)
        try:
            answer = self._pool.submit(_call, _dumps((function, args, kwargs)))
            return _loads(answer.result(_TIMEOUT_S))
        except BrokenProcessPool:
            self.close()
            raise

    def close(self) -> None:
        """End the process."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


def _call(payload: bytes) -> bytes:
    function, args, kwargs = _loads(payload)
    return _dumps(function(*args, **kwargs))


# By value: torch would otherwise pass tensors in shared memory, a file descriptor for each.
def _dumps(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _loads(payload: bytes) -> Any:
    return torch.load(io.BytesIO(payload), weights_only=False)
