"""Models for the engine's tests: answer an image with its first pixel, when and as they are told.

A batch with BAD in it fails; the engine's own blank image is 0 and is not kept in `batches`.
`CrampedModel` finds no memory, by torch's own error.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medley.classifier import Ask, Launched, Routed

BAD = 66


class HostModel:
    """As on a CPU: a batch is computed while it is launched, and is there at once."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.beats = threading.Semaphore(0)

    def launch(self, pixels_BCHW: Tensor, asks: Sequence[Ask]) -> Launched:
        batch = _Batch(pixels_BCHW, ready=True)
        if batch.values == [0]:
            self.beats.release()
        else:
            self.batches.append(batch.values)
            self.entered.release()
            self.gate.wait()
            batch.fail_if_bad()
        batch.finished.set()
        return batch

    def let_go(self) -> None:
        """Compute what is held, and what comes."""
        self.gate.set()


class DeviceModel:
    """As on a device: a batch is launched at once, and is there when it is told to finish."""

    def __init__(self, *, fail_at_launch: bool = False) -> None:
        self.fail_at_launch = fail_at_launch
        self.launched = threading.Semaphore(0)
        self.waiting = threading.Semaphore(0)  # how often the engine has begun to wait
        self.beats = threading.Semaphore(0)
        self.flights: list[_Batch] = []
        self._finish_at_once = False

    @property
    def batches(self) -> list[list[int]]:
        """The images of each batch."""
        return [batch.values for batch in self.flights]

    def launch(self, pixels_BCHW: Tensor, asks: Sequence[Ask]) -> Launched:
        batch = _Batch(pixels_BCHW, ready=False)
        if batch.values == [0]:
            batch.finished.set()
            self.beats.release()
            return batch
        batch.waiting = self.waiting
        if self.fail_at_launch:
            batch.fail_if_bad()
        self.flights.append(batch)
        if self._finish_at_once:
            batch.finished.set()
        self.launched.release()
        return batch

    def finish_all(self) -> None:
        """Finish what is in flight, and what comes as soon as it is launched."""
        self._finish_at_once = True
        for batch in self.flights:
            batch.finished.set()

    let_go = finish_all


class DeadModel:
    """No batch succeeds."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)

    def launch(self, pixels_BCHW: Tensor, asks: Sequence[Ask]) -> Launched:
        self.entered.release()
        raise RuntimeError("no device")

    def let_go(self) -> None:
        """Nothing is held."""


class CrampedModel:
    """As on a device with memory for `fits` images in flight; a heavy one does not fit even alone.

    Memory is taken at the launch and given back by the wait; `late` lets the wait find none.
    """

    def __init__(self, *, fits: int, heavy: Iterable[int] = (), late: bool = False) -> None:
        self.fits = fits
        self.heavy = set(heavy)
        self.late = late
        self.used = 0
        self.computed: list[int] = []

    def launch(self, pixels_BCHW: Tensor, asks: Sequence[Ask]) -> Launched:
        batch = _Batch(pixels_BCHW, ready=False)
        batch.finished.set()
        fits = self.used + len(batch.values) <= self.fits and not self.heavy & set(batch.values)
        if not fits and not self.late:
            ask_too_much()
        self.used += len(batch.values)
        return _Cramped(self, batch, fits)

    def let_go(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True)
class _Cramped:
    model: CrampedModel
    batch: _Batch
    fits: bool
    ready = False

    def wait(self) -> Routed:
        self.model.used -= len(self.batch.values)
        if not self.fits:
            ask_too_much()
        self.model.computed += self.batch.values
        return self.batch.wait()


def ask_too_much() -> Tensor:
    """Ask torch for more memory than any machine has."""
    return torch.empty(1 << 60)


class _Batch:
    def __init__(self, pixels_BCHW: Tensor, *, ready: bool) -> None:
        self.values: list[int] = pixels_BCHW[:, 0, 0, 0].tolist()
        self.ready = ready
        self.finished = threading.Event()
        self.waiting = threading.Semaphore(0)

    def fail_if_bad(self) -> None:
        if BAD in self.values:
            raise RuntimeError("a bad batch")

    def wait(self) -> Routed:
        self.waiting.release()
        self.finished.wait()
        self.fail_if_bad()
        count = len(self.values)
        none_BT = torch.zeros(count, 0)
        features_BE = torch.tensor(self.values, dtype=torch.float32)[:, None]
        return Routed(features_BE, [-1] * count, [], none_BT, none_BT.bool(), [()] * count)
