"""Fits the autoencoders of DDAS, and thresholds that keep a promise.

It sees frozen features of the task's own training images and nothing else: no images of other
tasks, no reference set. The selector itself is `medley/selector.py`, the kinds that are not made of
autoencoders are in `trainer/selectors.py`. The defaults come from the experiment in
`trainer/experiments/routing`; `docs/adr/0006-ddas-features.md` says why.

Legend: N images, F feature width, C code width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler

from medley.errors import DataError
from medley.levels import AutoencoderLevel, Level
from medley.selector import TaskSelector, conformal_threshold
from trainer.distributed import ALONE, Team

__all__ = [
    "DEFAULT_ALPHA",
    "DEFAULT_CODE_SIZE",
    "DEFAULT_FEATURES",
    "DEFAULT_ITERATIONS",
    "FitLevels",
    "Taps",
    "calibrated",
    "false_reject_rate",
    "fit_level",
    "fit_plain_level",
    "fit_selector",
]

DEFAULT_FEATURES = ("block1:mean",)
DEFAULT_CODE_SIZE = 32
DEFAULT_ALPHA = 0.02
DEFAULT_ITERATIONS = 1000

FOLDS = 5  # of cross-fitting
BATCH = 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-4  # MoE-Adapters, arXiv:2403.11549
# Of a feature's average deviation: what hardly varies in the task must not decide alone.
SMALLEST_STD = 0.05

Taps = Mapping[str, Tensor]
FitLevels = Callable[[Taps, Tensor], tuple[Level, ...]]  # of features and labels of the same images


def fit_selector(
    taps_fit: Taps,
    taps_calibration: Taps | None,
    *,
    features: Sequence[str] = DEFAULT_FEATURES,
    code_size: int = DEFAULT_CODE_SIZE,
    alpha: float = DEFAULT_ALPHA,
    seed: int = 0,
    iterations: int = DEFAULT_ITERATIONS,
    team: Team = ALONE,
) -> TaskSelector:
    """Fit autoencoders on some images of a task and calibrate them on others, see `calibrated`.

    Args:
        taps_fit: frozen features (N, F) by name; at least `features`.
        taps_calibration: the same of other images, or None to cross-fit.
        features: one level for each.
        code_size: C of every level.
        alpha: the share of the task's own images that may be refused.
        seed: decides everything that is random; equal seeds give equal bits on one machine.
        iterations: of each autoencoder's training.
        team: shares the folds of cross-fitting.

    Raises:
        DataError: no image to fit or to calibrate, or fewer than two to cross-fit.
        KeyError: a feature is missing.
    """

    def fit(taps: Taps, _: Tensor) -> tuple[Level, ...]:
        return tuple(
            fit_level(taps[name], name, code_size=code_size, seed=seed, iterations=iterations)
            for name in features
        )

    labels_N = torch.zeros(_count(taps_fit), dtype=torch.int64)
    return calibrated(fit, taps_fit, labels_N, taps_calibration, alpha=alpha, seed=seed, team=team)


def calibrated(
    fit: FitLevels,
    taps_fit: Taps,
    labels_N: Tensor,
    taps_calibration: Taps | None,
    *,
    alpha: float,
    seed: int,
    team: Team = ALONE,
) -> TaskSelector:
    """Fit levels of any kind, and set the threshold that keeps a promise.

    With calibration images, P(a new image of the task is refused) <= alpha is a theorem (see
    `conformal_threshold`), for they have no part in the scores. Without, every image is scored by
    levels of the other four fifths ("cross-fitting"); the promise is then kept in practice but not
    proved, for the selector's own levels have seen all images.

    Args:
        fit: makes levels of features and labels.
        taps_fit: frozen features (N, F) by name.
        labels_N: classes of the same images.
        taps_calibration: features of other images, or None to cross-fit.
        alpha: the share of the task's own images that may be refused. With n scores nothing below
            1 / (n + 1) can be promised; then that is promised, and the selector's `alpha` says so.
        seed: of the folds.
        team: its processes fit different folds.

    Raises:
        DataError: no image to fit or to calibrate, or fewer than two to cross-fit.
    """
    _count(taps_fit)
    levels = fit(taps_fit, labels_N)
    if taps_calibration is None:
        scores_N = _cross_fitted_scores(taps_fit, labels_N, fit, seed, team)
    else:
        _count(taps_calibration)
        scores_N = _scores(levels, taps_calibration)
    threshold = conformal_threshold(scores_N, alpha)
    if threshold == math.inf:
        threshold, alpha = float(scores_N.max()), 1 / (len(scores_N) + 1)
    return TaskSelector(levels, threshold=threshold, alpha=alpha)


def fit_level(
    features_NF: Tensor, feature: str, *, code_size: int, seed: int, iterations: int
) -> AutoencoderLevel:
    """Fit one autoencoder: Adam, batches of 64 drawn with replacement, cosine decay to 0.

    The autoencoder sees the feature in units of its deviation within the task, so its error is in
    units that differ from task to task. The level's center takes them out again: its score is the
    logarithm of the error times the geometric mean of the variances, comparable between tasks.
    """
    x_NF = features_NF.detach().to("cpu", torch.float32)
    mean_F, std_F = _mean_and_std(x_NF)
    return _trained(
        x_NF,
        feature,
        units=(mean_F, std_F),
        center=-2 * float(std_F.log().mean()),
        code_size=code_size,
        seed=seed,
        schedule=lambda optimiser: CosineAnnealingLR(optimiser, iterations),
        learning_rate=LEARNING_RATE,
        iterations=iterations,
    )


def fit_plain_level(
    features_NF: Tensor,
    feature: str,
    *,
    units: tuple[Tensor, Tensor],
    code_size: int,
    seed: int,
    iterations: int,
    learning_rate: float,
) -> AutoencoderLevel:
    """Fit one autoencoder at a constant learning rate, whose score is the plain logarithm of error.

    Args:
        features_NF: of some images.
        feature: their name.
        units: mean and deviation (F,), the same for all that are to be compared.
        code_size: C.
        seed: of everything that is random.
        iterations: batches of 64.
        learning_rate: of Adam.
    """
    return _trained(
        features_NF.detach().to("cpu", torch.float32),
        feature,
        units=units,
        center=0.0,
        code_size=code_size,
        seed=seed,
        schedule=lambda optimiser: ConstantLR(optimiser, factor=1.0),
        learning_rate=learning_rate,
        iterations=iterations,
    )


def false_reject_rate(selector: TaskSelector, taps: Taps) -> float:
    """Share of the task's own images that the selector refuses; NaN of no images."""
    return float((~selector.accepted(taps)).double().mean())


