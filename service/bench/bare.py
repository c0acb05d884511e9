"""The same images without HTTP: decode and classify in a plain loop, as quickly as it goes.

What a server cannot beat unless it overlaps decoding with computing, and what its answers are
measured against: what they take longer is HTTP, queue and threads.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from medley.backbone import Backbone
from medley.classifier import Ask, Classifier
from medley.images import decode

__all__ = ["Bare"]


class Bare:
    """A classifier with a few images and who is asked for each."""

    def __init__(
        self, classifier: Classifier, images: Sequence[bytes], asks: Sequence[Ask]
    ) -> None:
        """Take what a loop goes round; image i and ask i belong together, both in turn."""
        self._classifier, self._images, self._asks = classifier, images, asks
        self._pixels = [_pixels(classifier.model.backbone, image) for image in images]

    def rate(self, seconds: float, *, decoding: bool) -> float:
        """Images a second in full batches, with or without decoding them anew."""
        size = self._classifier.max_batch
        start_s, done = time.perf_counter(), 0
        while (passed_s := time.perf_counter() - start_s) < seconds:
            self._batch(range(done, done + size), decoding=decoding)
            done += size
        return done / passed_s

    def alone_s(self, count: int, *, decoding: bool) -> list[float]:
        """Seconds that each of some images takes by itself."""
        times_s = []
        for number in range(count):
            start_s = time.perf_counter()
            self._batch(range(number, number + 1), decoding=decoding)
            times_s.append(time.perf_counter() - start_s)
        return times_s

    def _batch(self, numbers: range, *, decoding: bool) -> None:
        images = [number % len(self._images) for number in numbers]
        backbone = self._classifier.model.backbone
        pixels = [
            _pixels(backbone, self._images[i]) if decoding else self._pixels[i] for i in images
        ]
        asks = [self._asks[number % len(self._asks)] for number in numbers]
        self._classifier.route(torch.stack(pixels), asks)


def _pixels(backbone: Backbone, image: bytes) -> torch.Tensor:
    return backbone.pixels(decode(image))
