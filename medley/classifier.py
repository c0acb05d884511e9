"""A batch of (image, ask) to features and the path that each image took.

A forward runs at one of a few batch sizes, the buckets, padded where needed. The libraries under a
matrix product choose a kernel by its shape, so a result may depend on the number of rows; at a
fixed number it does not depend on what the other rows hold. With a single bucket no answer depends
by a bit on how many images came together; with several it may, by rounding.

What is decided is decided where the model is: between a batch's pixels and its answers nothing is
read back. On a CPU, where looking costs nothing, experts are left out if no image takes a path.

Legend: B images, C classes, E joint embedding width, T tasks, P paths that there may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from medley.routed import ZERO_SHOT, Frozen, RoutedModel
from medley.selector import DECIDE, SelectorBank

__all__ = ["Ask", "Classifier", "Launched", "Routed", "check_buckets", "logits"]


@dataclass(frozen=True)
class Ask:
    """Which path an image is to take: a given one, or whatever DDAS decides among the eligible."""

    path: int | None = None  # None: DDAS decides; ZERO_SHOT or a path: that one
    eligible: frozenset[int] | None = None  # for DDAS: paths that may answer; None means all


@dataclass(frozen=True)
class Routed:
    """What became of a batch, on the host; columns of the DDAS scores are in the order of `tasks`.

    A batch of no image has no features.
    """

    features_BE: Tensor  # unit length, float32
    paths: list[int]
    tasks: list[int]
    scores_BT: Tensor
    accepted_BT: Tensor


class Launched(Protocol):
    """A batch on its way. `wait` may be called more than once; the engine's thread calls it."""

    @property
    def ready(self) -> bool:
        """Whether `wait` has nothing to wait for."""

    def wait(self) -> Routed:
        """Wait for the answers."""


class Classifier:
    """A routed model and the selectors of its tasks, run eagerly.

    Like the model it belongs to one thread.
    """

    def __init__(self, model: RoutedModel, *, buckets: Sequence[int] = (1,)) -> None:
        """Take a model.

        Args:
            model: the routed model.
            buckets: the batch sizes, ascending powers of two.

        Raises:
            ValueError: they are not.
        """
        check_buckets(buckets)
        self.model = model
        self.selectors = SelectorBank(model.backbone.device)
        self.buckets = tuple(buckets)

    @property
    def max_batch(self) -> int:
        """Most images of one forward: the largest bucket."""
        return self.buckets[-1]

    def prepare(self) -> None:
        """Make ready for the tasks that are loaded now, so that no batch has to; here, nothing."""

    def route(self, pixels_BCHW: Tensor, asks: Sequence[Ask]) -> Routed:
        """Decide every image's path, encode it along that path, and wait for the answers.

        Args, Raises: as for `launch`.
        """
        return self.launch(pixels_BCHW, asks).wait()

    @torch.inference_mode()
    def launch(self, pixels_BCHW: Tensor, asks: Sequence[Ask]) -> Launched:
        """Start a batch; more images than the largest bucket holds are several forwards.

        Args:
            pixels_BCHW: uint8, as `Backbone.pixels` makes them, on the host.
            asks: one for each image.

        Raises:
            ValueError: there are more or fewer asks than images, or one names a path that is not
                loaded. Nothing has started.
        """
        if len(asks) != len(pixels_BCHW):
            raise ValueError(f"{len(asks)} asks for {len(pixels_BCHW)} images")
        self._check(asks)
        size = self.max_batch
        parts = [
            self._start(pixels_BCHW[i : i + size], asks[i : i + size])
            for i in range(0, len(asks), size)
        ]
        return parts[0] if len(parts) == 1 else _Parts(parts, self.selectors.tasks)

    @torch.inference_mode()
    def frozen(
        self, pixels_BCHW: Tensor, *, taps: Sequence[str] = (), features: bool = False
    ) -> Frozen:
        """Run up to `max_batch` uint8 pixels through the frozen backbone; a bucket comes back."""
        images_BCHW = _padded(pixels_BCHW, self._bucket(len(pixels_BCHW)))
        normalised_BCHW = self.model.backbone.normalise(images_BCHW)
        return self.model.frozen(normalised_BCHW, taps=taps, features=features)

    @torch.inference_mode()
    def follow(self, frozen: Frozen, asks: Sequence[Ask]) -> Routed:
        """Go on from a bucket of `frozen`: decide the paths of its first images and encode them.

        Args:
            frozen: of a whole bucket, with at least the taps that the selectors look at.
            asks: one for each image that is more than padding.

        Raises:
            ValueError: an ask names a path that is not loaded.
        """
        self._check(asks)
        return self._follow(frozen, asks).wait()

    def _start(self, pixels_BCHW: Tensor, asks: Sequence[Ask]) -> Launched:
        """Start one forward."""
        return self._follow(self.frozen(pixels_BCHW, taps=self.selectors.taps), asks)

    def _follow(self, frozen: Frozen, asks: Sequence[Ask]) -> _Eager:
        rows, device = len(frozen.hidden_BLD), frozen.hidden_BLD.device
        paths_B, scores_BT, accepted_BT = self.selectors.route(
            frozen.taps, self._told(asks, rows).to(device), self._eligible(asks, rows).to(device)
        )
        looked = device.type == "cpu"
        idle = not (paths_B > ZERO_SHOT).any() if looked else self._all_zero_shot(asks)
        features_BE = frozen.features_BE
        if features_BE is None or not idle:
            features_BE = self.model.finish(frozen, None if idle else paths_B)
        unit_BE = F.normalize(features_BE.float(), dim=-1)
        answers = (tensor[: len(asks)] for tensor in (unit_BE, paths_B, scores_BT, accepted_BT))
        return _Eager(self.selectors.tasks, *answers)

    def _check(self, asks: Sequence[Ask]) -> None:
        """Refuse on the host what would read another path's tables, or beyond them, on a device."""
        for path in {ask.path for ask in asks} - {None, ZERO_SHOT}:
            if path not in self.model.paths:
                raise ValueError(f"path {path} is not loaded")

    def _bucket(self, count: int) -> int:
        for bucket in self.buckets:
            if count <= bucket:
                return bucket
        raise ValueError(f"{count} images, the largest batch size is {self.max_batch}")

    def _told(self, asks: Sequence[Ask], rows: int) -> Tensor:
        """What each row is told, (B,) int64; padding is zero-shot."""
        told = [DECIDE if ask.path is None else ask.path for ask in asks]
        return torch.tensor([*told, *[ZERO_SHOT] * (rows - len(told))], dtype=torch.int64)

    def _eligible(self, asks: Sequence[Ask], rows: int) -> Tensor:
        """Which paths each row may be given, (B, P) bool."""
        eligible_BP = torch.ones(rows, self.model.capacity.paths, dtype=torch.bool)
        for row, ask in enumerate(asks):
            if ask.eligible is not None:
                eligible_BP[row] = False
                eligible_BP[
                    row, [path for path in self.selectors.tasks if path in ask.eligible]
                ] = True
        return eligible_BP

    def _all_zero_shot(self, asks: Sequence[Ask]) -> bool:
        """Whether no image can take a path, as far as the host knows."""
        told = ZERO_SHOT if self.selectors.tasks else None
        return all(ask.path in (ZERO_SHOT, told) for ask in asks)


