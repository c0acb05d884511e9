"""DDAS, the selector: which task knows this kind of picture, or none.

A task's selector adds up the scores of its levels (`medley/levels.py`) and compares the sum with a
threshold, and with the score of a reference if it has one; the bank does so for all live tasks at
once. Fitting and calibration are in `trainer/ddas.py`; features come from `RoutedModel.frozen`.

Legend: B images, P paths that there may be, T tasks, R references, G levels of a group, F feature
width, N calibration images.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from medley.levels import Level, Scored
from medley.routed import ZERO_SHOT

__all__ = [
    "DECIDE",
    "STRICTLY_LESS",
    "SelectorBank",
    "TaskSelector",
    "conformal_threshold",
    "fixed_threshold",
]

DECIDE = -2  # in place of a path: whatever the selectors say

# The margin of an image that must score strictly less than under the reference: no two different
# scores lie so close.
STRICTLY_LESS = -torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class TaskSelector:
    """One task's levels, the threshold on the sum of their scores, and maybe a reference.

    A reference stands for pictures of no task. Without one, an image that is easy for every
    selector is familiar to all; with one, it must also be more familiar than to the reference.

    Attributes:
        levels: at least one.
        threshold: an image is accepted if its score is at most this,
        alpha: the share of the task's own images that it may refuse; None where the threshold was
            set by hand (see `fixed_threshold`).
        reference: other levels, added up likewise, which no image is given to.
        margin: and if score - reference score is at most this. Only with a reference, and always.
            The paper's rule, arXiv:2403.11549, is `STRICTLY_LESS`: in a tie the reference wins.

    Raises:
        ValueError: no level, the threshold is not a number or the margin not a finite one, or only
            one of reference and margin.
    """

    levels: tuple[Level, ...]
    threshold: float
    alpha: float | None
    reference: tuple[Level, ...] = ()
    margin: float | None = None

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("a selector needs at least one level")
        if math.isnan(self.threshold):
            raise ValueError("the threshold is not a number")
        if bool(self.reference) == (self.margin is None):
            raise ValueError("a reference needs a margin, and a margin a reference")
        if self.margin is not None and not math.isfinite(self.margin):
            raise ValueError(f"the margin {self.margin} is not a finite number")

    def scores(self, taps: Mapping[str, Tensor]) -> Tensor:
        """Score frozen features {tap: (B, F)}; return float32 (B,), as a bank would."""
        return self._alone(taps)[0]

    def accepted(self, taps: Mapping[str, Tensor]) -> Tensor:
        """Tell which images are accepted; return bool (B,), as a bank would."""
        return self._alone(taps)[1]

    def _alone(self, taps: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        features_BF = taps[self.levels[0].feature]
        bank = SelectorBank(features_BF.device)
        bank.add(0, self)
        scores_B1, accepted_B1 = bank.scores(taps, len(features_BF))
        return scores_B1[:, 0], accepted_B1[:, 0]


class SelectorBank:
    """The selectors of all live tasks, stacked so that levels of one shape are scored by one op.

    It belongs to the thread that owns the model: `add` and `remove` come between batches, `scores`
    and `decide` within one.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self._device = torch.device(device)
        self._selectors: dict[int, TaskSelector] = {}
        self.changes = 0  # how often a task has come or gone; what was captured before is stale
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
        self.add_all({path: selector})

    def add_all(self, selectors: Mapping[int, TaskSelector]) -> None:
        """Let tasks take part by path; everything is stacked once, and not once for each.

        Raises:
            ValueError: a path is taken, or not a task's. Nothing has changed.
        """
        for path in selectors:
            if path < 0 or path in self._selectors:
                raise ValueError(f"path {path} is {'taken' if path >= 0 else 'not that of a task'}")
        for path, selector in selectors.items():
            self._selectors[path] = self._shared(selector)
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
            ValueError: a feature does not have the width that a task's level has.
        """
        T = len(self._selectors)
        scores_BX = torch.zeros(batch_size, T + self._num_references, device=self._device)
        for group in self._groups:
            scores_BX.index_add_(1, group.columns_G, group.scores(taps[group.feature]))
        scores_BT, reference_BT = scores_BX[:, :T], scores_BX[:, self._reference_T]
        accepted_BT = (scores_BT <= self._thresholds_T) & scores_BT.isfinite()
        return scores_BT, accepted_BT & (scores_BT - reference_BT <= self._margins_T)

    def decide(self, scores_BT: Tensor, accepted_BT: Tensor, eligible_BT: Tensor) -> Tensor:
        """Give each image the path of the most familiar task that accepts it and may have it.

        Returns:
            path_B, int64; ZERO_SHOT where there is no such task.
        """
        if not self._selectors:
            return torch.full((len(eligible_BT),), ZERO_SHOT, device=self._device)
        claimed_BT = accepted_BT & eligible_BT
        best_B = scores_BT.masked_fill(~claimed_BT, torch.inf).argmin(1)
        return torch.where(claimed_BT.any(1), self.paths_T[best_B], ZERO_SHOT)

    def route(
        self, taps: Mapping[str, Tensor], told_B: Tensor, eligible_BP: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Score a batch and settle each image's path; nothing is read back to the host.

        Args:
            taps: frozen features (B, F) by name; at least `self.taps`.
            told_B: int64, a path or ZERO_SHOT, which stands, or DECIDE.
            eligible_BP: bool, which paths an image may be given; P is beyond every task's path.

        Returns:
            paths_B int64, and scores_BT and accepted_BT as `scores` gives them.
        """
        scores_BT, accepted_BT = self.scores(taps, len(told_B))
        eligible_BT = eligible_BP.index_select(1, self.paths_T)
        chosen_B = self.decide(scores_BT, accepted_BT, eligible_BT)
        return torch.where(told_B == DECIDE, chosen_B, told_B), scores_BT, accepted_BT

    def _shared(self, selector: TaskSelector) -> TaskSelector:
        """Let it use a reference that is here already: tasks of one base bring the same one."""
        here = (s.reference for s in self._selectors.values())
        same = (reference for reference in here if _same(reference, selector.reference))
        return replace(selector, reference=next(same, selector.reference))

    def _stack(self) -> None:
        """Give every task a column, and after them every reference; a task without is its own."""
        selectors = [self._selectors[path] for path in self.tasks]
        levels = [(t, level) for t, selector in enumerate(selectors) for level in selector.levels]
        own = dict.fromkeys(selector.reference for selector in selectors if selector.reference)
        column = {reference: len(selectors) + r for r, reference in enumerate(own)}
        levels += [(x, level) for reference, x in column.items() for level in reference]
        alike: dict[tuple[str | int, ...], list[tuple[int, Level]]] = defaultdict(list)
        seen: Counter[tuple[str | int, ...]] = Counter()
        for x, level in levels:
            # A column once in a group: a device adds up what meets there in any order.
            seen[x, *level.group] += 1
            alike[*level.group, seen[x, *level.group]].append((x, level))
        # Sorted, so that the levels of a task are added up in one order whoever else is there.
        self._groups = [_Group.stack(alike[key], self._device) for key in sorted(alike)]
        self._num_references = len(column)
        self.changes += 1
        self._reference_T = self._tensor(
            [column.get(selector.reference, t) for t, selector in enumerate(selectors)],
            torch.int64,
        )
        self._thresholds_T = self._tensor([s.threshold for s in selectors])
        self._margins_T = self._tensor(
            [math.inf if s.margin is None else s.margin for s in selectors]
        )
        self.paths_T = self._tensor(self.tasks, torch.int64)

    def _tensor(self, values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)


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


def _same(a: tuple[Level, ...], b: tuple[Level, ...]) -> bool:
    return len(a) == len(b) and all(x.same(y) for x, y in zip(a, b, strict=True))


@dataclass(frozen=True, eq=False)
class _Group:
    """G levels that are scored together, and the columns they belong to."""

    feature: str
    columns_G: Tensor
    scores: Scored

    @classmethod
    def stack(cls, members: Sequence[tuple[int, Level]], device: torch.device) -> _Group:
        columns, levels = zip(*members, strict=True)
        scores = type(levels[0]).scorer(levels, device)
        return cls(levels[0].feature, torch.tensor(columns, device=device), scores)
