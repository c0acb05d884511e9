"""Streams that put off their work, and then do it in any order that their events allow."""

import random
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from medley.streams import Capture, Event, Work

__all__ = ["LateStreams"]


class LateStreams:
    """Nothing is done before somebody waits for it.

    Then streams take steps by turns that a seed draws. What relies on an order that no event
    promises gives wrong answers for some seed.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.main, self.up, self.down = (_Late(self) for _ in range(3))

    def host_tensor(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def capture(self, work: Work) -> Capture:
        """As on a device, what the work computes comes after all that is in the main stream."""
        while self.main.waiting:
            self.step()
        outputs = work()

        def replay() -> None:
            for output, anew in zip(outputs, work(), strict=True):
                output.copy_(anew)

        return Capture(outputs, replay)

    @torch.inference_mode()
    def step(self) -> bool:
        """Do the next thing of some stream; False if nothing is left."""
        able = [s for s in (self.main, self.up, self.down) if s.able]
        if able:
            self._random.choice(able).step()
        return bool(able)


class _Late:
    def __init__(self, streams: LateStreams) -> None:
        self._streams = streams
        self._queue: deque[tuple[_Mark | None, Callable[[], object]]] = deque()

    @property
    def able(self) -> bool:
        """Whether the first in the queue may be done now."""
        return bool(self._queue) and (self._queue[0][0] is None or self._queue[0][0].query())

    @property
    def waiting(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._queue)

    def step(self) -> None:
        """Do the first in the queue."""
        self._queue.popleft()[1]()

    def copy(self, into: Tensor, source: Tensor) -> None:
        self.run(lambda: into.copy_(source))

    def run(self, work: Callable[[], object]) -> None:
        self._queue.append((None, work))

    def record(self) -> Event:
        mark = _Mark(self._streams)
        self.run(mark.pass_by)
        return mark

    def wait_for(self, event: Event) -> None:
        assert isinstance(event, _Mark)
        self._queue.append((event, lambda: None))


class _Mark:
    def __init__(self, streams: LateStreams) -> None:
        self._streams = streams
        self._passed = False

    def pass_by(self) -> None:
        self._passed = True

    def query(self) -> bool:
        return self._passed

    def synchronize(self) -> None:
        while not self._passed:
            assert self._streams.step(), "waits for what nobody will do"
