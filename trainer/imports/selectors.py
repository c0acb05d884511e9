"""Which selector an imported task gets: the authors', one of ours, or one that accepts nothing.

Legend: N images, B images of a batch, F feature width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from medley.extractor import ALEXNET_CONV5
from medley.levels import AutoencoderLevel
from medley.manifest import Calibration
from medley.routed import RoutedModel
from medley.selector import TaskSelector
from trainer.datasets import ImageSet
from trainer.ddas import DEFAULT_FEATURES, false_reject_rate, fit_selector
from trainer.imports.autochooser import Autochooser
from trainer.pixels import pixels_of

__all__ = ["Chosen", "accepting_nothing", "authors", "fitted"]

Chosen = tuple[TaskSelector, Calibration]

MOST_IMAGES = 2048  # of a task that are looked at
BATCH = 16
NEVER = -1000.0  # a threshold below every score: the logarithm of a float32 is at least -104


def authors(
    model: RoutedModel,
    autochooser: Autochooser,
    task: int,
    *,
    error: float,
    images: ImageSet | None = None,
) -> Chosen:
    """Take the authors' rule for the task, with their threshold on the error.

    With training images of the task it is measured how many of them, each alone, it refuses.

    Raises:
        ValueError: the threshold is not positive.
        DataError: an image cannot be read.
    """
    method = f"MoE-Adapters4CL: reconstruction error at most {error:g} and less than the reference"
    selector = autochooser.selector(task, threshold=error)
    refused_N = [
        not accepted
        for taps in _batches(model, images, (ALEXNET_CONV5,))
        for accepted in selector.accepted(taps).tolist()
    ]
    return selector, Calibration(
        method=method,
        images=len(refused_N),
        false_reject_rate=sum(refused_N) / max(len(refused_N), 1),
    )


def fitted(model: RoutedModel, images: ImageSet) -> Chosen:
    """Fit our own selector on training images of the task, at most `MOST_IMAGES` of them.

    Raises:
        DataError: too few images, or one that cannot be read.
    """
    parts = list(_batches(model, images, DEFAULT_FEATURES))
    taps = {name: torch.cat([part[name] for part in parts]).cpu() for name in DEFAULT_FEATURES}
    selector = fit_selector(taps, None)
    return selector, Calibration(
        method="cross-fitted conformal",
        images=len(taps[DEFAULT_FEATURES[0]]),
        false_reject_rate=false_reject_rate(selector, taps),
    )


def accepting_nothing(model: RoutedModel) -> Chosen:
    """Make a selector that gives no image to the task: it answers only when it is told to."""
    F = model.backbone.image.width
    level = AutoencoderLevel(
        feature="stem:mean",
        center=0.0,
        spread=1.0,
        mean_F=torch.zeros(F),
        std_F=torch.ones(F),
        encoder_FC=torch.zeros(F, 1),
        encoder_bias_C=torch.zeros(1),
        decoder_CF=torch.zeros(1, F),
        decoder_bias_F=torch.zeros(F),
    )
    calibration = Calibration(
        method="none: imported without a selector, answers only when told",
        images=0,
        false_reject_rate=1.0,
    )
    return TaskSelector((level,), threshold=NEVER, alpha=None), calibration


def _batches(
    model: RoutedModel, images: ImageSet | None, taps: Sequence[str]
) -> Iterator[dict[str, Tensor]]:
    """Features (B, F) of some of the images, drawn without looking; of no images, nothing."""
    if images is None:
        return
    backbone = model.backbone
    order = np.random.default_rng(0).permutation(len(images))[:MOST_IMAGES].tolist()
    for start in range(0, len(order), BATCH):
        pixels_BCHW = pixels_of(backbone, images, order[start : start + BATCH])
        with torch.inference_mode():
            frozen = model.frozen(backbone.normalise(pixels_BCHW), taps=taps)
        yield frozen.taps
