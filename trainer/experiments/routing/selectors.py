"""Every kind of selector on the same images: which one routes best, image by image?

What is chosen is chosen on held-out training images, a fifth of which calibrate and another are
decided (`Choice`); test images are only reported. Through the code that is shipped.

Legend: B images, S tasks that images come from, T tasks that score.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from medley.levels import GaussianLevel
from medley.routed import ZERO_SHOT
from medley.selector import SelectorBank, TaskSelector
from trainer.experiments.routing.bench import SEEDS, Measured
from trainer.experiments.routing.features import Taps, TaskTaps, rows
from trainer.experiments.routing.rules import Outcome, count
from trainer.gaussians import STRENGTHS, Gaussian
from trainer.reference import FEATURES, Reference
from trainer.selectors import FITS, batch_paths, fit_paper
from trainer.suite import TASKS

__all__ = ["DEFAULT", "POLICIES", "Batches", "Choice", "Comparison", "Labels", "Named", "compare"]

FEW = (20, 40, 80, 160)
FEW_FITS = ("ddas", "gaussian", "gaussian+reference")
MARGINS = (-1.0, -0.8, -0.6, -0.4, -0.2, 0.0, 0.2)
WEAKER = 10  # a prior that counts for fewer images than the chosen one
BATCH = 128
DEFAULT = "gaussian+reference"
POLICIES = (
    "no list",
    "only tasks that have all labels",
    "and of the same list without asking the selector",
)


@dataclass(frozen=True)
class Named(Measured):
    """A selector of test images, or a choice about one, of held-out training images."""

    name: str


@dataclass(frozen=True)
class Batches:
    """What the paper's rule does with batches of one data set, means over tasks and seeds."""

    name: str
    accuracy: float
    false_reject: float
    false_accept: float


@dataclass(frozen=True)
class Labels:
    """Shares of images under a policy about the request's label list, means over tasks and seeds.

    Attributes:
        wrong: own images, with the own list, that do not reach their task.
        absent: accepted by some task while the own one is not there.
        strange: pictures of no task, sent with the list of a task, that some task accepts.
    """

    name: str
    wrong: float
    absent: float
    strange: float


@dataclass(frozen=True)
class Comparison:
    """Everything that the page shows."""

    images: dict[str, tuple[int, int, int]]
    selectors: list[Named]
    batches: list[Batches]
    few: list[Named]
    choices: list[Named]
    labels: list[Labels]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Choice:
    """One setting of Gaussians against a reference."""

    features: tuple[str, ...] = FEATURES
    strength: float = STRENGTHS[0]
    margin: float = 0.0
    logarithmic: bool = False

    @property
    def name(self) -> str:
        """For a table."""
        scale = ", logarithmic" if self.logarithmic else ""
        return f"{' + '.join(self.features)}, prior {self.strength}, margin {self.margin:g}{scale}"

    def selector(self, taps_fit: Taps, reference: Reference) -> TaskSelector:
        """Fit it, whatever the defaults are."""
        priors = reference.gaussians

        def level(gaussian: Gaussian, name: str) -> GaussianLevel:
            return replace(gaussian.level(name), scale="log" if self.logarithmic else "linear")

        return TaskSelector(
            tuple(
                level(Gaussian.of(taps_fit[n]).with_prior(priors[n], self.strength), n)
                for n in self.features
            ),
            math.inf,
            alpha=None,
            reference=tuple(level(priors[name], name) for name in self.features),
            margin=self.margin,
        )


Fitted = Callable[[str, int], TaskSelector]  # of a task, with a seed


