import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from trainer.bench.metrics import auroc, cil, over_seeds, sequential

MATRICES: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "golden" / "zscl_matrices.json").read_text()
)
MATRIX = st.integers(1, 8).flatmap(
    lambda tasks: arrays(np.float64, (tasks, tasks), elements=st.floats(0, 1))
)
SHARES = st.lists(st.floats(0, 1), min_size=2, max_size=8)
SCORES = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=30)  # many ties


@pytest.mark.parametrize("name", MATRICES)
def test_the_published_rows_come_out_of_the_published_matrices(name: str) -> None:
    given = MATRICES[name]
    assert len(given["matrix"]) == 11
    result = sequential(given["matrix"])
    assert result.transfer is not None
    got = {"transfer": result.transfer, "avg": result.average, "last": result.last}
    assert got == pytest.approx(given["expected"], abs=1e-3)
    assert got == pytest.approx(given["published_rounded"], abs=0.05)  # rounded to 0.1


def test_the_numbers_of_a_small_matrix() -> None:
    result = sequential([[0.9, 0.2, 0.3], [0.7, 0.8, 0.1], [0.6, 0.5, 0.9]])
    assert result.transfer_T == pytest.approx((None, 0.2, 0.2))
    assert result.average_T == pytest.approx((2.2 / 3, 0.5, 1.3 / 3))
    assert result.last_T == (0.6, 0.5, 0.9)
    assert result.forgetting_T == pytest.approx((0.3, 0.3, 0.0))
    assert result.transfer == pytest.approx(0.2)
    assert result.forgetting == pytest.approx(0.2)


def test_one_task_has_no_transfer() -> None:
    result = sequential([[0.5]])
    assert result.transfer_T == (None,)
    assert result.transfer is None
    assert (result.average, result.last, result.forgetting) == (0.5, 0.5, 0.0)


@settings(deadline=None)
@given(st.floats(0, 1), st.integers(2, 11))
def test_a_constant_matrix_is_its_constant(share: float, tasks: int) -> None:
    result = sequential(np.full((tasks, tasks), share))
    assert (result.transfer, result.average, result.last) == pytest.approx((share,) * 3)
    assert result.forgetting_T == (0.0,) * tasks


@settings(deadline=None)
@given(SHARES, st.data())
def test_without_forgetting_average_follows_from_zero_shot_and_last(
    zero_shot: list[float], data: st.DataObject
) -> None:
    tasks = len(zero_shot)
    last = data.draw(st.lists(st.floats(0, 1), min_size=tasks, max_size=tasks))
    learnt_TT = np.tril(np.ones((tasks, tasks)))
    result = sequential(np.where(learnt_TT == 1, last, zero_shot))
    bound = [
        (j * zs + (tasks - j) * end) / tasks
        for j, (zs, end) in enumerate(zip(zero_shot, last, strict=True))
    ]
    assert result.average_T == pytest.approx(bound)
    assert result.transfer == pytest.approx(np.mean(zero_shot[1:]))
    assert result.forgetting == 0


@settings(deadline=None)
@given(MATRIX, MATRIX)
def test_last_asks_only_the_last_row(
    matrix_TT: NDArray[np.float64], other_TT: NDArray[np.float64]
) -> None:
    tasks = min(len(matrix_TT), len(other_TT))
    one, other = matrix_TT[:tasks, :tasks].copy(), other_TT[:tasks, :tasks].copy()
    other[-1] = one[-1]
    assert sequential(one).last_T == sequential(other).last_T


@settings(deadline=None)
@given(MATRIX, st.randoms(use_true_random=False))
def test_average_and_last_do_not_ask_in_which_order_data_sets_are_listed(
    matrix_TT: NDArray[np.float64], chance: Any
) -> None:
    columns = chance.sample(range(len(matrix_TT)), len(matrix_TT))
    plain, moved = sequential(matrix_TT), sequential(matrix_TT[:, columns])
    assert moved.last_T == tuple(plain.last_T[column] for column in columns)
    assert moved.average_T == pytest.approx([plain.average_T[column] for column in columns])
    assert moved.average == pytest.approx(plain.average)


@settings(deadline=None)
@given(MATRIX)
def test_average_is_made_of_transfer_and_what_came_after_learning(
    matrix_TT: NDArray[np.float64],
) -> None:
    result, tasks = sequential(matrix_TT), len(matrix_TT)
    for j, transfer in enumerate(result.transfer_T):
        learnt = sum(matrix_TT[j:, j])
        assert result.average_T[j] * tasks == pytest.approx(j * (transfer or 0) + learnt)


@settings(deadline=None)
@given(MATRIX)
def test_nothing_leaves_the_range_of_its_column(matrix_TT: NDArray[np.float64]) -> None:
    result = sequential(matrix_TT)
    for j, column_T in enumerate(matrix_TT.T):
        low, high = column_T.min() - 1e-12, column_T.max() + 1e-12
        assert low <= result.average_T[j] <= high
        assert 0 <= result.forgetting_T[j] <= high - low
        transfer = result.transfer_T[j]
        assert transfer is None or low <= transfer <= high


def test_class_incremental_metrics() -> None:
    result = cil([0.9, 0.8, 0.4])
    assert (result.average, result.last) == pytest.approx((0.7, 0.4))


@settings(deadline=None)
@given(SCORES, SCORES)
def test_auroc_is_that_of_scikit_learn(positive: list[float], negative: list[float]) -> None:
    truth = [1] * len(positive) + [0] * len(negative)
    assert auroc(positive, negative) == pytest.approx(roc_auc_score(truth, positive + negative))


@settings(deadline=None)
@given(SCORES, SCORES)
def test_auroc_is_symmetric(positive: list[float], negative: list[float]) -> None:
    assert auroc(positive, negative) + auroc(negative, positive) == pytest.approx(1)
    turned = auroc([-score for score in negative], [-score for score in positive])
    assert turned == pytest.approx(auroc(positive, negative))


def test_auroc_at_its_ends_with_ties_and_infinities() -> None:
    assert auroc([2, 3], [0, 1]) == 1
    assert auroc([0, 1], [2, 3]) == 0
    assert auroc([1, 1, 1], [1, 1]) == 0.5
    assert auroc([math.inf, 1], [-math.inf, math.inf]) == (0.5 + 1 + 0 + 1) / 4


def test_seeds_give_a_mean_and_a_sample_deviation() -> None:
    result = over_seeds([0.1, 0.2, 0.6])
    assert (result.mean, result.spread) == pytest.approx((0.3, math.sqrt(0.07)))
    assert over_seeds([0.25]).spread is None
    assert over_seeds(iter([0.25, 0.25])).spread == 0
