"""What to make of the errors of one or more levels, and how to count what follows from it.

A rule takes the errors that autoencoders made to scores of calibration and test images; `measure`
sets thresholds on the former and decides the latter as `medley/selector.py` does.

Legend: B images, N calibration images, S tasks that images come from, T tasks that score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medley.routed import ZERO_SHOT
from medley.selector import conformal_threshold
from trainer.suite import TASKS

__all__ = ["RULES", "LevelErrors", "Outcome", "Scored", "count", "feature_units", "measure"]

_MIXED = TASKS.index("clipart")


@dataclass(frozen=True)
class LevelErrors:
    """Log errors of one feature's autoencoders, in units of the feature."""

    calibration_TN: list[Tensor]  # each task's images under its own autoencoder
    test_SBT: list[Tensor]  # one (B, T) for each task that images come from, the canary's last
    log_variance_T: list[float]  # of each task's scaling; without it errors are in its units


@dataclass(frozen=True)
class Scored:
    """What a rule makes of the errors; smaller is more familiar."""

    calibration_TN: list[Tensor]
    test_SBT: list[Tensor]


@dataclass(frozen=True)
class Outcome:
    """Shares of test images, by task that they come from.

    Attributes:
        accuracy: reach their own task, all tasks being there.
        false_reject: are refused by their own task.
        accepted_ST: are accepted by task T; the last row is the canary's.
        false_accept: are accepted by some other task when their own is absent.
        narrow_false_accept: the same with clipart absent too, the one task of mixed pictures.
        auroc: how well the best score tells images of the tasks that are there from this task's,
            its own being absent.
        canary: pictures of no task that some task accepts; one number.
    """

    accuracy: list[float]
    false_reject: list[float]
    accepted_ST: list[list[float]]
    false_accept: list[float]
    narrow_false_accept: list[float]
    auroc: list[float]
    canary: list[float]


def feature_units(levels: Sequence[LevelErrors]) -> Scored:
    """Add log errors in units of the feature; the rule that is shipped."""
    return _combined([_affine(level, [(0.0, 1.0)] * len(TASKS)) for level in levels], _add)


def plain_errors(levels: Sequence[LevelErrors]) -> Scored:
    """Add log errors in units of each task's own scaling."""
    return _combined(
        [_affine(level, [(v, 1.0) for v in level.log_variance_T]) for level in levels], _add
    )


def summed_errors(levels: Sequence[LevelErrors]) -> Scored:
    """Add the errors themselves, in units of the features."""
    parts = [_affine(level, [(0.0, 1.0)] * len(TASKS)) for level in levels]
    return _combined(parts, lambda x: x.logsumexp(0))


def standardised(levels: Sequence[LevelErrors]) -> Scored:
    """Add log errors standardised by a third of each task's calibration images."""
    return _combined([_standardised(level) for level in levels], _add)


def worst_level(levels: Sequence[LevelErrors]) -> Scored:
    """The largest of the standardised log errors: every level has to accept."""
    return _combined([_standardised(level) for level in levels], lambda x: x.amax(0))


def p_value(levels: Sequence[LevelErrors]) -> Scored:
    """The share of the task's calibration images that are more familiar than the image."""
    scored = feature_units(levels)
    tables = [scores_N.sort().values for scores_N in scored.calibration_TN]

    def share(scores: Tensor, task: int) -> Tensor:
        return torch.searchsorted(tables[task], scores.contiguous()) / len(tables[task])

    return Scored(
        [share(scores_N, t) for t, scores_N in enumerate(scored.calibration_TN)],
        [
            torch.stack([share(x_BT[:, t], t) for t in range(len(TASKS))], 1)
            for x_BT in scored.test_SBT
        ],
    )


def shared_threshold(levels: Sequence[LevelErrors]) -> Scored:
    """Plain errors and one threshold for all tasks: the paper's, but calibrated on all of them."""
    scored = plain_errors(levels)
    return Scored([torch.cat(scored.calibration_TN)] * len(TASKS), scored.test_SBT)


