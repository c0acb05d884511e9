"""What several answers count, and their mean."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medley.aggregation import Weighting, averaged, weights

COSINES = st.floats(-1, 1, width=32)
RULES: tuple[Weighting, ...] = ("uniform", "similarity")


@settings(deadline=None)
@given(similarities=st.lists(COSINES, max_size=16), how=st.sampled_from(RULES))
def test_weights_add_up_to_one_and_zero_shot_is_one_of_them(
    similarities: list[float], how: Weighting
) -> None:
    zero_shot, *others = weights(similarities, how)
    assert len(others) == len(similarities)
    assert zero_shot == 1 / (len(similarities) + 1)
    assert math.isclose(zero_shot + sum(others), 1, rel_tol=1e-12)
    assert all(weight >= 0 for weight in others)


@settings(deadline=None)
@given(similarities=st.lists(COSINES, min_size=1, max_size=16))
def test_uniform_weights_are_the_same_for_all(similarities: list[float]) -> None:
    assert len(set(weights(similarities, "uniform"))) == 1


@settings(deadline=None)
@given(similarities=st.lists(COSINES, min_size=2, max_size=16), shift=st.floats(-0.5, 0.5))
def test_by_similarity_the_nearer_counts_more_and_only_differences_matter(
    similarities: list[float], shift: float
) -> None:
    _, *others = weights(similarities, "similarity")
    for a, b in zip(similarities, others, strict=True):
        for c, d in zip(similarities, others, strict=True):
            assert a <= c or b >= d
    moved = weights([similarity + shift for similarity in similarities], "similarity")
    torch.testing.assert_close(torch.tensor(moved[1:]), torch.tensor(others))


def test_a_twentieth_of_cosine_is_a_factor_of_e() -> None:
    _, nearer, farther = weights([0.75, 0.7], "similarity")
    assert nearer / farther == pytest.approx(math.e)


@pytest.mark.parametrize("how", RULES)
def test_equally_near_ones_count_as_much_as_zero_shot(how: Weighting) -> None:
    assert weights([0.3, 0.3, 0.3], how) == (0.25,) * 4
    assert weights([], how) == (1.0,)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_similarity_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not all finite"):
        weights([0.5, bad], "uniform")


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="'best' are none of uniform, similarity"):
        weights([0.5], "best")  # type: ignore[arg-type]


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), classes=st.integers(1, 40), others=st.integers(0, 5))
def test_the_mean_is_that_of_float64_and_no_class_depends_on_another(
    seed: int, classes: int, others: int
) -> None:
    chance = torch.Generator().manual_seed(seed)
    answers_KC = 30 * torch.randn(others + 1, classes, generator=chance)
    shares = weights(torch.rand(others, generator=chance).tolist(), "similarity")
    mean_C = averaged(list(answers_KC), shares)

    expected_C = torch.tensor(shares, dtype=torch.float64) @ answers_KC.double()
    torch.testing.assert_close(mean_C.double(), expected_C, rtol=0, atol=1e-4)
    place = seed % classes
    assert torch.equal(averaged(list(answers_KC[:, place : place + 1]), shares)[0], mean_C[place])


def test_zero_shot_alone_keeps_its_bits() -> None:
    answers_C = torch.randn(7)
    assert torch.equal(averaged([answers_C], weights([], "uniform")), answers_C)


def test_as_many_weights_as_answers_of_one_shape() -> None:
    one, two = torch.zeros(3), torch.zeros(2)
    with pytest.raises(ValueError, match="1 weights for 2 answers"):
        averaged([one, one], [1.0])
    with pytest.raises(ValueError, match="0 weights for 0 answers"):
        averaged([], [])
    with pytest.raises(ValueError, match=r"shapes \[\(3,\), \(2,\)\]"):
        averaged([one, two], [0.5, 0.5])