def _trained(
    x_NF: Tensor,
    feature: str,
    *,
    units: tuple[Tensor, Tensor],
    center: float,
    code_size: int,
    seed: int,
    schedule: Callable[[Adam], LRScheduler],
    learning_rate: float,
    iterations: int,
) -> AutoencoderLevel:
    generator = torch.Generator().manual_seed(seed)
    mean_F, std_F = units
    z_NF = (x_NF - mean_F) / std_F
    weights = _initial_weights(x_NF.shape[1], code_size, generator)
    encoder_FC, encoder_bias_C, decoder_CF, decoder_bias_F = weights
    optimiser = Adam(weights, lr=learning_rate, weight_decay=WEIGHT_DECAY)
    rate = schedule(optimiser)
    for _ in range(iterations):
        z_BF = z_NF[torch.randint(len(z_NF), (BATCH,), generator=generator)]
        code_BC = torch.addmm(encoder_bias_C, z_BF, encoder_FC).relu()
        loss = (torch.addmm(decoder_bias_F, code_BC, decoder_CF) - z_BF).square().mean()
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        rate.step()
    return AutoencoderLevel(
        feature=feature,
        mean_F=mean_F,
        std_F=std_F,
        encoder_FC=encoder_FC.detach(),
        encoder_bias_C=encoder_bias_C.detach(),
        decoder_CF=decoder_CF.detach(),
        decoder_bias_F=decoder_bias_F.detach(),
        center=center,
        spread=1.0,
    )


def _mean_and_std(x_NF: Tensor) -> tuple[Tensor, Tensor]:
    std_F = x_NF.std(0, correction=0)
    floor = (SMALLEST_STD * std_F.mean()).clamp_min(torch.finfo(torch.float32).eps)
    return x_NF.mean(0), std_F.maximum(floor)


def _initial_weights(F: int, C: int, generator: torch.Generator) -> list[Tensor]:
    """Weights of two linear layers as PyTorch draws them: uniform within 1 / sqrt(fan-in)."""

    def uniform(*shape: int, fan_in: int) -> Tensor:
        bound = fan_in**-0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator).requires_grad_()

    return [
        uniform(F, C, fan_in=F),
        uniform(C, fan_in=F),
        uniform(C, F, fan_in=C),
        uniform(F, fan_in=C),
    ]


def _scores(levels: tuple[Level, ...], taps: Taps) -> Tensor:
    return TaskSelector(levels, threshold=math.inf, alpha=None).scores(taps)


def _cross_fitted_scores(
    taps: Taps, labels_N: Tensor, fit: FitLevels, seed: int, team: Team
) -> Tensor:
    """Scores (N,) of every image under levels that have not seen it."""
    count = _count(taps, least=2)
    order_N = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    folds = order_N.tensor_split(min(FOLDS, count))

    def scores(held_out: Tensor) -> Tensor:
        others = torch.cat([fold for fold in folds if fold is not held_out])
        return _scores(fit(_rows(taps, others), labels_N[others]), _rows(taps, held_out))

    return torch.cat(team.pooled(map(scores, team.own(folds))))


def _rows(taps: Taps, index: Tensor) -> Taps:
    return {name: x_NF[index] for name, x_NF in taps.items()}


def _count(taps: Taps, *, least: int = 1) -> int:
    counts = {len(x_NF) for x_NF in taps.values()}
    if len(counts) != 1:
        raise ValueError(f"features of different numbers of images: {sorted(counts)}")
    if (count := counts.pop()) < least:
        raise DataError(f"{count} images are too few for a selector; it needs at least {least}")
    return count