RULES: dict[str, Callable[[Sequence[LevelErrors]], Scored]] = {
    "feature units": feature_units,
    "plain errors": plain_errors,
    "summed errors": summed_errors,
    "standardised": standardised,
    "worst level": worst_level,
    "p-value": p_value,
    "shared threshold": shared_threshold,
}


def _affine(level: LevelErrors, center_and_spread_T: Sequence[tuple[float, float]]) -> Scored:
    center_T, spread_T = torch.tensor(center_and_spread_T).unbind(1)
    return Scored(
        [
            (scores_N - center) / spread
            for scores_N, center, spread in zip(
                level.calibration_TN, center_T, spread_T, strict=True
            )
        ],
        [(scores_BT - center_T) / spread_T for scores_BT in level.test_SBT],
    )


def _standardised(level: LevelErrors) -> Scored:
    thirds = [len(scores_N) // 3 for scores_N in level.calibration_TN]
    for_scale = [x[:third] for x, third in zip(level.calibration_TN, thirds, strict=True)]
    scored = _affine(level, [(float(x.mean()), float(x.std())) for x in for_scale])
    rest = [x[third:] for x, third in zip(scored.calibration_TN, thirds, strict=True)]
    return Scored(rest, scored.test_SBT)


def _combined(parts: Sequence[Scored], combine: Callable[[Tensor], Tensor]) -> Scored:
    calibration = zip(*(part.calibration_TN for part in parts), strict=True)
    test = zip(*(part.test_SBT for part in parts), strict=True)
    return Scored(
        [combine(torch.stack(x)) for x in calibration], [combine(torch.stack(x)) for x in test]
    )


def _add(scores_L: Tensor) -> Tensor:
    return scores_L.sum(0)


def measure(scored: Scored, alpha: float) -> Outcome:
    """Set each task's threshold at alpha, decide, and count."""
    thresholds_T = torch.tensor([conformal_threshold(x, alpha) for x in scored.calibration_TN])
    accepted_SBT = [x_BT <= thresholds_T for x_BT in scored.test_SBT]
    decided_SB = [
        _decided(x_BT, accepted_BT)
        for x_BT, accepted_BT in zip(scored.test_SBT, accepted_SBT, strict=True)
    ]
    return count(scored.test_SBT, accepted_SBT, decided_SB)


def count(
    scores_SBT: Sequence[Tensor], accepted_SBT: Sequence[Tensor], decided_SB: Sequence[Tensor]
) -> Outcome:
    """Count what became of the images; the canary's come last."""
    own = range(len(TASKS))
    return Outcome(
        accuracy=[_share(decided_SB[task] == task) for task in own],
        false_reject=[_share(~accepted_SBT[task][:, task]) for task in own],
        accepted_ST=[accepted_BT.double().mean(0).tolist() for accepted_BT in accepted_SBT],
        false_accept=[_share(_without(accepted_SBT[task], task).any(1)) for task in own],
        narrow_false_accept=[
            _share(_without(accepted_SBT[task], task, _MIXED).any(1)) for task in own
        ],
        auroc=[_auroc(scores_SBT, task) for task in own],
        canary=[_share(accepted_SBT[-1].any(1))],
    )


def _decided(scores_BT: Tensor, accepted_BT: Tensor) -> Tensor:
    best_B = scores_BT.masked_fill(~accepted_BT, torch.inf).argmin(1)
    return best_B.where(accepted_BT.any(1), ZERO_SHOT)


def _share(hits_B: Tensor) -> float:
    return float(hits_B.double().mean())


def _without(table_BT: Tensor, *tasks: int) -> Tensor:
    return table_BT[:, [column for column in range(table_BT.shape[1]) if column not in tasks]]


def _auroc(test_SBT: Sequence[Tensor], absent: int) -> float:
    best = [_without(x_BT, absent).amin(1) for x_BT in test_SBT[: len(TASKS)]]
    unknown_B = best.pop(absent)
    known = torch.cat(best).sort().values
    below = torch.searchsorted(known, unknown_B) + torch.searchsorted(known, unknown_B, right=True)
    return float((below / 2 / len(known)).mean())
