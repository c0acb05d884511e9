"""A sample on disk of the images that no task claims: examples for a task that is still missing.

Off unless the settings say how many. Users' images: they leave the request only here, in a folder
that only this user may read, and over HTTP only with the admin key. The sample is uniform over all
images offered since the folder was last empty, by Vitter's algorithm R (ACM TOMS 11, 1985). What is
offered while too much waits to be written, or is larger than its share of the bytes, is passed over
as if it had not come.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from medley.files import write_whole
from service.errors import NotFoundError, StorageError
from service.intake.forms import Base64, DataUri, ImageSource, Url, image_bytes
from service.signals.metrics import Metrics

__all__ = ["Kept", "Reservoir", "Sampler"]

log = logging.getLogger(__name__)
T = TypeVar("T")
MAX_WAITING = 8  # images that are being written; each is held in memory until it is


@dataclass(frozen=True)
class Kept:
    """One image of the sample."""

    id: str
    size_bytes: int
    taken_at: str


class Sampler:
    """Algorithm R: which of `places` an item takes, if any."""

    def __init__(self, places: int, *, seen: int = 0, rng: random.Random | None = None) -> None:
        self._places = places
        self._random = rng or random.Random()
        self.seen = seen

    def place(self) -> int | None:
        """The place of the next item; whatever is there goes."""
        self.seen += 1
        place = self.seen - 1 if self.seen <= self._places else self._random.randrange(self.seen)
        return place if place < self._places else None


class Reservoir:
    """Files of a folder. Belongs to the event loop's thread; a thread of its own does the files."""

    def __init__(self, folder: Path, *, images: int, max_bytes: int, metrics: Metrics) -> None:
        """Go on with what is in the folder; where no image is to be kept, remove it.

        Args:
            folder: of this server alone; made when first needed.
            images: how many are kept at most; 0 keeps none.
            max_bytes: of all of them together. Each may take an equal share.
            metrics: say how many there are.

        Raises:
            StorageError: the folder cannot be read, or what is too much not removed.
        """
        self._folder = folder
        self.images = images
        self._share_bytes = max_bytes // max(images, 1)
        self._worker = ThreadPoolExecutor(1, "unclaimed")
        self._waiting = 0
        self._files = dict(enumerate(_found(folder, images)))  # by place; the worker's own
        seen = max([len(self._files), *(int(path.name) for path in self._files.values())])
        self._sampler = Sampler(images, seen=seen)
        metrics.unclaimed_images.set_function(lambda: len(self._files))

    @property
    def seen(self) -> int:
        """How many images the sample stands for."""
        return self._sampler.seen

    def close(self) -> None:
        """Write what is to be written, and return then."""
        self._worker.shutdown()

    def offer(self, image: ImageSource) -> None:
        """Consider one image; costs nothing if it is not taken. What was fetched is not kept."""
        if not self.images or isinstance(image, Url) or self._waiting >= MAX_WAITING:
            return
        if _size_bytes(image) > self._share_bytes:
            return
        place, number = self._sampler.place(), self._sampler.seen
        if place is not None:
            self._waiting += 1
            writing = self._do(lambda: self._write(place, number, image))
            writing.add_done_callback(lambda _: self._written())

    async def kept(self) -> list[Kept]:
        """What is in the sample, oldest first."""
        return await self._do(self._kept)

    async def read(self, id: str) -> bytes:
        """The file of one image, as it came.

        Raises:
            NotFoundError: it is not in the sample, or not any more.
            StorageError: it cannot be read.
        """
        return await self._do(lambda: self._read(id))

    async def remove(self, id: str) -> None:
        """Forget one image; its place stays free until the sample takes another for it.

        Raises:
            NotFoundError: it is not in the sample, or not any more.
            StorageError: it cannot be removed.
        """
        await self._do(lambda: self._remove([self._place(id)]))

    async def clear(self) -> None:
        """Forget all images and begin anew.

        Raises:
            StorageError: one cannot be removed.
        """
        self._sampler = Sampler(self.images)
        await self._do(lambda: self._remove(list(self._files)))

    def _do(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """On the worker, one after the other: so nothing is written after it was to be removed."""
        return asyncio.get_running_loop().run_in_executor(self._worker, work)

    def _written(self) -> None:
        self._waiting -= 1

    def _write(self, place: int, number: int, image: bytes | Base64 | DataUri) -> None:
        """Runs on the worker, as does what follows."""
        path = self._folder / f"{number:015d}"
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(path, image_bytes(image))
            before = self._files.get(place)
            self._files[place] = path
            if before is not None:
                before.unlink(missing_ok=True)
        except OSError as error:  # the answer is given; only the sample lacks one
            log.warning("an unclaimed image was not kept: %s", error.strerror)

    def _kept(self) -> list[Kept]:
        with _storage_errors():
            return [_described(path) for path in sorted(self._files.values())]

    def _read(self, id: str) -> bytes:
        with _storage_errors():
            return self._files[self._place(id)].read_bytes()

    def _place(self, id: str) -> int:
        for place, path in self._files.items():
            if path.name == id:
                return place
        raise NotFoundError("no such image in the sample", code="unknown_image")

    def _remove(self, places: list[int]) -> None:
        with _storage_errors():
            for place in places:
                self._files[place].unlink(missing_ok=True)
                del self._files[place]


def _found(folder: Path, images: int) -> list[Path]:
    """What is there already; of too many a random part stays, which is a sample as well."""
    with _storage_errors():
        files = list(folder.iterdir()) if folder.is_dir() else []
        found = [path for path in files if path.name.isdecimal()]
        random.shuffle(found)
        for path in {*files} - {*found[:images]}:  # also what a crash left half written
            path.unlink()
    return found[:images]


def _described(path: Path) -> Kept:
    stat = path.stat()
    taken_at = datetime.fromtimestamp(stat.st_mtime, UTC).isoformat(timespec="seconds")
    return Kept(path.name, stat.st_size, taken_at)


def _size_bytes(image: bytes | Base64 | DataUri) -> int:
    """Of the file, or a little more: base64 has four letters for three bytes."""
    return len(image) if isinstance(image, bytes) else len(image.text) * 3 // 4


@contextmanager
def _storage_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = f"the sample of unclaimed images cannot be used: {error.strerror}"
        raise StorageError(problem, code="storage_failed") from error
