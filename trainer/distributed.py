"""Processes that learn one task together: who does which share, and how they exchange it.

Every process computes its rows of each batch, and its share of what is computed once for an image;
gradients and results are added up, so that all end with the same learner. Alone, everything is
one's own share and nothing is exchanged. What is learnt, and how, is not decided here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from medley.errors import DataError, MedleyError

__all__ = ["ALONE", "Part", "Team", "joined", "own_device"]

# For how long one waits for the others where they should meet. Shares are equal, but the first one
# alone writes checkpoints, and a folder may be slow.
PATIENCE = timedelta(minutes=30)
STARTED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun says

_NOTHING = object()

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """This process among those that learn together; all must call the same methods in turn."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and talks to people."""
        return self.rank == 0

    def part(self, count: int) -> Part:
        """This process's rows of a batch; there may be none."""
        start, stop = (count * rank // self.size for rank in (self.rank, self.rank + 1))
        return Part(self, slice(start, stop), count)

    def total(self, x: Tensor) -> Tensor:
        """The sum of everybody's, with a gradient: what others make of the total counts too."""
        return x if self.size == 1 else _Total.apply(x)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by the sum of everybody's, in one message; all of one dtype."""
        if self.size == 1:
            return
        message = torch.cat([tensor.flatten() for tensor in tensors])
        with _meeting():
            dist.all_reduce(message)
        parts = message.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def spread(self, tensor: Tensor, *, source: int) -> None:
        """Replace a tensor by that of the process `source`."""
        if self.size > 1:
            with _meeting():
                dist.broadcast(tensor, source)

    def own(self, things: Sequence[T]) -> Sequence[T]:
        """This process's share of things to do."""
        return things[self.rank :: self.size]

    def pooled(self, done: Iterable[T]) -> list[T]:
        """What everybody has made of what `own` gave them, in the order of the whole."""
        everybody: list[Any] = [list(done)] * self.size
        if self.size > 1:
            own = everybody[0]
            with _meeting():
                dist.all_gather_object(everybody, own)
        turns = zip_longest(*everybody, fillvalue=_NOTHING)
        return [thing for turn in turns for thing in turn if thing is not _NOTHING]

    def told(self, say: Callable[[], T]) -> T:
        """What the first process says; the others do not ask for themselves."""
        said: list[Any] = [say() if self.is_first else None]
        if self.size > 1:
            with _meeting():
                dist.broadcast_object_list(said, 0)
        return said[0]

    @contextmanager
    def place(self, folder: Path) -> Iterator[Path]:
        """Where to write: the first process's files stay, the others' are thrown away."""
        if self.is_first:
            yield folder
        else:
            with TemporaryDirectory() as scratch:
                yield Path(scratch)

    def agree(self, identity: str) -> None:
        """Make sure that all are about to do the same.

        Raises:
            DataError: they are not.
        """
        if len(set(self.pooled([identity]))) > 1:
            raise DataError(
                "the processes of this run do not have the same data, settings, backbone or "
                "earlier bundles",
                code="settings",
            )


ALONE = Team()


@dataclass(frozen=True)
class Part:
    """The rows of a batch that are this process's."""

    team: Team
    rows: slice
    whole: int  # rows of the batch

    @property
    def share(self) -> float:
        """Of the batch."""
        return (self.rows.stop - self.rows.start) / self.whole

    def drawn(self, draw: Callable[[int], Tensor]) -> Tensor:
        """Random numbers of these rows.

        They are drawn for all rows of the batch and most of them dropped: so an image's do not
        depend on how many processes there are, and all generators stay in step.
        """
        return draw(self.whole)[self.rows]


@contextmanager
def joined(device: str) -> Iterator[Team]:
    """The team that torchrun has started this process in, or alone.

    Of what goes wrong one process speaks: where all meet the same error, and where the others only
    find that one has ended, the rest exit without a word.

    Args:
        device: that the processes compute on, by name.

    Raises:
        MedleyError: another process has ended.
    """
    if any(name not in os.environ for name in STARTED) or os.environ["WORLD_SIZE"] == "1":
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    with _meeting():
        store, rank, size = next(iter(rendezvous("env://", timeout=PATIENCE)))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield Team(rank, size)
        with _meeting():
            dist.barrier()  # who left first would look like one that has failed
    except (MedleyError, KeyboardInterrupt) as error:
        if _has_been_said(store):
            raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 2) from error
        raise
    finally:
        dist.destroy_process_group()


def own_device(device: str) -> str:
    """The device of this process among those of its machine."""
    place = os.environ.get("LOCAL_RANK")
    if device != "cuda" or place is None:
        return device
    if int(place) >= max(1, torch.cuda.device_count()):  # of no device at all the backbone speaks
        raise DataError(
            f"{int(place) + 1} processes, but this machine has {torch.cuda.device_count()} GPUs",
            code="settings",
        )
    return f"cuda:{place}"


class _Total(torch.autograd.Function):
    """A sum over all processes, there and back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """(...) to (...)."""
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """(...) to (...)."""
        return _summed(gradients[0])


def _summed(x: Tensor) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    with _meeting():
        dist.all_reduce(total)
    return total


@contextmanager
def _meeting() -> Iterator[None]:
    """Say in one line that somebody did not come."""
    try:
        yield
    except RuntimeError as error:  # torch has no narrower class for gloo's
        raise MedleyError(
            "another process of this run has ended or does not answer", code="process_lost"
        ) from error


def _has_been_said(store: Store) -> bool:
    try:
        return store.add("medley/said", 1) > 1
    except RuntimeError:  # the process that kept the store is gone: rather twice than never
        return False
