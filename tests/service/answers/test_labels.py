"""Label sets that requests bring: encoded once, kept within bounds, no failure kept."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from service.answers.engine import Engine
from service.answers.labels import LabelCache
from service.errors import EngineError, QueueFullError
from service.signals.metrics import Metrics
from tests.service.models import HostModel

WIDTH = 8
SET_BYTES = 2 * WIDTH * 4  # two labels


class Encoder:
    """Encodes when it is let; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.open = threading.Event()
        self.open.set()
        self.broken = False

    def __call__(self, names: tuple[str, ...], templates: tuple[str, ...], path: int) -> Tensor:
        self.open.wait()
        self.asked.append(names)
        if self.broken:
            raise QueueFullError("broken")
        return torch.ones(len(names), WIDTH)


@contextmanager
def cache(
    encoder: Encoder, *, max_sets: int = 100, max_bytes: int = 1_000_000
) -> Iterator[LabelCache]:
    engine = Engine(
        HostModel().launch,
        blank_CHW=torch.zeros(3, 2, 2, dtype=torch.uint8),
        metrics=Metrics(),
        max_batch=4,
        max_wait_s=0.0,
        queue_limit=8,
        heartbeat_s=3600.0,
    )
    engine.start()
    try:
        yield LabelCache(encoder, engine, max_sets=max_sets, max_bytes=max_bytes)
    finally:
        encoder.open.set()
        engine.stop()


async def ask(labels: LabelCache, *names: str) -> None:
    label_set = await labels.get(None, names, None)
    assert label_set.names == names
    assert label_set.features_CE.shape == (len(names), WIDTH)


def test_a_set_is_encoded_once_however_many_ask_at_once() -> None:
    async def run() -> None:
        await asyncio.gather(*[ask(labels, "a", "b") for _ in range(5)])
        await ask(labels, "a", "b")
        await ask(labels, "b", "a")

    encoder = Encoder()
    with cache(encoder) as labels:
        asyncio.run(run())
    assert encoder.asked == [("a", "b"), ("b", "a")]


def test_the_least_recently_used_set_goes_when_there_are_too_many() -> None:
    async def run() -> None:
        for names in (("a", "b"), ("c", "d"), ("a", "b"), ("e", "f"), ("a", "b"), ("c", "d")):
            await ask(labels, *names)

    encoder = Encoder()
    with cache(encoder, max_sets=2) as labels:
        asyncio.run(run())
    assert encoder.asked == [("a", "b"), ("c", "d"), ("e", "f"), ("c", "d")]


def test_what_is_kept_never_has_more_bytes_than_allowed() -> None:
    async def run() -> None:
        for names in (("a", "b"), ("c", "d"), ("e", "f"), ("a", "b")):
            await ask(labels, *names)
            assert labels.used_bytes <= 2 * SET_BYTES
        await ask(labels, *"abcdefgh")  # larger than all the room: answered and not kept
        assert labels.used_bytes == 0

    encoder = Encoder()
    with cache(encoder, max_bytes=2 * SET_BYTES) as labels:
        asyncio.run(run())
    assert encoder.asked.count(("a", "b")) == 2


def test_who_gives_up_takes_nothing_from_who_waits() -> None:
    async def run() -> None:
        encoder.open.clear()
        impatient, patient = (asyncio.ensure_future(ask(labels, "a", "b")) for _ in range(2))
        await asyncio.sleep(0)  # both wait
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        encoder.open.set()
        await patient

    encoder = Encoder()
    with cache(encoder) as labels:
        asyncio.run(run())
    assert encoder.asked == [("a", "b")]


def test_a_failure_is_not_kept() -> None:
    async def run() -> None:
        encoder.broken = True
        with pytest.raises((QueueFullError, EngineError)):
            await ask(labels, "a", "b")
        encoder.broken = False
        await ask(labels, "a", "b")
        assert labels.used_bytes == SET_BYTES

    encoder = Encoder()
    with cache(encoder) as labels:
        asyncio.run(run())
