"""What the frozen backbone says of images, computed once and kept in a folder.

Seeds, methods, orders and selectors all start from the same untouched backbone, so a benchmark asks
it about each image once. A kept image is an ordinary picture that knows its row; whoever needs
frozen features asks `frozen_buckets`, which reads the rows or computes what is not kept. Either way
the bits are the same: a bucket is computed by the classifier that serves.

Legend: N images, B images of a bucket, L tokens, D width, E embedding width, F width of a tap.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from medley.classifier import Classifier
from medley.errors import DataError
from medley.routed import Frozen
from trainer.checkpoint import make_folder
from trainer.datasets import ImageSet, Picture
from trainer.distributed import ALONE, Team
from trainer.kept import KeptPart, KeptPicture
from trainer.pixels import pixels_of

__all__ = ["EMBEDDING", "FrozenStore", "frozen_buckets", "frozen_features", "frozen_taps"]

OnImages = Callable[[int], None]
EMBEDDING = "embedding"
DEFAULT_MAX_BYTES = 16 * 2**30  # of hidden states on disk, for one data set


class FrozenStore:
    """A folder of frozen features for one backbone and one place where experts begin.

    Args:
        folder: where they are kept; may be shared by several processes and backbones.
        classifier: computes them; its tasks do not matter.
        taps: what DDAS may want to look at.
        max_bytes: hidden states of a data set that would take more are not kept.
    """

    def __init__(
        self,
        folder: Path,
        classifier: Classifier,
        *,
        taps: Sequence[str],
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        self._folder, self._classifier = folder, classifier
        self._taps = tuple(sorted({*taps, EMBEDDING}))
        self._max_bytes = max_bytes

    def keep(self, images: ImageSet, *, on_images: OnImages = lambda _: None) -> ImageSet:
        """Return the same set, of pictures whose frozen features are known.

        Args:
            images: computed now unless they were before.
            on_images: told how many more images are done.

        Raises:
            DataError: the folder cannot be written.
        """
        model = self._classifier.model
        key = (model.backbone.fingerprint, model.first_expert_block, self._classifier.max_batch)
        names = " ".join([*map(str, key), images.digest, *self._taps])
        home = self._folder / hashlib.sha256(names.encode()).hexdigest()[:24]
        if home.exists():
            on_images(len(images))
        else:
            self._compute(images, home, on_images)
        hidden = home / "hidden.npy"
        part = KeptPart(
            *key,
            load_file(home / "taps.safetensors"),
            np.load(hidden, mmap_mode="r", allow_pickle=False) if hidden.exists() else None,
        )
        kept = [
            (KeptPicture(picture, part, row), label)
            for row, (picture, label) in enumerate(images.items)
        ]
        return replace(images, items=tuple(kept))

    def _compute(self, images: ImageSet, home: Path, on_images: OnImages) -> None:
        """Fill a folder beside and rename it: it is complete or not there."""
        make_folder(self._folder)
        try:
            with tempfile.TemporaryDirectory(dir=self._folder, prefix=".unfinished-") as scratch:
                whole = Path(scratch) / "whole"
                whole.mkdir()
                self._write(images, whole, on_images)
                whole.rename(home)
        except (OSError, SafetensorError) as error:
            if not home.exists():  # otherwise another process was quicker, with the same bits
                raise DataError(f"cannot write {home}: {error}") from error

    def _write(self, images: ImageSet, folder: Path, on_images: OnImages) -> None:
        taps: dict[str, list[Tensor]] = {name: [] for name in self._taps}
        hidden_NLD: NDArray[np.float32] | None = None
        done = 0
        for frozen, count in frozen_buckets(self._classifier, images, taps=self._taps):
            for name, parts in taps.items():
                parts.append(frozen.taps[name][:count].cpu())
            hidden_BLD = frozen.hidden_BLD[:count].float().cpu().numpy()
            if done == 0 and hidden_BLD[0].nbytes * len(images) <= self._max_bytes:
                shape = (len(images), *hidden_BLD.shape[1:])
                hidden_NLD = np.lib.format.open_memmap(
                    folder / "hidden.npy", "w+", np.float32, shape
                )
            if hidden_NLD is not None:
                hidden_NLD[done : done + count] = hidden_BLD
            done += count
            on_images(count)
        save_file(
            {name: torch.cat(parts) for name, parts in taps.items()}, folder / "taps.safetensors"
        )


def frozen_buckets(
    classifier: Classifier,
    images: ImageSet,
    *,
    taps: Sequence[str] = (),
    hidden: bool = True,
    team: Team = ALONE,
) -> Iterator[tuple[Frozen, int]]:
    """What the frozen backbone says of a set, a bucket at a time.

    Args:
        classifier: whose backbone, trunk and bucket.
        images: in this order.
        taps: wanted of each image.
        hidden: whether the hidden state is wanted; without it `hidden_BLD` may be empty.
        team: each of its processes gets its own share of the buckets, `Team.own`.

    Yields:
        a whole bucket, and how many of its rows are images and not padding.
    """
    starts = range(0, len(images), classifier.max_batch)
    for start in team.own(starts):
        rows = range(start, min(start + classifier.max_batch, len(images)))
        kept = [images.items[row][0] for row in rows]
        yield (
            _read(classifier, kept, taps, hidden)
            or classifier.frozen(
                pixels_of(classifier.model.backbone, images, rows), taps=taps, features=True
            ),
            len(rows),
        )


def frozen_taps(
    classifier: Classifier, images: ImageSet, taps: Sequence[str], *, team: Team = ALONE
) -> dict[str, Tensor]:
    """Frozen features (N, F) of a set by name, float32, on the CPU; a team shares the work."""
    parts = team.pooled(
        {name: frozen.taps[name][:count].cpu() for name in taps}
        for frozen, count in frozen_buckets(classifier, images, taps=taps, hidden=False, team=team)
    )
    return {name: torch.cat([part[name] for part in parts]) for name in taps}


def frozen_features(classifier: Classifier, images: ImageSet) -> Tensor:
    """Zero-shot image features (N, E) of unit length, on the CPU."""
    return frozen_taps(classifier, images, [EMBEDDING])[EMBEDDING]


def _read(
    classifier: Classifier, pictures: Sequence[Picture], taps: Sequence[str], hidden: bool
) -> Frozen | None:
    """Read a bucket from what is kept; None unless all of it is."""
    kept = [p for p in pictures if isinstance(p, KeptPicture) and _fits(classifier, p.part)]
    if len(kept) < len(pictures) or any(
        not set(taps) <= p.part.taps.keys() or (hidden and p.part.hidden_NLD is None) for p in kept
    ):
        return None
    device = classifier.model.backbone.device

    def bucket(rows: list[Tensor]) -> Tensor:
        padding = [torch.zeros_like(rows[0])] * (classifier.max_batch - len(rows))
        return torch.stack([*rows, *padding]).to(device)

    return Frozen(
        bucket([p.hidden() for p in kept]) if hidden else torch.empty(0),
        {name: bucket([p.part.taps[name][p.row] for p in kept]) for name in taps},
        None,
        depth=classifier.model.first_expert_block,
    )


def _fits(classifier: Classifier, part: KeptPart) -> bool:
    model = classifier.model
    assert model.precision == "exact"  # what is kept is
    return (part.fingerprint, part.first_block, part.bucket) == (
        model.backbone.fingerprint,
        model.first_expert_block,
        classifier.max_batch,
    )
