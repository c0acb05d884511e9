"""DDAS, the selector: which task knows this kind of picture, or none.

A level is one frozen feature with one autoencoder. A task's selector adds up the scores of its
levels and compares the sum with a threshold; the bank does so for all live tasks at once. Fitting
and calibration are in `trainer/ddas.py`; the features come from `RoutedModel.frozen`.

Legend: B images, T tasks, F feature width, C code width, N calibration images.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from kernels.autoencoder_errors import autoencoder_errors
from medley.routed import ZERO_SHOT

__all__ = ["Level", "SelectorBank", "TaskSelector", "conformal_threshold", "fixed_threshold"]

_TENSORS = ("mean_F", "std_F", "encoder_FC", "encoder_bias_C", "decoder_CF", "decoder_bias_F")
_SMALLEST_ERROR = torch.finfo(torch.float32).tiny  # keeps the logarithm finite


@dataclass(frozen=True, eq=False)
class Level:
    """One feature's autoencoder, and what makes its error a score: (log error - center) / spread.

    Raises:
        ValueError: the tensors do not fit each other, or center and spread are not finite numbers,
            or spread is not positive.
    """

    feature: str  # name of a tap, such as "stem:mean_std"
    mean_F: Tensor
    std_F: Tensor
    encoder_FC: Tensor
    encoder_bias_C: Tensor
    decoder_CF: Tensor
    decoder_bias_F: Tensor
    center: float
    spread: float

    def __post_init__(self) -> None:
        if self.encoder_FC.ndim != 2:
            raise ValueError(
                f"{self.feature}: encoder has {self.encoder_FC.ndim} dimensions, not 2"
            )
        F, C = self.encoder_FC.shape
        expected = ((F,), (F,), (F, C), (C,), (C, F), (F,))
        for name, tensor, shape in zip(_TENSORS, self.tensors, expected, strict=True):
            if tensor.shape != shape:
                raise ValueError(
                    f"{self.feature}: {name} has shape {tuple(tensor.shape)}, expected {shape}"
                )
        if not (math.isfinite(self.center) and math.isfinite(self.spread) and self.spread > 0):
            raise ValueError(
                f"{self.feature}: center {self.center} and spread {self.spread} must be finite, "
                "spread positive"
            )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The autoencoder, in the order that `autoencoder_errors` takes it."""
        return tuple(getattr(self, name) for name in _TENSORS)

    @property
    def code_size(self) -> int:
        """Width of the bottleneck, C."""
        return self.encoder_FC.shape[1]


@dataclass(frozen=True, eq=False)
class TaskSelector:
    """One task's levels and the threshold on the sum of their scores.

    Attributes:
        levels: at least one.
        threshold: an image is accepted if its score is at most this.
        alpha: the share of the task's own images that it may refuse; None where the threshold was
            set by hand (see `fixed_threshold`).

    Raises:
        ValueError: no level, or the threshold is not a number.
    """

    levels: tuple[Level, ...]
    threshold: float
    alpha: float | None

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("a selector needs at least one level")
        if math.isnan(self.threshold):
            raise ValueError("the threshold is not a number")

    def scores(self, taps: Mapping[str, Tensor]) -> Tensor:
        """Score frozen features {tap: (B, F)}; return float32 (B,), as a bank would."""
        features_BF = taps[self.levels[0].feature]
        bank = SelectorBank(features_BF.device)
        bank.add(0, self)
        scores_B1, _ = bank.scores(taps, len(features_BF))
        return scores_B1[:, 0]


