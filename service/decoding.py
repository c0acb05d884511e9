"""Image files to pixels on a few threads, so that the event loop goes on meanwhile."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from medley.backbone import Backbone
from medley.images import ImageLimits, decode
from service.intake import ImageSource, image_bytes
from service.metrics import Metrics

__all__ = ["Decoding"]


class Decoding:
    """A pool of decode threads; belongs to the event loop."""

    def __init__(
        self, backbone: Backbone, *, threads: int, limits: ImageLimits, metrics: Metrics
    ) -> None:
        self._backbone = backbone
        self._limits = limits
        self._metrics = metrics
        self._pool = ThreadPoolExecutor(threads, "decode")

    def close(self) -> None:
        """Begin nothing more, and wait for what has begun."""
        self._pool.shutdown(cancel_futures=True)

    async def pixels(self, image: ImageSource) -> Tensor:
        """One image as `Backbone.pixels` makes it; not begun if cancelled in time.

        Raises:
            ImageError: it cannot be used.
        """
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._decode, image)

    def _decode(self, image: ImageSource) -> Tensor:
        """Runs on a decode thread."""
        with self._metrics.stage_duration_s.labels("decode").time():
            return self._backbone.pixels(decode(image_bytes(image), self._limits))
