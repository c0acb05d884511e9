"""Selectors by name: which features each looks at, and how it is fitted on a task's own images.

The compared ones and the default. Autoencoders and promises are `trainer/ddas.py`, densities
`trainer/gaussians.py`, what stands for pictures of no task `trainer/reference.py`;
`docs/adr/0012-selectors.md` says which is best and why.

Legend: N images, F feature width, K classes, T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from medley.errors import DataError
from medley.levels import AutoencoderLevel, GaussianLevel, Level, PrototypeLevel
from medley.routed import ZERO_SHOT
from medley.selector import STRICTLY_LESS, TaskSelector, conformal_threshold
from trainer.ddas import (
    DEFAULT_ALPHA,
    DEFAULT_FEATURES,
    DEFAULT_ITERATIONS,
    FitLevels,
    Taps,
    calibrated,
    fit_plain_level,
    fit_selector,
)
from trainer.distributed import ALONE, Team
from trainer.gaussians import Gaussian, class_level, strength_of_prior
from trainer.reference import FEATURES, PAPER, Reference

__all__ = ["FITS", "Fit", "batch_paths", "fit_paper"]

EMBEDDING = "embedding"
LEAST_IMAGES = 2  # a covariance needs two


@dataclass(frozen=True, kw_only=True)
class _Given:
    """What a selector is fitted to; see `Fit`."""

    taps_fit: Taps
    labels_N: Tensor
    taps_calibration: Taps | None
    alpha: float
    seed: int
    iterations: int
    reference: Reference | None
    team: Team

    def calibrated(self, fit: FitLevels) -> TaskSelector:
        return calibrated(
            fit,
            self.taps_fit,
            self.labels_N,
            self.taps_calibration,
            alpha=self.alpha,
            seed=self.seed,
            team=self.team,
        )


@dataclass(frozen=True)
class Fit:
    """A kind of selector.

    Attributes:
        taps: the frozen features that it needs.
        run: makes one.
        needs_reference: whether the backbone must have a reference.
        promises: whether it refuses at most alpha of its own; otherwise that is only measured.
    """

    taps: tuple[str, ...]
    run: Callable[[_Given], TaskSelector]
    needs_reference: bool = False
    promises: bool = True

    def __call__(
        self,
        taps_fit: Taps,
        labels_N: Tensor,
        taps_calibration: Taps | None,
        *,
        alpha: float = DEFAULT_ALPHA,
        seed: int = 0,
        iterations: int = DEFAULT_ITERATIONS,
        reference: Reference | None = None,
        team: Team = ALONE,
    ) -> TaskSelector:
        """Fit a selector.

        Args:
            taps_fit: features (N, F) by name; at least `taps`.
            labels_N: classes of the same images.
            taps_calibration: features of other images, or None to cross-fit.
            alpha: the share of its own images that the task may refuse, where that is promised.
            seed: of everything that is random.
            iterations: of an autoencoder.
            reference: of the same backbone.
            team: shares the folds of cross-fitting.

        Raises:
            DataError: too few images, or no reference where one is needed.
        """
        if self.needs_reference and reference is None:
            raise DataError("this backbone has no reference: see python -m trainer.reference")
        given = _Given(
            taps_fit=self._seen(taps_fit),
            labels_N=labels_N,
            taps_calibration=None if taps_calibration is None else self._seen(taps_calibration),
            alpha=alpha,
            seed=seed,
            iterations=iterations,
            reference=reference,
            team=team,
        )
        return self.run(given)

    def _seen(self, taps: Taps) -> Taps:
        return {name: taps[name] for name in self.taps}


def fit_paper(
    taps_fit: Mapping[str, Taps],
    taps_calibration: Mapping[str, Taps],
    *,
    reference: Reference,
    against_reference: bool,
    alpha: float = DEFAULT_ALPHA,
    seed: int = 0,
) -> dict[str, TaskSelector]:
    """Fit the paper's rule to all tasks: plain errors on one scale, one threshold for all.

    The threshold is such that all tasks together refuse alpha of their held-out images, which is
    generous: it is set by hand in the paper, and needs every task's images.

    Args:
        taps_fit: by task, features by name; at least `PAPER.feature`.
        taps_calibration: of held-out images, likewise.
        reference: gives the scale, and the autoencoder that stands for no task.
        against_reference: whether an image that is closer to the reference is refused.
        alpha: of all held-out images together.
        seed: of the autoencoders.

    Source: arXiv:2403.11549.
    """
    levels = {
        task: fit_plain_level(
            taps[PAPER.feature],
            PAPER.feature,
            units=reference.units(PAPER.feature),
            code_size=PAPER.code_size,
            seed=seed,
            iterations=PAPER.iterations,
            learning_rate=PAPER.learning_rate,
        )
        for task, taps in taps_fit.items()
    }
    held_out = [_alone(level).scores(taps_calibration[task]) for task, level in levels.items()]
    threshold = conformal_threshold(torch.cat(held_out), alpha)
    plain = {task: TaskSelector((level,), threshold, alpha=None) for task, level in levels.items()}
    if not against_reference:
        return plain
    return {
        task: replace(selector, reference=(reference.paper,), margin=STRICTLY_LESS)
        for task, selector in plain.items()
    }


def batch_paths(selectors: Mapping[str, TaskSelector], taps: Taps, batch_size: int = 128) -> Tensor:
    """Decide as the paper does, for all images of a batch by their mean error.

    Args:
        selectors: from `fit_paper`.
        taps: features (N, F) by name; cut into batches in this order, the last may be smaller.
        batch_size: 128 in the paper.

    Returns:
        path_N, places in `selectors` or `ZERO_SHOT`.
    """
    errors_NT = torch.stack([s.scores(taps).exp() for s in selectors.values()], 1)
    first = next(iter(selectors.values()))
    limit = math.exp(first.threshold)
    other_N = torch.full((len(errors_NT),), math.inf)
    if first.reference:
        other_N = TaskSelector(first.reference, math.inf, alpha=None).scores(taps).exp()
    paths = []
    for errors_BT, other_B in zip(
        errors_NT.split(batch_size), other_N.split(batch_size), strict=True
    ):
        error, place = errors_BT.mean(0).min(0)
        known = bool(error <= limit) and bool(error < other_B.mean())
        paths.append(torch.full((len(errors_BT),), int(place) if known else ZERO_SHOT))
    return torch.cat(paths)


def _ddas(given: _Given) -> TaskSelector:
    return fit_selector(
        given.taps_fit,
        given.taps_calibration,
        alpha=given.alpha,
        seed=given.seed,
        iterations=given.iterations,
        team=given.team,
    )


def _ddas_and_reference(given: _Given) -> TaskSelector:
    assert given.reference is not None
    return replace(_ddas(given), reference=(given.reference.ddas,), margin=0.0)


def _prototype(given: _Given) -> TaskSelector:
    def fit(taps: Taps, labels_N: Tensor) -> tuple[Level, ...]:
        return tuple(_prototypes(name, x_NF, labels_N) for name, x_NF in taps.items())

    return given.calibrated(fit)


def _class_gaussians(given: _Given) -> TaskSelector:
    def fit(taps: Taps, labels_N: Tensor) -> tuple[Level, ...]:
        return tuple(class_level(x_NF, labels_N, name) for name, x_NF in taps.items())

    return given.calibrated(fit)


def _gaussian(given: _Given) -> TaskSelector:
    def fit(taps: Taps, _: Tensor) -> tuple[Level, ...]:
        return tuple(Gaussian.of(x_NF).with_ridge().level(name) for name, x_NF in taps.items())

    return given.calibrated(fit)


def _gaussian_and_reference(given: _Given) -> TaskSelector:
    """Accept what is at least as likely under the task as under the reference; promise nothing.

    A promise never to refuse one's own is what lets a broad task claim everything. Here the
    reference draws the line, and what a task refuses of its own is measured, not set.
    """
    assert given.reference is not None
    taps, priors = given.taps_fit, given.reference.gaussians
    if (count := len(next(iter(taps.values())))) < LEAST_IMAGES:
        raise DataError(f"{count} images are too few for a selector; it needs {LEAST_IMAGES}")
    strength = strength_of_prior(list(taps.values()), [priors[name] for name in taps])
    own = {
        name: Gaussian.of(x_NF).with_prior(priors[name], strength) for name, x_NF in taps.items()
    }
    return TaskSelector(
        tuple(_halved(gaussian.level(name)) for name, gaussian in own.items()),
        threshold=math.inf,
        alpha=None,
        reference=tuple(_halved(priors[name].level(name)) for name in taps),
        margin=0.0,
    )


def _halved(level: GaussianLevel) -> GaussianLevel:
    """Keep the whitening in float16: half the bytes in a bundle.

    Costs 0.1 point of accuracy on the small suite (2026-11). It cannot overflow: the prior's ridge
    bounds the covariance from below.
    """
    return replace(level, whitening_FW=level.whitening_FW.half())


FITS: dict[str, Fit] = {
    "ddas": Fit(DEFAULT_FEATURES, _ddas),
    "ddas+reference": Fit(DEFAULT_FEATURES, _ddas_and_reference, needs_reference=True),
    "prototype": Fit((EMBEDDING,), _prototype),
    "class-gaussians": Fit((EMBEDDING,), _class_gaussians),
    "gaussian": Fit(FEATURES, _gaussian),
    "gaussian+reference": Fit(
        FEATURES, _gaussian_and_reference, needs_reference=True, promises=False
    ),
}


def _prototypes(feature: str, x_NF: Tensor, labels_N: Tensor) -> PrototypeLevel:
    x_NF = normalize(x_NF.detach().to("cpu", torch.float32), dim=1)
    means = [x_NF[labels_N == label].mean(0) for label in labels_N.unique()]
    prototypes_KF = normalize(torch.stack(means), dim=1)
    return PrototypeLevel(feature=feature, center=0.0, spread=1.0, prototypes_KF=prototypes_KF)


def _alone(level: AutoencoderLevel) -> TaskSelector:
    return TaskSelector((level,), math.inf, alpha=None)
