"""The same images without HTTP: decode and classify in a plain loop, as quickly as it goes.

Two threads decode ahead, as a server's do. What a server takes longer for is HTTP, its queue, and
the visitors who share its cores.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from medley.classifier import Ask, Classifier
from medley.images import decode

__all__ = ["Bare", "Pace"]

DECODERS = 2  # the default of MEDLEY_DECODE_THREADS


@dataclass(frozen=True)
class Pace:
    """What an image of a loop takes: wall clock, and processor time of all threads."""

    time_s: float
    cpu_s: float


class Bare:
    """A classifier with a few images and who is asked for each."""

    def __init__(
        self, classifier: Classifier, images: Sequence[bytes], asks: Sequence[Ask]
    ) -> None:
        """Take what a loop goes round: images in turn, asks in turn."""
        self._classifier, self._images, self._asks = classifier, images, asks
        self._pixels = [self._decode(number) for number in range(len(images))]

    def pace(self, seconds: float) -> Pace:
        """Classify in full batches for so long, while threads decode the images that come next."""
        with ThreadPoolExecutor(DECODERS) as decoders:
            ahead = deque(decoders.submit(self._decode, number) for number in range(self._ahead))

            def take(number: int) -> Tensor:
                ahead.append(decoders.submit(self._decode, number + self._ahead))
                return ahead.popleft().result()

            pace = self._loop(seconds, take)
            decoders.shutdown(cancel_futures=True)
        return pace

    def pace_decoded(self, seconds: float) -> Pace:
        """The same with all images decoded before."""
        return self._loop(seconds, lambda number: self._pixels[number % len(self._pixels)])

    def alone_s(self, count: int) -> list[float]:
        """Seconds that each of some images takes by itself, decoding and all."""
        return [self._timed(self._decode, number) for number in range(count)]

    def alone_decoded_s(self, count: int) -> list[float]:
        """The same with all images decoded before."""
        return [
            self._timed(lambda number: self._pixels[number % len(self._pixels)], number)
            for number in range(count)
        ]

    @property
    def _ahead(self) -> int:
        return 2 * self._classifier.max_batch

    def _loop(self, seconds: float, take: Callable[[int], Tensor]) -> Pace:
        size = self._classifier.max_batch
        start_s, start_cpu_s, done = time.perf_counter(), time.process_time(), 0
        while (passed_s := time.perf_counter() - start_s) < seconds:
            self._route(done, [take(number) for number in range(done, done + size)])
            done += size
        return Pace(passed_s / done, (time.process_time() - start_cpu_s) / done)

    def _timed(self, take: Callable[[int], Tensor], number: int) -> float:
        start_s = time.perf_counter()
        self._route(number, [take(number)])
        return time.perf_counter() - start_s

    def _route(self, first: int, pixels: Sequence[Tensor]) -> None:
        asks = [self._asks[(first + row) % len(self._asks)] for row in range(len(pixels))]
        self._classifier.route(torch.stack(list(pixels)), asks)

    def _decode(self, number: int) -> Tensor:
        image = decode(self._images[number % len(self._images)])
        return self._classifier.model.backbone.pixels(image)