class _Images:
    """The tasks' features, in the parts that a selector may see."""

    def __init__(self, taps: Mapping[str, TaskTaps], canary: Taps, seeds: Sequence[int]) -> None:
        self.taps, self.canary, self.seeds = taps, canary, tuple(seeds)

    def on_test(self, fitted: Fitted) -> tuple[Outcome, ...]:
        """Fit for each seed and decide test images."""
        tests = [*(task.test for task in self.taps.values()), self.canary]
        return tuple(self._outcome(fitted, seed, tests) for seed in self.seeds)

    def on_held_out(self, fitted: Fitted) -> tuple[Outcome, ...]:
        """Fit for each seed and decide training images that had no part in the fit."""
        return tuple(
            self._outcome(fitted, seed, [*self.held_out(seed), self.canary]) for seed in self.seeds
        )

    def held_out(self, seed: int) -> list[Taps]:
        """The second half of the images to calibrate on, which nothing else looks at."""
        parts = [task.split(seed)[1] for task in self.taps.values()]
        return [rows(x, slice(len(next(iter(x.values()))) // 2, None)) for x in parts]

    def tables(
        self, fitted: Fitted, seed: int, images: Iterable[Taps]
    ) -> tuple[list[Tensor], list[Tensor], SelectorBank]:
        """Scores and acceptances (B, T) of every set of images, and the bank that decides."""
        bank = SelectorBank()
        for path, task in enumerate(self.taps):
            bank.add(path, fitted(task, seed))
        results = [bank.scores(x, len(next(iter(x.values())))) for x in images]
        return [x for x, _ in results], [x for _, x in results], bank

    def _outcome(self, fitted: Fitted, seed: int, images: Sequence[Taps]) -> Outcome:
        scores_SBT, accepted_SBT, bank = self.tables(fitted, seed, images)
        decided_SB = [
            bank.decide(x_BT, a_BT, torch.ones_like(a_BT))
            for x_BT, a_BT in zip(scores_SBT, accepted_SBT, strict=True)
        ]
        return count(scores_SBT, accepted_SBT, decided_SB)


def compare(
    taps: Mapping[str, TaskTaps],
    canary: Taps,
    reference: Reference,
    class_names: Mapping[str, frozenset[str]],
    *,
    seeds: Sequence[int] = SEEDS,
    iterations: int = 1000,
) -> Comparison:
    """Fit and measure everything."""
    images = _Images(taps, canary, seeds)

    def by(name: str, few: int | None = None) -> Fitted:
        def fitted(task: str, seed: int) -> TaskSelector:
            fit, calibration = taps[task].split(seed)
            return FITS[name](
                rows(fit, slice(few)),
                taps[task].labels(seed)[:few],
                calibration,
                seed=seed,
                iterations=iterations,
                reference=reference,
            )

        return fitted

    selectors = [Named(images.on_test(by(name)), name) for name in track(FITS, "selectors")]
    papers = {
        f"paper-1{', reference' if against else ''}": _paper(images, reference, against)
        for against in (False, True)
    }
    return Comparison(
        images={task: x.counts for task, x in taps.items()},
        selectors=[*selectors, *(Named(images.on_test(f), name) for name, f in papers.items())],
        batches=[_batches(images, name.replace("1", "128"), f) for name, f in papers.items()],
        few=[
            Named(images.on_test(by(name, few)), f"{name}, {few}")
            for few in track(FEW, "few images")
            for name in FEW_FITS
        ],
        choices=[_chosen(images, reference, choice) for choice in track(_choices(), "choices")],
        labels=[
            row
            for name in ("ddas", DEFAULT)
            for row in _labels(images, name, by(name), class_names)
        ],
        seconds={name: _seconds(by(name), seeds[0]) for name in FITS},
    )


def _choices() -> list[Choice]:
    plain = Choice()
    return [
        *(replace(plain, features=features) for features in [*((f,) for f in FEATURES), FEATURES]),
        replace(plain, logarithmic=True),
        *(replace(plain, strength=strength) for strength in (WEAKER, *STRENGTHS[1:3])),
        *(replace(plain, margin=margin) for margin in MARGINS if margin),
    ]


def _chosen(images: _Images, reference: Reference, choice: Choice) -> Named:
    def fitted(task: str, seed: int) -> TaskSelector:
        return choice.selector(images.taps[task].split(seed)[0], reference)

    return Named(images.on_held_out(fitted), choice.name)


def _paper(images: _Images, reference: Reference, against_reference: bool) -> Fitted:
    parts = {
        seed: {task: x.split(seed) for task, x in images.taps.items()} for seed in images.seeds
    }
    fitted = {
        seed: fit_paper(
            {task: fit for task, (fit, _) in tasks.items()},
            {task: calibration for task, (_, calibration) in tasks.items()},
            reference=reference,
            against_reference=against_reference,
            seed=seed,
        )
        for seed, tasks in parts.items()
    }
    return lambda task, seed: fitted[seed][task]


def _batches(images: _Images, name: str, fitted: Fitted) -> Batches:
    """Test images in shuffled batches of 128 of one data set; what is left over is not asked."""
    shares = []
    for seed in images.seeds:
        selectors = {task: fitted(task, seed) for task in images.taps}
        for place, (task, own) in enumerate(images.taps.items()):
            whole = len(own.test[FEATURES[0]]) // BATCH * BATCH
            order_N = torch.randperm(whole, generator=torch.Generator().manual_seed(seed))
            shuffled = rows(own.test, order_N)
            there = batch_paths(selectors, shuffled, BATCH)
            absent = {other: x for other, x in selectors.items() if other != task}
            shares.append(
                (
                    float((there == place).double().mean()),
                    float((there == ZERO_SHOT).double().mean()),
                    float((batch_paths(absent, shuffled, BATCH) != ZERO_SHOT).double().mean()),
                )
            )
    accuracy, false_reject, false_accept = np.mean(shares, axis=0).tolist()
    return Batches(name, accuracy, false_reject, false_accept)


def _labels(
    images: _Images, name: str, fitted: Fitted, class_names: Mapping[str, frozenset[str]]
) -> list[Labels]:
    """The same scores under three policies; a request for a data set's images brings its list."""
    names = [class_names[task] for task in images.taps]
    may_ST = torch.tensor([[own <= other for other in names] for own in names])
    same_ST = torch.tensor([[own == other for other in names] for own in names])
    everyone_ST = torch.ones_like(may_ST)
    tables_of_policy = (
        (everyone_ST, ~everyone_ST),
        (may_ST, ~everyone_ST),
        (may_ST, same_ST),
    )
    tests = [*(task.test for task in images.taps.values()), images.canary]
    tables = [images.tables(fitted, seed, tests) for seed in images.seeds]
    found = []
    for policy, (eligible_ST, skipped_ST) in zip(POLICIES, tables_of_policy, strict=True):
        shares = [_shares(*table, eligible_ST, skipped_ST) for table in tables]
        wrong, absent, strange = np.mean(shares, axis=0).tolist()
        found.append(Labels(f"{name}: {policy}", wrong, absent, strange))
    return found


def _shares(
    scores_SBT: list[Tensor],
    accepted_SBT: list[Tensor],
    bank: SelectorBank,
    eligible_ST: Tensor,
    skipped_ST: Tensor,
) -> tuple[float, float, float]:
    T = len(eligible_ST)
    wrong, absent, strange = [], [], []
    for own in range(T):
        eligible_T, skipped_T = eligible_ST[own], skipped_ST[own]
        accepted_BT = accepted_SBT[own] | skipped_T
        path_B = bank.decide(scores_SBT[own], accepted_BT, eligible_T.expand_as(accepted_BT))
        wrong.append(float((path_B != own).double().mean()))
        others_T = eligible_T & (torch.arange(T) != own)
        absent.append(float((accepted_BT & others_T).any(1).double().mean()))
        claimed_BT = (accepted_SBT[-1] | skipped_T) & eligible_T
        strange.append(float(claimed_BT.any(1).double().mean()))
    return float(np.mean(wrong)), float(np.mean(absent)), float(np.mean(strange))


def _seconds(fitted: Fitted, seed: int) -> float:
    """Of one fit, one thread."""
    start = time.process_time()
    fitted(TASKS[0], seed)
    return round(time.process_time() - start, 3)
