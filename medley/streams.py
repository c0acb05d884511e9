"""Queues of work, as a device has them: the only module that makes CUDA calls.

What runs in a stream runs in order; streams run beside each other except where one waits for an
event of another. On a CPU there is nothing to queue: everything is done when the call returns, and
a capture is a function that is called again and writes into the tensors of its first call. So all
that is built on this runs on both. The CUDA half has been type-checked but never run: there was no
device to run it on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Capture", "Event", "Stream", "Streams", "Work", "streams_of"]

Work = Callable[[], Sequence[Tensor]]


class Event(Protocol):
    """A point in a stream."""

    def query(self) -> bool:
        """Whether the stream has come so far."""

    def synchronize(self) -> None:
        """Let this thread wait until it has."""


class Stream(Protocol):
    """One queue; every method returns before the work is done."""

    def copy(self, into: Tensor, source: Tensor) -> None:
        """Copy a tensor, between a device and pinned memory too."""

    def run(self, work: Callable[[], object]) -> None:
        """Do what a function asks of the device."""

    def record(self) -> Event:
        """Mark this point."""

    def wait_for(self, event: Event) -> None:
        """Let what comes next wait for an event, of whatever stream."""


@dataclass(frozen=True)
class Capture:
    """Work that can be done again on the same tensors without asking Python for it.

    Attributes:
        outputs: what the work returns; `replay` writes them anew.
        replay: to be run in the main stream.
    """

    outputs: Sequence[Tensor]
    replay: Callable[[], None]


class Streams(Protocol):
    """What a device offers to a thread."""

    @property
    def main(self) -> Stream:
        """Where the model computes, and where plain tensor operations go."""

    @property
    def up(self) -> Stream:
        """For copies to the device."""

    @property
    def down(self) -> Stream:
        """For copies from it."""

    def host_tensor(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return zeros on the host, which `Stream.copy` reads and writes without a stop."""

    def capture(self, work: Work) -> Capture:
        """Run work once and capture it.

        Nothing may be in flight. Captures share their memory: what one leaves to a later one must
        be among its outputs, or in tensors of the caller, and they are replayed one at a time.
        """


@cache
def streams_of(device: torch.device) -> Streams:
    """The streams of a device, always the same."""
    return _CudaStreams(device) if device.type == "cuda" else _Immediate()


class _Done:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class _Now:
    """A stream whose work is done at once."""

    def copy(self, into: Tensor, source: Tensor) -> None:
        into.copy_(source)

    def run(self, work: Callable[[], object]) -> None:
        work()

    def record(self) -> Event:
        return _Done()

    def wait_for(self, event: Event) -> None:
        pass


class _Immediate:
    def __init__(self) -> None:
        self.main = self.up = self.down = _Now()

    def host_tensor(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def capture(self, work: Work) -> Capture:
        outputs = work()

        def replay() -> None:
            for output, anew in zip(outputs, work(), strict=True):
                output.copy_(anew)

        return Capture(outputs, replay)


class _CudaStream:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def copy(self, into: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            into.copy_(source, non_blocking=True)

    def run(self, work: Callable[[], object]) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def record(self) -> Event:
        return self._stream.record_event()

    def wait_for(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event)
        self._stream.wait_event(event)


class _CudaStreams:
    def __init__(self, device: torch.device) -> None:
        self.main = _CudaStream(torch.cuda.current_stream(device))
        self.up = _CudaStream(torch.cuda.Stream(device))
        self.down = _CudaStream(torch.cuda.Stream(device))
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def host_tensor(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def capture(self, work: Work) -> Capture:
        with torch.cuda.device(self._device):
            work()  # kernels are compiled and libraries take their workspaces outside the capture
            graph = torch.cuda.CUDAGraph()
            # Other threads pin memory meanwhile, which a capture of the whole process forbids.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = work()
        return Capture(outputs, graph.replay)
