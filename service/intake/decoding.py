"""Image files to pixels on a few threads, so that the event loop goes on meanwhile.

A decoder cannot be interrupted: one that takes too long is no longer waited for, and keeps its
thread until it ends. What one image may cost is bounded by `medley/images.py` in the first place.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

from medley.backbone import Backbone
from medley.errors import ImageError
from medley.images import ImageLimits, decode
from service.intake.forms import Base64, DataUri, image_bytes
from service.signals.metrics import Metrics

__all__ = ["Decoding"]


@dataclass
class _Job:
    image: bytes | Base64 | DataUri
    started_s: float | None = None  # set by the thread that takes it


class Decoding:
    """A pool of decode threads; belongs to the event loop."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        threads: int,
        timeout_s: float,
        limits: ImageLimits,
        metrics: Metrics,
    ) -> None:
        self.waiting = 0  # images given and not yet decoded
        self._backbone = backbone
        self._timeout_s = timeout_s
        self._limits = limits
        self._metrics = metrics
        self._pool = ThreadPoolExecutor(threads, "decode")

    def close(self) -> None:
        """Begin nothing more, and wait for what has begun."""
        self._pool.shutdown(cancel_futures=True)

    async def pixels(self, image: bytes | Base64 | DataUri) -> Tensor:
        """One image as `Backbone.pixels` makes it; not begun if cancelled in time.

        Raises:
            ImageError: it cannot be used; `decode_timeout` if decoding takes too long.
        """
        job = _Job(image)
        decoded = asyncio.get_running_loop().run_in_executor(self._pool, self._decode, job)
        self.waiting += 1
        try:
            while not decoded.done():
                if self._left_s(job) <= 0:
                    raise ImageError(
                        f"the image was not decoded within {self._timeout_s:g} s",
                        code="decode_timeout",
                    )
                await asyncio.wait({decoded}, timeout=self._left_s(job))
            return decoded.result()
        finally:
            self.waiting -= 1
            decoded.cancel()

    def _left_s(self, job: _Job) -> float:
        """What is left of an image's time, which begins when a thread takes it."""
        if job.started_s is None:
            return self._timeout_s
        return job.started_s + self._timeout_s - time.monotonic()

    def _decode(self, job: _Job) -> Tensor:
        """Runs on a decode thread."""
        job.started_s = time.monotonic()
        with self._metrics.stage_duration_s.labels("decode").time():
            return self._backbone.pixels(decode(image_bytes(job.image), self._limits))
