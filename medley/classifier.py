"""A batch of (image, ask) to features and the path that each image took.

Every forward runs at exactly one batch size, the bucket, padded where needed. The libraries under a
matrix product choose a kernel by its shape, so a result may depend on the number of rows; at a
fixed number it does not depend on what the other rows hold.

Legend: B images, C classes, E joint embedding width, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from medley.routed import ZERO_SHOT, Frozen, RoutedModel
from medley.selector import SelectorBank

__all__ = ["Ask", "Classifier", "Routed", "logits"]


@dataclass(frozen=True)
class Ask:
    """Which path an image is to take: a given one, or whatever DDAS decides among the eligible."""

    path: int | None = None  # None: DDAS decides; ZERO_SHOT or a path: that one
    eligible: frozenset[int] | None = None  # for DDAS: paths that may answer; None means all


@dataclass(frozen=True)
class Routed:
    """What became of a batch; columns of the DDAS scores are in the order of `tasks`."""

    features_BE: Tensor  # unit length, float32
    paths: list[int]
    tasks: list[int]
    scores_BT: Tensor
    accepted_BT: Tensor


class Classifier:
    """A routed model and the selectors of its tasks, run at one batch size."""

    def __init__(self, model: RoutedModel, *, bucket: int = 1) -> None:
        if bucket < 1 or bucket & (bucket - 1):
            # Threads split another number of rows unevenly, and a row's place begins to matter.
            raise ValueError(f"the batch size {bucket} is not a power of two")
        self.model = model
        self.selectors = SelectorBank(model.backbone.device)
        self.bucket = bucket

    @torch.inference_mode()
    def route(self, pixels_BCHW: Tensor, asks: Sequence[Ask]) -> Routed:
        """Decide every image's path and encode it along that path.

        Args:
            pixels_BCHW: uint8, as `Backbone.pixels` makes them.
            asks: one for each image.
        """
        starts = range(0, len(asks), self.bucket)
        parts = [
            self.follow(
                self.frozen(pixels_BCHW[i : i + self.bucket], taps=self.selectors.taps),
                asks[i : i + self.bucket],
            )
            for i in starts
        ]
        tasks = list(self.selectors.tasks)
        return Routed(
            torch.cat([p.features_BE for p in parts]) if parts else torch.empty(0),
            [path for p in parts for path in p.paths],
            tasks,
            torch.cat([p.scores_BT for p in parts]) if parts else torch.empty(0, len(tasks)),
            torch.cat([p.accepted_BT for p in parts]) if parts else torch.empty(0, len(tasks)),
        )

    @torch.inference_mode()
    def frozen(
        self, pixels_BCHW: Tensor, *, taps: Sequence[str] = (), features: bool = False
    ) -> Frozen:
        """Run at most a bucket of uint8 pixels through the frozen backbone; a bucket comes back."""
        images_BCHW = self.model.backbone.normalise(_padded(pixels_BCHW, self.bucket))
        return self.model.frozen(images_BCHW, taps=taps, features=features)

    @torch.inference_mode()
    def follow(self, frozen: Frozen, asks: Sequence[Ask]) -> Routed:
        """Go on from a bucket of `frozen`: decide the paths of its first images and encode them.

        Args:
            frozen: of a whole bucket, with at least the taps that the selectors look at.
            asks: one for each image that is more than padding.
        """
        count = len(asks)
        asks = [*asks, *[Ask(ZERO_SHOT)] * (self.bucket - count)]
        scores_BT, accepted_BT = self.selectors.scores(frozen.taps, self.bucket)
        eligible_BT = self._eligible(asks, scores_BT)
        chosen_B = self.selectors.decide(scores_BT, accepted_BT, eligible_BT)
        paths = [
            int(chosen) if ask.path is None else ask.path
            for ask, chosen in zip(asks, chosen_B.tolist(), strict=True)
        ]
        features_BE = frozen.features_BE
        if features_BE is None or max(paths) > ZERO_SHOT:
            paths_B = torch.tensor(paths, device=frozen.hidden_BLD.device)
            features_BE = self.model.finish(frozen, paths_B)
        return Routed(
            F.normalize(features_BE.float(), dim=-1)[:count],
            paths[:count],
            list(self.selectors.tasks),
            scores_BT[:count],
            accepted_BT[:count],
        )

    def _eligible(self, asks: Sequence[Ask], scores_BT: Tensor) -> Tensor:
        rows = [
            [ask.eligible is None or task in ask.eligible for task in self.selectors.tasks]
            for ask in asks
        ]
        return torch.tensor(rows, dtype=torch.bool, device=scores_BT.device).view(scores_BT.shape)


def logits(features_E: Tensor, class_text_CE: Tensor, logit_scale: float) -> Tensor:
    """Scaled cosine of one image with each class, (C,); one row, so neighbours cannot matter."""
    return logit_scale * (class_text_CE @ features_E)


def _padded(pixels_BCHW: Tensor, size: int) -> Tensor:
    missing = size - len(pixels_BCHW)
    return pixels_BCHW if not missing else F.pad(pixels_BCHW, (0, 0) * 3 + (0, missing))