class SelectorBank:
    """The selectors of all live tasks, stacked so that levels of one shape are scored by one op.

    It belongs to the thread that owns the model: `add` and `remove` come between batches, `scores`
    and `decide` within one.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self._device = torch.device(device)
        self._selectors: dict[int, TaskSelector] = {}
        self._stack()

    @property
    def tasks(self) -> tuple[int, ...]:
        """The path of each column, ascending."""
        return tuple(sorted(self._selectors))

    @property
    def taps(self) -> tuple[str, ...]:
        """The features that some live task looks at, sorted."""
        return tuple(sorted({group.feature for group in self._groups}))

    def add(self, path: int, selector: TaskSelector) -> None:
        """Let a task take part.

        Raises:
            ValueError: the path is taken, or not a task's.
        """
        if path < 0 or path in self._selectors:
            raise ValueError(f"path {path} is {'taken' if path >= 0 else 'not that of a task'}")
        self._selectors[path] = selector
        self._stack()

    def remove(self, path: int) -> None:
        """Let a task leave.

        Raises:
            KeyError: no task has this path.
        """
        del self._selectors[path]
        self._stack()

    def scores(self, taps: Mapping[str, Tensor], batch_size: int) -> tuple[Tensor, Tensor]:
        """Score every image under every task.

        A task's scores do not depend by a bit on the other tasks, nor an image's on the other
        images of a batch of the same size.

        Args:
            taps: frozen features (B, F) by name; at least `self.taps`.
            batch_size: B, which an empty bank, looking at no feature, could not know.

        Returns:
            scores_BT float32, smaller is more familiar, and accepted_BT bool; columns in the order
            of `tasks`. A score that is not finite is never accepted.

        Raises:
            KeyError: a feature is missing.
            ValueError: a feature does not have the width that a task's autoencoder has.
        """
        scores_BT = torch.zeros(batch_size, len(self._selectors), device=self._device)
        for group in self._groups:
            scores_BT.index_add_(1, group.columns_G, group.scores(taps[group.feature]))
        return scores_BT, (scores_BT <= self._thresholds_T) & scores_BT.isfinite()

    def decide(self, scores_BT: Tensor, accepted_BT: Tensor, eligible_BT: Tensor) -> Tensor:
        """Give each image the path of the most familiar task that accepts it and may have it.

        Returns:
            path_B, int64; ZERO_SHOT where there is no such task.
        """
        if not self._selectors:
            return torch.full((len(eligible_BT),), ZERO_SHOT, device=self._device)
        claimed_BT = accepted_BT & eligible_BT
        best_B = scores_BT.masked_fill(~claimed_BT, torch.inf).argmin(1)
        return torch.where(claimed_BT.any(1), self._paths_T[best_B], ZERO_SHOT)

    def _stack(self) -> None:
        alike: dict[tuple[str, int, int], list[tuple[int, Level]]] = defaultdict(list)
        for column, path in enumerate(self.tasks):
            for level in self._selectors[path].levels:
                alike[level.feature, *level.encoder_FC.shape].append((column, level))
        # Sorted, so that the levels of a task are added up in one order whoever else is there.
        self._groups = [_Group.stack(alike[key], self._device) for key in sorted(alike)]
        thresholds = [self._selectors[path].threshold for path in self.tasks]
        self._thresholds_T = torch.tensor(thresholds, dtype=torch.float32, device=self._device)
        self._paths_T = torch.tensor(self.tasks, dtype=torch.int64, device=self._device)


def conformal_threshold(scores_N: Tensor, alpha: float) -> float:
    """Return the threshold under which a task refuses at most the share alpha of its own images.

    Split conformal: accept if and only if the score is at most the k-th smallest calibration score,
    k = ceil((N + 1)(1 - alpha)); infinity where k > N, since so few scores cannot promise so much.
    If a new image of the task is exchangeable with the calibration images, and the score was not
    chosen by looking at them, then P(refused) <= 1 - k / (N + 1) <= alpha, over the draw of both,
    whatever the score is. Nothing is said about images of other tasks.

    Raises:
        ValueError: alpha is not within (0, 1), or a score is not a number.

    Source: Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, 2005.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}, must lie between 0 and 1")
    if scores_N.isnan().any():
        raise ValueError("a calibration score is not a number")
    # Exact arithmetic on the decimal as written: in floats the product may miss an integer.
    k = math.ceil((len(scores_N) + 1) * (1 - Fraction(str(alpha))))
    return math.inf if k > len(scores_N) else float(scores_N.sort().values[k - 1])


def fixed_threshold(selector: TaskSelector, error: float) -> TaskSelector:
    """Return the paper's rule on the selector's first level: accept a plain error up to `error`.

    The logarithm changes neither who is accepted nor whose error is least, so the rule is one
    level with center 0 and spread 1. For features scaled as the paper's the error is 0.0655.

    Raises:
        ValueError: the error is not positive.
    """
    if error <= 0:
        raise ValueError(f"the threshold on the error is {error}, must be positive")
    level = replace(selector.levels[0], center=0.0, spread=1.0)
    return TaskSelector((level,), threshold=math.log(error), alpha=None)


@dataclass(frozen=True, eq=False)
class _Group:
    """G levels of one feature and one shape, and the columns of the tasks they belong to."""

    feature: str
    columns_G: Tensor
    autoencoders: tuple[Tensor, ...]
    center_G: Tensor
    spread_G: Tensor

    @classmethod
    def stack(cls, members: Sequence[tuple[int, Level]], device: torch.device) -> _Group:
        columns, levels = zip(*members, strict=True)
        tensors = zip(*(level.tensors for level in levels), strict=True)
        return cls(
            feature=levels[0].feature,
            columns_G=torch.tensor(columns, device=device),
            autoencoders=tuple(torch.stack(t).to(device, torch.float32) for t in tensors),
            center_G=torch.tensor([level.center for level in levels], device=device),
            spread_G=torch.tensor([level.spread for level in levels], device=device),
        )

    def scores(self, features_BF: Tensor) -> Tensor:
        errors_BG = autoencoder_errors(features_BF, *self.autoencoders)
        return (errors_BG.clamp_min(_SMALLEST_ERROR).log() - self.center_G) / self.spread_G
