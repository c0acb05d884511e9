"""Fitting a task's selector on frozen features, and what it promises or is measured to refuse.

Kinds of selectors are `trainer/selectors.py`; here it is decided which images fit and which
calibrate them.

Legend: N images, F width of a tap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medley.backbone import Backbone
from medley.manifest import Calibration
from medley.selector import TaskSelector, conformal_threshold
from trainer.ddas import Taps, false_reject_rate
from trainer.distributed import Team
from trainer.reference import load_reference
from trainer.selectors import FITS
from trainer.settings import TrainSettings

__all__ = ["Seen", "calibrate"]


@dataclass(frozen=True, eq=False)
class Seen:
    """Frozen features (N, F) of images, by tap, and their labels (N,) int64."""

    taps: Taps
    labels_N: Tensor

    def __len__(self) -> int:
        return len(self.labels_N)


def calibrate(
    backbone: Backbone, fit: Seen, held_out: Seen | None, settings: TrainSettings, *, team: Team
) -> tuple[TaskSelector, Calibration]:
    """Fit the selector that the settings name.

    Args:
        backbone: where its reference comes from, if it needs one.
        fit: what was learnt from.
        held_out: what calibrates; None, or too few to promise alpha: folds of all there are.
        settings: of the run.
        team: its processes share the work.
    """
    run = FITS[settings.selector]
    fit = _of(run.taps, fit)
    held_out = None if held_out is None else _of(run.taps, held_out)
    if held_out is not None and run.promises and not _can_promise(settings.alpha, len(held_out)):
        fit, held_out = _together(fit, held_out), None
    selector = run(
        fit.taps,
        fit.labels_N,
        None if held_out is None else held_out.taps,
        alpha=settings.alpha,
        seed=settings.seed,
        iterations=settings.ddas_iterations,
        reference=load_reference(backbone),
        team=team,
    )
    measured = held_out or fit
    promise = "split conformal" if held_out else "cross-fitted conformal"
    return selector, Calibration(
        method=promise if run.promises else "against a reference, measured and not promised",
        images=len(measured),
        false_reject_rate=false_reject_rate(selector, measured.taps),
    )


def _of(names: Sequence[str], seen: Seen) -> Seen:
    return Seen({name: seen.taps[name] for name in names}, seen.labels_N)


def _together(one: Seen, other: Seen) -> Seen:
    taps = {name: torch.cat([tap_NF, other.taps[name]]) for name, tap_NF in one.taps.items()}
    return Seen(taps, torch.cat([one.labels_N, other.labels_N]))


def _can_promise(alpha: float, held_out: int) -> bool:
    """Whether so many held-out images are enough to promise alpha."""
    return conformal_threshold(torch.zeros(held_out), alpha) != math.inf
