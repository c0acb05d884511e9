"""Which selector an imported task gets: the authors', one of ours, or one that accepts nothing.

Legend: N images, F feature width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

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

FIT_IMAGES = 2048  # of a task
BATCH = 16
NEVER = -1000.0  # a threshold below every score: the logarithm of a float32 is at least -104


def authors(autochooser: Autochooser, task: int, *, error: float) -> Chosen:
    """Take the authors' rule for the task, with their threshold on the error; nothing is measured.

    Raises:
        ValueError: the threshold is not positive.
    """
    method = f"MoE-Adapters4CL: reconstruction error at most {error:g} and less than the reference"
    selector = autochooser.selector(task, threshold=error)
    return selector, Calibration(method=method, images=0, false_reject_rate=0.0)


def fitted(model: RoutedModel, images: ImageSet) -> Chosen:
    """Fit our own selector on training images of the task, at most `FIT_IMAGES` of them.

    Raises:
        DataError: too few images, or one that cannot be read.
    """
    taps = _taps(model, images)
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


def _taps(model: RoutedModel, images: ImageSet) -> dict[str, Tensor]:
    """Features (N, F) of some of the images, drawn without looking."""
    backbone = model.backbone
    order = np.random.default_rng(0).permutation(len(images))[:FIT_IMAGES]
    with torch.inference_mode():
        parts = [
            model.frozen(
                backbone.normalise(pixels_of(backbone, images, order[i : i + BATCH].tolist())),
                taps=DEFAULT_FEATURES,
            ).taps
            for i in range(0, len(order), BATCH)
        ]
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in DEFAULT_FEATURES}
