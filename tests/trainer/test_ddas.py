"""A fitted selector knows its own pictures, refuses others, and keeps its promise on fresh ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from medley.errors import DataError
from medley.levels import AutoencoderLevel
from medley.selector import TaskSelector
from trainer.ddas import false_reject_rate, fit_level, fit_selector

WIDTHS = {"stem:mean": 24, "block2:mean": 16}


def _taps(task: int, count: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Frozen features of one task: a few hidden causes, mixed in a way of its own, and noise."""
    taps = {}
    for feature, F in WIDTHS.items():
        mixing = torch.Generator().manual_seed(task)
        causes = torch.Generator().manual_seed(1000 * task + seed + 1)
        mixing_KF = torch.randn(4, F, generator=mixing)
        shift_F = torch.randn(F, generator=mixing)
        cause_NK = torch.randn(count, 4, generator=causes)
        taps[feature] = (
            cause_NK @ mixing_KF + shift_F + 0.3 * torch.randn(count, F, generator=causes)
        )
    return taps


def _fit(
    taps_fit: dict[str, Tensor],
    taps_calibration: dict[str, Tensor] | None,
    *,
    alpha: float = 0.05,
    seed: int = 0,
    iterations: int = 150,
) -> TaskSelector:
    return fit_selector(
        taps_fit,
        taps_calibration,
        features=tuple(WIDTHS),
        code_size=12,
        alpha=alpha,
        seed=seed,
        iterations=iterations,
    )


@pytest.fixture(scope="module")
def selector() -> TaskSelector:
    return _fit(_taps(1, 300), _taps(1, 150, seed=7))


def test_it_accepts_its_own_pictures_and_refuses_others(selector: TaskSelector) -> None:
    assert false_reject_rate(selector, _taps(1, 1000, seed=8)) < 0.12
    assert false_reject_rate(selector, _taps(2, 1000)) > 0.95


def test_it_has_a_level_for_each_feature_of_the_size_asked_for(selector: TaskSelector) -> None:
    assert [level.feature for level in selector.levels] == list(WIDTHS)
    sizes = [x.code_size for x in selector.levels if isinstance(x, AutoencoderLevel)]
    assert sizes == [12] * len(WIDTHS)
    assert selector.alpha == 0.05


def test_fitting_lowers_the_error() -> None:
    taps, fresh = _taps(1, 300), _taps(1, 200, seed=9)
    for feature in WIDTHS:
        first, last = (
            TaskSelector(
                (fit_level(taps[feature], feature, code_size=12, seed=0, iterations=n),),
                threshold=0.0,
                alpha=None,
            )
            for n in (1, 150)
        )
        assert last.scores(fresh).mean() < first.scores(fresh).mean() - 0.5


def test_scores_are_in_units_that_tasks_share() -> None:
    # The same pictures seen by a task whose feature varies ten times as much: the autoencoder's
    # own error is the same, the score says that its mistakes are a hundred times as large.
    taps, fresh = _taps(1, 200), _taps(1, 50, seed=9)
    wide, wide_fresh = ({k: 10 * v for k, v in t.items()} for t in (taps, fresh))
    narrow_B, wide_B = _fit(taps, taps).scores(fresh), _fit(wide, wide).scores(wide_fresh)
    expected_B = narrow_B + len(WIDTHS) * math.log(100)
    torch.testing.assert_close(wide_B, expected_B, atol=0.02, rtol=0)  # Adam amplifies rounding


def test_equal_seeds_give_equal_bits_and_other_seeds_other_ones() -> None:
    first, again, other = (_fit(_taps(1, 60), _taps(1, 60, seed=7), seed=s) for s in (3, 3, 4))
    assert first.threshold == again.threshold != other.threshold
    for a, b, c in zip(first.levels, again.levels, other.levels, strict=True):
        assert (a.center, a.spread) == (b.center, b.spread)
        assert all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))
        assert not any(torch.equal(x, y) for x, y in zip(a.tensors[2:], c.tensors[2:], strict=True))


def test_fitting_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    _fit(_taps(1, 40), None, iterations=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_promise_holds_on_fresh_pictures_although_the_autoencoders_overfit() -> None:
    # 40 tasks, each fitted on 30 images and calibrated on 40: the threshold's rank is 37 of 41, so
    # a task's rate is distributed as Beta(4, 37).
    mean, deviation = 4 / 41, math.sqrt(4 * 37 / (41**2 * 42))
    rates = []
    for task in range(40):
        selector = _fit(_taps(task, 30), _taps(task, 40, seed=1), alpha=0.1, iterations=60)
        rates.append(false_reject_rate(selector, _taps(task, 500, seed=2)))
    assert abs(sum(rates) / 40 - mean) <= 4 * deviation / math.sqrt(40)


def test_few_pictures_are_scored_by_autoencoders_that_have_not_seen_them() -> None:
    crossed, seen = [], []
    for task in range(2):
        taps, fresh = _taps(task, 20), _taps(task, 500, seed=5)
        crossed.append(false_reject_rate(_fit(taps, None, alpha=0.1), fresh))
        seen.append(false_reject_rate(_fit(taps, taps, alpha=0.1), fresh))
    # A task's rate scatters around 2 / 21 with a deviation of 0.06; twenty pictures that were
    # fitted and then set the threshold themselves miss it by far.
    assert sum(crossed) / 2 <= 0.1 + 3 * 0.06 / math.sqrt(2)
    assert sum(seen) / 2 > 0.3


def test_a_promise_that_so_few_pictures_cannot_keep_is_weakened_and_said() -> None:
    selector = _fit(_taps(1, 30), _taps(1, 10, seed=1), alpha=0.02)
    assert selector.alpha == pytest.approx(1 / 11)
    assert math.isfinite(selector.threshold)
    assert _fit(_taps(1, 2), None, alpha=0.02).alpha == pytest.approx(1 / 3)


def test_features_that_never_vary_do_not_break_the_selector() -> None:
    taps = _taps(1, 60)
    for x_NF in taps.values():
        x_NF[:, 0] = 3.0
    selector = _fit(taps, None, iterations=5)
    assert selector.scores(taps).isfinite().all()
    constant = _fit({f: torch.ones(10, F) for f, F in WIDTHS.items()}, None, iterations=5)
    assert constant.scores(taps).isfinite().all()


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_pictures_are_refused(count: int) -> None:
    with pytest.raises(DataError, match="too few for a selector"):
        _fit(_taps(1, count), None)


def test_no_picture_to_calibrate_on_is_refused() -> None:
    with pytest.raises(DataError, match="too few for a selector"):
        _fit(_taps(1, 20), _taps(1, 0))


def test_features_of_different_pictures_are_refused() -> None:
    taps = _taps(1, 20)
    taps["block2:mean"] = taps["block2:mean"][:10]
    with pytest.raises(ValueError, match="different numbers of images"):
        _fit(taps, None)
