"""Gaussians of frozen features: densities of a task, of its classes, and of what a base has seen.

Statistics and what becomes of them when images are few. Nothing is trained, and nothing decided:
how a selector is put together is `trainer/selectors.py`.

Legend: N images, F feature width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from medley.levels import GaussianLevel, Scale

__all__ = ["STRENGTHS", "Gaussian", "class_level", "strength_of_prior"]

# How many images a prior counts for. The first is chosen by false accepts on held-out training
# images (docs/adr/0012); more of them are a matter of few images, see `strength_of_prior`.
STRENGTHS = (30, 100, 300, 1000)
FOLDS = 4
RIDGE = 0.003  # of the average variance: makes any covariance invertible


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean and covariance, in float64: a covariance of 256 features has a condition of 1e6."""

    mean_F: Tensor
    covariance_FF: Tensor
    images: int

    @classmethod
    def of(cls, x_NF: Tensor) -> Gaussian:
        """The Gaussian that is likeliest to have made these features."""
        x_NF = x_NF.detach().to("cpu", torch.float64)
        mean_F = x_NF.mean(0)
        centred_NF = x_NF - mean_F
        return cls(mean_F, centred_NF.T @ centred_NF / len(x_NF), len(x_NF))

    def with_prior(self, prior: Gaussian, strength: float) -> Gaussian:
        """Count the prior's covariance, around this mean, as that of `strength` more images."""
        weight = strength / (self.images + strength)
        return replace(
            self, covariance_FF=torch.lerp(self.covariance_FF, prior.covariance_FF, weight)
        )

    def with_ridge(self, share: float = RIDGE) -> Gaussian:
        """Mix in a share of a ball of the same average variance: what to do without a prior."""
        return replace(self, covariance_FF=_ridged(self.covariance_FF, share))

    def log_loss(self, x_NF: Tensor) -> float:
        """Minus twice the log density of all features together, up to a constant."""
        lower_FF = torch.linalg.cholesky(self.covariance_FF)
        centred_FN = (x_NF.to(torch.float64) - self.mean_F).T
        z_FN = torch.linalg.solve_triangular(lower_FF, centred_FN, upper=False)
        return float(z_FN.square().sum() + 2 * len(x_NF) * lower_FF.diagonal().log().sum())

    def level(self, feature: str) -> GaussianLevel:
        """A level whose score is minus twice the log density by dimension, up to a constant.

        So the difference of two such scores is a log likelihood ratio.
        """
        return _level(feature, self.mean_F[None], self.covariance_FF, "linear")


def class_level(x_NF: Tensor, labels_N: Tensor, feature: str) -> GaussianLevel:
    """Classes as Gaussians that share a covariance; the score is of the nearest one, logarithmic.

    Source: arXiv:1807.03888.
    """
    x_NF = x_NF.detach().to("cpu", torch.float64)
    _, place_N = labels_N.unique(return_inverse=True)
    means_KF = torch.stack([x_NF[place_N == k].mean(0) for k in range(int(place_N.max()) + 1)])
    within = Gaussian.of(x_NF - means_KF[place_N]).with_ridge()
    return _level(feature, means_KF, within.covariance_FF, "log")


def strength_of_prior(features: Sequence[Tensor], priors: Sequence[Gaussian]) -> float:
    """For how many images each feature's prior is to count.

    With at least two images for every dimension the least strength: a likelier fit would be a wider
    one, which accepts more strangers. With fewer the covariance is mostly the prior's, and what
    decides is that a task knows its own: the strength under which images are likeliest that were
    left out of the fit.

    Args:
        features: (N, F) of each, of the same images.
        priors: one for each.
    """
    N, F = features[0].shape
    if 2 * F <= N:
        return STRENGTHS[0]
    losses = [
        sum(_left_out_loss(x_NF, p, s) for x_NF, p in zip(features, priors, strict=True))
        for s in STRENGTHS
    ]
    return STRENGTHS[losses.index(min(losses))]


def _left_out_loss(x_NF: Tensor, prior: Gaussian, strength: float) -> float:
    """Of every image under what the others were fitted to."""
    fold_N = torch.arange(len(x_NF)) % FOLDS  # every fourth: images may be sorted by class
    return sum(
        Gaussian.of(x_NF[fold_N != fold]).with_prior(prior, strength).log_loss(x_NF[fold_N == fold])
        for fold in range(min(FOLDS, len(x_NF)))
    )


def _ridged(covariance_FF: Tensor, share: float) -> Tensor:
    average = covariance_FF.diagonal().mean().clamp_min(torch.finfo(torch.float32).eps)
    ball_FF = average * torch.eye(len(covariance_FF), dtype=covariance_FF.dtype)
    return torch.lerp(covariance_FF, ball_FF, share)


def _level(feature: str, means_KF: Tensor, covariance_FF: Tensor, scale: Scale) -> GaussianLevel:
    F = len(covariance_FF)
    lower_FF = torch.linalg.cholesky(covariance_FF)
    # covariance = L L^T, so L^-T whitens and (L^-T)(L^-T)^T is the inverse.
    whitening_FW = torch.linalg.inv(lower_FF).T.contiguous()
    return GaussianLevel(
        feature=feature,
        center=-2 * float(lower_FF.diagonal().log().sum()) / F,
        spread=1.0,
        means_KF=means_KF.float(),
        whitening_FW=whitening_FW.float(),
        scale=scale,
    )
