"""The selector keeps its promises: the conformal bound, bits that stay, a lawful decision."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from kernels.autoencoder_errors import autoencoder_errors
from medley.levels import AutoencoderLevel
from medley.routed import ZERO_SHOT
from medley.selector import (
    DECIDE,
    STRICTLY_LESS,
    SelectorBank,
    TaskSelector,
    conformal_threshold,
    fixed_threshold,
)
from tests.fakes import LEVEL_KINDS, random_level

WIDTHS = {"stem:mean_std": 48, "block4:mean": 24, "embedding": 32}


def _level(feature: str, *, seed: int, code_size: int = 8) -> AutoencoderLevel:
    g = torch.Generator().manual_seed(seed)
    F, C = WIDTHS[feature], code_size
    return AutoencoderLevel(
        feature=feature,
        mean_F=torch.randn(F, generator=g),
        std_F=torch.rand(F, generator=g) + 0.5,
        encoder_FC=torch.randn(F, C, generator=g) / F**0.5,
        encoder_bias_C=torch.randn(C, generator=g),
        decoder_CF=torch.randn(C, F, generator=g) / C**0.5,
        decoder_bias_F=torch.randn(F, generator=g),
        center=float(torch.randn(1, generator=g)),
        spread=float(torch.rand(1, generator=g)) + 0.1,
    )


def _selector(*features: str, seed: int, threshold: float = 0.0) -> TaskSelector:
    levels = tuple(_level(feature, seed=100 * seed + i) for i, feature in enumerate(features))
    return TaskSelector(levels, threshold=threshold, alpha=0.02)


def _taps(B: int = 6, *, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(B, F, generator=g) for name, F in WIDTHS.items()}


def _of_kinds(*kinds: str, seed: int, reference: str | None = None) -> TaskSelector:
    g = torch.Generator().manual_seed(seed)
    features = list(WIDTHS.items())
    return TaskSelector(
        tuple(random_level(k, *features[i % 3], random=g) for i, k in enumerate(kinds)),
        threshold=3.0,
        alpha=0.02,
        reference=() if reference is None else (random_level(reference, *features[0], random=g),),
        margin=None if reference is None else 0.5,
    )


def _against(selector: TaskSelector, *, margin: float) -> TaskSelector:
    return replace(selector, reference=(_level("stem:mean_std", seed=99),), margin=margin)


# One task of each kind: one level, two, three, another code size, the same feature twice; levels of
# every kind, with and without a reference of its own or of two tasks.
SELECTORS = {
    3: _selector("stem:mean_std", seed=1),
    0: _selector("stem:mean_std", "block4:mean", seed=2),
    7: _selector("embedding", "stem:mean_std", "block4:mean", seed=3),
    5: TaskSelector((_level("block4:mean", seed=4, code_size=5),), threshold=-1.0, alpha=0.05),
    6: _selector("embedding", "embedding", seed=6),
    8: _of_kinds("gaussian", seed=8),
    9: _of_kinds("prototype", "sigmoid", "gaussian", "prototype", seed=9),
    10: _of_kinds("gaussian", "prototype", "autoencoder", seed=10, reference="autoencoder"),
    11: _of_kinds("autoencoder", "prototype", seed=10, reference="gaussian"),
    12: replace(
        _selector("stem:mean_std", seed=12),
        reference=(_level("stem:mean_std", seed=99),),
        margin=-0.1,
    ),
    13: replace(
        _selector("stem:mean_std", seed=13),
        reference=(_level("stem:mean_std", seed=99),),
        margin=0.2,
    ),
}


def _bank(*paths: int) -> SelectorBank:
    bank = SelectorBank()
    for path in paths:
        bank.add(path, SELECTORS[path])
    return bank


def test_a_score_is_the_sum_of_the_standardised_log_errors() -> None:
    taps, selector = _taps(), SELECTORS[7]
    expected = torch.zeros(6)
    for level in selector.levels:
        errors_B1 = autoencoder_errors(taps[level.feature], *(t[None] for t in level.tensors))
        expected += (errors_B1[:, 0].log() - level.center) / level.spread
    torch.testing.assert_close(selector.scores(taps), expected)


def test_columns_are_the_paths_in_ascending_order() -> None:
    bank = _bank(3, 0, 12, 7, 5, 6)
    taps = _taps()
    scores_BT, accepted_BT = bank.scores(taps, 6)
    assert bank.tasks == (0, 3, 5, 6, 7, 12)
    for column, path in enumerate(bank.tasks):
        assert torch.equal(scores_BT[:, column], SELECTORS[path].scores(taps))
        assert torch.equal(accepted_BT[:, column], SELECTORS[path].accepted(taps))


@settings(max_examples=40, deadline=None)
@given(st.permutations(sorted(SELECTORS)), st.integers(1, len(SELECTORS)))
def test_other_tasks_and_their_order_do_not_change_a_score_by_a_bit(
    order: list[int], count: int
) -> None:
    taps = _taps(30)
    bank = _bank(*order)
    for path in order[count:]:
        bank.remove(path)
    scores_BT, accepted_BT = bank.scores(taps, 30)
    for column, path in enumerate(bank.tasks):
        assert torch.equal(scores_BT[:, column], SELECTORS[path].scores(taps))
        assert torch.equal(accepted_BT[:, column], SELECTORS[path].accepted(taps))


@settings(max_examples=40, deadline=None)
@given(
    row=st.integers(0, 15),
    scale=st.sampled_from([0.0, 1e-20, 0.5, 50.0, 1e30, math.inf, math.nan]),
)
def test_neighbours_do_not_change_a_score_by_a_bit(row: int, scale: float) -> None:
    bank, taps = _bank(*SELECTORS), _taps(16)
    other = {name: scale * x for name, x in taps.items()}
    for name, x in taps.items():
        other[name][row] = x[row]
    for alone, crowd in zip(bank.scores(taps, 16), bank.scores(other, 16), strict=True):
        assert torch.equal(alone[row], crowd[row])


def test_the_bank_asks_for_the_union_of_features_and_no_more() -> None:
    bank = _bank(3, 5)
    assert list(bank.taps) == ["block4:mean", "stem:mean_std"]
    bank.remove(5)
    assert list(bank.taps) == ["stem:mean_std"]


def test_an_empty_bank_sends_everything_to_zero_shot() -> None:
    bank = SelectorBank()
    scores_BT, accepted_BT = bank.scores({}, 4)
    assert scores_BT.shape == accepted_BT.shape == (4, 0)
    paths_B = bank.decide(scores_BT, accepted_BT, torch.empty(4, 0, dtype=torch.bool))
    assert paths_B.tolist() == [ZERO_SHOT] * 4


def test_a_path_is_taken_once_and_left_once() -> None:
    bank = _bank(3)
    with pytest.raises(ValueError, match="path 3 is taken"):
        bank.add(3, SELECTORS[3])
    with pytest.raises(ValueError, match="path -1 is not that of a task"):
        bank.add(ZERO_SHOT, SELECTORS[3])
    bank.remove(3)
    with pytest.raises(KeyError):
        bank.remove(3)


def test_tasks_that_come_together_score_as_if_they_had_come_one_by_one() -> None:
    together = SelectorBank()
    together.add_all({path: SELECTORS[path] for path in (3, 5, 7)})
    one_by_one, taps = _bank(3, 5, 7), _taps()
    for got, expected in zip(together.scores(taps, 6), one_by_one.scores(taps, 6), strict=True):
        assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="path 5 is taken"):
        together.add_all({1: SELECTORS[5], 5: SELECTORS[5]})
    assert together.tasks == (3, 5, 7)


def test_the_most_familiar_of_the_accepting_and_eligible_tasks_wins() -> None:
    bank = _bank(3, 5, 7)
    scores_BT = torch.tensor([[1.0, 2.0, 3.0]]).repeat(5, 1)
    accepted_BT = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 1], [0, 0, 0], [1, 1, 1]]).bool()
    eligible_BT = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 0, 1], [1, 1, 1], [0, 0, 0]]).bool()
    paths_B = bank.decide(scores_BT, accepted_BT, eligible_BT)
    assert paths_B.tolist() == [3, 5, 7, ZERO_SHOT, ZERO_SHOT]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_image_goes_where_it_is_not_accepted_and_eligible(data: st.DataObject) -> None:
    bank = _bank(*SELECTORS)
    B, T = 4, len(bank.tasks)
    cell = st.tuples(st.floats(-1e6, 1e6, width=32), st.booleans(), st.booleans())
    cells = data.draw(st.lists(cell, min_size=B * T, max_size=B * T))
    scores_BT, accepted_BT, eligible_BT = (
        torch.tensor(column).view(B, T) for column in zip(*cells, strict=True)
    )
    paths_B = bank.decide(scores_BT, accepted_BT, eligible_BT)
    for path, allowed_T in zip(paths_B.tolist(), accepted_BT & eligible_BT, strict=True):
        allowed = {p for p, ok in zip(bank.tasks, allowed_T.tolist(), strict=True) if ok}
        assert path in allowed if allowed else path == ZERO_SHOT


@pytest.mark.parametrize("path", SELECTORS)
def test_a_broken_feature_is_claimed_by_nobody(path: int) -> None:
    taps = _taps(3)
    for x_BF in taps.values():
        x_BF[0], x_BF[1] = math.nan, math.inf
    selector = replace(SELECTORS[path], threshold=math.inf)
    if selector.reference:
        selector = replace(selector, margin=1e30)
    assert selector.accepted(taps).tolist() == [False, False, True]


def test_an_image_must_be_more_familiar_than_to_the_reference() -> None:
    taps, reference = _taps(200), _level("stem:mean_std", seed=99)
    plain = _selector("stem:mean_std", seed=12)
    scores_B = plain.scores(taps)
    beyond_B = scores_B - TaskSelector((reference,), threshold=0.0, alpha=None).scores(taps)
    plain = replace(plain, threshold=float(scores_B.median()))
    selector = replace(plain, reference=(reference,), margin=float(beyond_B.median()))
    near_B, accepted_B = beyond_B <= beyond_B.median(), plain.accepted(taps)
    assert torch.equal(selector.scores(taps), scores_B)
    assert torch.equal(selector.accepted(taps), accepted_B & near_B)
    assert int((accepted_B & near_B).sum()) > 10
    assert int((accepted_B & ~near_B).sum()) > 10


def test_levels_of_a_reference_are_added_up() -> None:
    taps = _taps(50)
    plain = replace(_selector("stem:mean_std", seed=12), threshold=math.inf)
    reference = (_level("stem:mean_std", seed=98), _level("embedding", seed=99))
    reference_B = TaskSelector(reference, threshold=0.0, alpha=None).scores(taps)
    beyond_B = plain.scores(taps) - reference_B
    selector = replace(plain, reference=reference, margin=float(beyond_B.median()))
    assert selector.accepted(taps).tolist() == (beyond_B <= beyond_B.median()).tolist()


def test_a_tie_with_the_reference_goes_to_the_task_or_to_the_reference_as_the_margin_says() -> None:
    level = _level("embedding", seed=5)
    taps = _taps(20)
    for margin, accepted in ((0.0, True), (STRICTLY_LESS, False)):
        selector = TaskSelector((level,), math.inf, alpha=None, reference=(level,), margin=margin)
        assert selector.accepted(taps).tolist() == [accepted] * 20


@settings(max_examples=200, deadline=None)
@given(st.floats(-100, 100, width=32), st.integers(1, 3))
def test_the_strict_margin_lets_every_smaller_score_in(reference: float, steps: int) -> None:
    smaller = torch.tensor(reference)
    for _ in range(steps):
        smaller = smaller.nextafter(torch.tensor(-math.inf))
    difference = smaller - torch.tensor(reference)
    assert bool(difference <= STRICTLY_LESS) == (float(difference) < -1e-38)
    assert not torch.tensor(0.0) <= torch.tensor(STRICTLY_LESS)


def _nearness(feature: str, *, seed: int) -> AutoencoderLevel:
    """An autoencoder that always says its mean, so that the nearest has the least error."""
    level = _level(feature, seed=seed)
    return replace(
        level,
        std_F=torch.ones_like(level.std_F),
        decoder_CF=torch.zeros_like(level.decoder_CF),
        decoder_bias_F=torch.zeros_like(level.decoder_bias_F),
        center=0.0,
        spread=1.0,
    )


def test_the_papers_rule_is_the_least_error_unless_it_is_the_references() -> None:
    # Methods: argmin over the reference, which comes first, and the tasks, then one threshold.
    taps, limit, paths = _taps(300), 1.9, (0, 1, 2)
    levels = [_nearness("embedding", seed=seed) for seed in range(4)]
    errors_BX = torch.stack(
        [TaskSelector((x,), 0.0, alpha=None).scores(taps).exp() for x in levels], 1
    )
    least_B = errors_BX.argmin(1)
    unknown_B = (least_B == 0) | (errors_BX.amin(1) > limit)
    bank = SelectorBank()
    for path, level in zip(paths, levels[1:], strict=True):
        bank.add(
            path,
            TaskSelector(
                (level,), math.log(limit), alpha=None, reference=(levels[0],), margin=STRICTLY_LESS
            ),
        )
    scores_BT, accepted_BT = bank.scores(taps, 300)
    paths_B = bank.decide(scores_BT, accepted_BT, torch.ones_like(accepted_BT))
    assert torch.equal(paths_B, torch.where(unknown_B, ZERO_SHOT, least_B - 1))
    assert set(paths_B.tolist()) == {ZERO_SHOT, *paths}


def test_tasks_that_bring_the_same_reference_share_one_column() -> None:
    bank = _bank(12, 13, 3)
    taps = _taps(8)
    before = bank.scores(taps, 8)
    assert sum(len(group.columns_G) for group in bank._groups) == 4  # three tasks, one reference
    bank.remove(12)
    after = bank.scores(taps, 8)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:, [0, 2]], b)


@pytest.mark.parametrize("margin", [None, math.nan, math.inf, -math.inf])
def test_a_reference_without_a_number_for_its_margin_is_refused(margin: float | None) -> None:
    with pytest.raises(ValueError, match="margin"):
        replace(SELECTORS[12], margin=margin)


def test_a_margin_without_a_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="a margin a reference"):
        replace(SELECTORS[3], margin=0.0)


def test_the_bank_asks_for_the_features_of_references_too() -> None:
    assert _bank(11).taps == ("block4:mean", "stem:mean_std")
    reference = _level("embedding", seed=1)
    bank = SelectorBank()
    bank.add(3, replace(SELECTORS[3], reference=(reference,), margin=0.0))
    assert bank.taps == ("embedding", "stem:mean_std")


def test_a_perfect_reconstruction_has_a_finite_score() -> None:
    level = _level("block4:mean", seed=0)
    perfect = replace(
        level, decoder_CF=torch.zeros_like(level.decoder_CF), decoder_bias_F=torch.zeros(24)
    )
    selector = TaskSelector((perfect,), threshold=0.0, alpha=0.02)
    assert selector.scores({"block4:mean": perfect.mean_F[None]}).isfinite().all()


@pytest.mark.parametrize("kind", LEVEL_KINDS)
def test_a_feature_of_another_width_is_refused(kind: str) -> None:
    selector = _of_kinds(kind, seed=0)
    for shape in ((2, 40), (2, 48, 1), (2,)):
        with pytest.raises(ValueError, match="shape"):
            selector.scores({"stem:mean_std": torch.zeros(shape)})


def test_the_fixed_threshold_accepts_what_has_a_smaller_plain_error() -> None:
    taps, level = _taps(40), SELECTORS[3].levels[0]
    errors_B = autoencoder_errors(taps["stem:mean_std"], *(t[None] for t in level.tensors))[:, 0]
    limit = float(errors_B.median()) * 1.0001
    bank = SelectorBank()
    bank.add(0, fixed_threshold(SELECTORS[7], 1.0))
    bank.add(3, fixed_threshold(SELECTORS[3], limit))
    _, accepted_BT = bank.scores(taps, 40)
    assert torch.equal(accepted_BT[:, 1], errors_B <= limit)
    with pytest.raises(ValueError, match="must be positive"):
        fixed_threshold(SELECTORS[3], 0.0)


def test_fixed_thresholds_give_the_image_to_the_least_plain_error() -> None:
    taps = _taps(40)
    paths = (0, 3)
    errors = [
        autoencoder_errors(
            taps["stem:mean_std"], *(t[None] for t in SELECTORS[p].levels[0].tensors)
        )
        for p in paths
    ]
    bank = SelectorBank()
    for path in paths:
        bank.add(path, fixed_threshold(SELECTORS[path], 1e9))
    scores_BT, accepted_BT = bank.scores(taps, 40)
    paths_B = bank.decide(scores_BT, accepted_BT, torch.ones(40, 2, dtype=torch.bool))
    expected_B = torch.tensor(paths)[torch.cat(errors, 1).argmin(1)]
    assert torch.equal(paths_B, expected_B)


@pytest.mark.parametrize(
    ("count", "alpha", "rank"),
    [(49, 0.02, 49), (50, 0.02, 50), (99, 0.02, 98), (199, 0.02, 196), (9, 0.1, 9), (99, 0.29, 71)],
)
def test_the_threshold_is_the_smallest_score_that_keeps_the_promise(
    count: int, alpha: float, rank: int
) -> None:
    scores_N = torch.arange(1, count + 1).float()[torch.randperm(count)]
    assert conformal_threshold(scores_N, alpha) == rank


def test_too_few_scores_promise_nothing_and_accept_everything() -> None:
    assert conformal_threshold(torch.arange(48.0), 0.02) == math.inf
    assert conformal_threshold(torch.empty(0), 0.5) == math.inf


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, math.nan])
def test_an_alpha_outside_its_range_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        conformal_threshold(torch.arange(9.0), alpha)


def test_a_calibration_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not a number"):
        conformal_threshold(torch.tensor([1.0, math.nan]), 0.5)


@settings(max_examples=200, deadline=None)
@given(
    scores=st.lists(st.integers(-5, 5), min_size=2, max_size=60),  # few values: many ties
    alpha=st.sampled_from([0.01, 0.02, 0.05, 0.1, 0.25, 0.5]),
)
def test_leaving_each_image_out_in_turn_refuses_at_most_alpha(
    scores: list[int], alpha: float
) -> None:
    # Exchangeability in its finite form: each of the n + 1 images is the new one equally often.
    table = torch.tensor(scores).float()
    refused = sum(
        float(table[i]) > conformal_threshold(torch.cat([table[:i], table[i + 1 :]]), alpha)
        for i in range(len(table))
    )
    assert refused <= alpha * len(table) + 1e-9


@pytest.mark.parametrize("alpha", [0.02, 0.1])
def test_fresh_images_are_refused_as_often_as_promised(alpha: float) -> None:
    trials, count = 20_000, 199
    g = torch.Generator().manual_seed(0)
    draws = torch.randn(trials, count + 1, generator=g).exp()  # skewed, as errors are
    thresholds = torch.tensor([conformal_threshold(row[1:], alpha) for row in draws])
    refused = float((draws[:, 0] > thresholds).float().mean())
    # Trials are independent, so four standard deviations of a binomial share.
    slack = 4 * math.sqrt(alpha * (1 - alpha) / trials)
    assert alpha - 1 / (count + 1) - slack <= refused <= alpha + slack


@pytest.mark.parametrize("name", ["mean_F", "std_F", "encoder_bias_C", "decoder_CF"])
def test_tensors_that_do_not_fit_are_refused(name: str) -> None:
    level = _level("embedding", seed=0)
    shortened = getattr(level, name)[..., :-1]
    with pytest.raises(ValueError, match=f"embedding: {name} has shape"):
        replace(level, **{name: shortened})


def test_numbers_that_make_no_score_are_refused() -> None:
    level = _level("embedding", seed=0)
    with pytest.raises(ValueError, match="encoder_FC has shape"):
        replace(level, encoder_FC=level.encoder_FC[0])
    for center, spread in [(math.nan, 1.0), (0.0, 0.0), (0.0, math.inf)]:
        with pytest.raises(ValueError, match="must be finite"):
            replace(level, center=center, spread=spread)
    with pytest.raises(ValueError, match="at least one level"):
        TaskSelector((), threshold=0.0, alpha=0.02)
    with pytest.raises(ValueError, match="threshold is not a number"):
        TaskSelector((level,), threshold=math.nan, alpha=0.02)


def test_a_told_path_stands_and_the_others_are_decided() -> None:
    taps, paths = _taps(), (3, 0, 7, 9)
    bank = SelectorBank()
    for path in paths:
        bank.add(path, replace(SELECTORS[path], threshold=math.inf))
    told_B = torch.tensor([DECIDE, ZERO_SHOT, 7, DECIDE, DECIDE, 3])
    eligible_BP = torch.ones(6, 12, dtype=torch.bool)
    eligible_BP[3, [0, 3, 7, 9]] = False
    eligible_BP[4, [0, 3, 7]] = False
    paths_B, scores_BT, accepted_BT = bank.route(taps, told_B, eligible_BP)
    every_BT = torch.ones(6, 4, dtype=torch.bool)
    chosen_B = bank.decide(scores_BT, accepted_BT, every_BT)

    assert paths_B.tolist() == [chosen_B[0], ZERO_SHOT, 7, ZERO_SHOT, 9, 3]
    assert chosen_B[0] != ZERO_SHOT
    assert torch.equal(scores_BT, bank.scores(taps, 6)[0])


def test_nobody_is_decided_for_by_an_empty_bank() -> None:
    told_B = torch.tensor([DECIDE, ZERO_SHOT])
    paths_B, scores_BT, accepted_BT = SelectorBank().route({}, told_B, torch.ones(2, 3).bool())
    assert paths_B.tolist() == [ZERO_SHOT, ZERO_SHOT]
    assert scores_BT.shape == accepted_BT.shape == (2, 0)


def test_nothing_is_read_back_from_a_device() -> None:
    """On tensors without data: what wanted to know a number of one would fail."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        bank = SelectorBank("cuda")
        for path, selector in SELECTORS.items():
            if path != 13:  # has the reference of 12, and to see that compares numbers, on the host
                bank.add(path, selector)
        taps = {name: torch.empty(6, F, device="cuda") for name, F in WIDTHS.items()}
        told_B = torch.full((6,), DECIDE, device="cuda")
        answers = bank.route(taps, told_B, torch.ones(6, 20, dtype=torch.bool, device="cuda"))
        with pytest.raises(DataDependentOutputException):
            answers[0].tolist()

    assert [tensor.device.type for tensor in answers] == ["cuda"] * 3
    assert [tuple(tensor.shape) for tensor in answers] == [(6,), (6, 10), (6, 10)]


def test_no_two_levels_of_a_task_are_added_up_at_once() -> None:
    """They would meet in one sum, which a device adds up in whatever order."""
    bank = _bank(6, 9, 7)
    for group in bank._groups:
        assert len(set(group.columns_G.tolist())) == len(group.columns_G)


def test_changes_are_counted() -> None:
    bank = SelectorBank()
    counts = [bank.changes]
    bank.add(3, SELECTORS[3])
    counts.append(bank.changes)
    bank.remove(3)
    counts.append(bank.changes)
    assert len(set(counts)) == 3