def check_buckets(buckets: Sequence[int]) -> None:
    """Refuse what cannot be the batch sizes of a classifier.

    Raises:
        ValueError: there is none, one is not a power of two, or they do not ascend.
    """
    for bucket in buckets:
        if bucket < 1 or bucket & (bucket - 1):
            # Threads split another number of rows unevenly, and a row's place begins to matter.
            raise ValueError(f"the batch size {bucket} is not a power of two")
    if not buckets or list(buckets) != sorted(set(buckets)):
        raise ValueError(f"the batch sizes {list(buckets)} must be one or more, and ascend")


def logits(features_E: Tensor, class_text_CE: Tensor, logit_scale: float) -> Tensor:
    """Scaled cosine of one image with each class, (C,); one row, so neighbours cannot matter."""
    return logit_scale * (class_text_CE @ features_E)


@dataclass(frozen=True)
class _Eager:
    """One forward whose answers are where the model is; on a CPU they are there at once."""

    tasks: tuple[int, ...]
    features_BE: Tensor
    paths_B: Tensor
    scores_BT: Tensor
    accepted_BT: Tensor

    @property
    def ready(self) -> bool:
        return self.paths_B.device.type == "cpu"

    def wait(self) -> Routed:
        return Routed(
            self.features_BE.cpu(),
            self.paths_B.tolist(),
            list(self.tasks),
            self.scores_BT.cpu(),
            self.accepted_BT.cpu(),
        )


@dataclass(frozen=True)
class _Parts:
    """A batch of several forwards, or of none."""

    parts: Sequence[Launched]
    tasks: tuple[int, ...]

    @property
    def ready(self) -> bool:
        return all(part.ready for part in self.parts)

    def wait(self) -> Routed:
        routed = [part.wait() for part in self.parts]
        none_BT = torch.empty(0, len(self.tasks))
        return Routed(
            torch.cat([r.features_BE for r in routed]) if routed else torch.empty(0),
            [path for r in routed for path in r.paths],
            list(self.tasks),
            torch.cat([none_BT, *(r.scores_BT for r in routed)]),
            torch.cat([none_BT.bool(), *(r.accepted_BT for r in routed)]),
        )


def _padded(pixels_BCHW: Tensor, size: int) -> Tensor:
    missing = size - len(pixels_BCHW)
    return pixels_BCHW if not missing else F.pad(pixels_BCHW, (0, 0) * 3 + (0, missing))
