"""Each kind of level gives the error of its formula, and no image changes another's by a bit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist, mahalanobis
from scipy.stats import multivariate_normal
from torch import Tensor, nn

from kernels.autoencoder_errors import autoencoder_errors
from medley.levels import AutoencoderLevel, GaussianLevel, Level, PrototypeLevel
from medley.selector import TaskSelector
from tests.fakes import LEVEL_KINDS, random_level

F = 24


def _errors(level: Level, x_BF: Tensor) -> Tensor:
    """Undo what makes errors scores."""
    plain = replace(level, center=0.0, spread=1.0)
    return TaskSelector((plain,), threshold=0.0, alpha=None).scores({level.feature: x_BF}).exp()


def _level(kind: str, *, seed: int = 0, size: int = 5) -> Level:
    return random_level(kind, "embedding", F, size=size, random=torch.Generator().manual_seed(seed))


def _changed(level: Level, **fields: Any) -> Level:
    return replace(level, **fields)


def _features(B: int = 8, *, seed: int = 1) -> Tensor:
    return torch.randn(B, F, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", LEVEL_KINDS)
def test_a_score_is_the_standardised_log_error(kind: str) -> None:
    level, x_BF = _level(kind), _features()
    scores_B = TaskSelector((level,), threshold=0.0, alpha=None).scores({"embedding": x_BF})
    expected_B = (_errors(level, x_BF).log() - level.center) / level.spread
    torch.testing.assert_close(scores_B, expected_B)


def test_the_difference_of_two_linear_scores_is_a_log_likelihood_ratio() -> None:
    random = np.random.default_rng(0)
    levels, densities = [], []
    for _ in range(2):
        mean_F, half_FF = random.normal(size=F), random.normal(size=(F, F))
        covariance_FF = half_FF @ half_FF.T + np.eye(F)
        densities.append(multivariate_normal(mean_F, covariance_FF))
        whitening_FF = np.linalg.cholesky(np.linalg.inv(covariance_FF))
        levels.append(
            GaussianLevel(
                feature="embedding",
                means_KF=torch.from_numpy(mean_F[None]).float(),
                whitening_FW=torch.from_numpy(whitening_FF).float(),
                scale="linear",
                center=-float(np.linalg.slogdet(covariance_FF)[1]) / F,
                spread=1.0,
            )
        )
    x_BF = random.normal(size=(8, F))
    taps = {"embedding": torch.from_numpy(x_BF).float()}
    own_B, other_B = (TaskSelector((x,), math.inf, alpha=None).scores(taps) for x in levels)
    ratio_B = densities[0].logpdf(x_BF) - densities[1].logpdf(x_BF)
    expected_B = torch.from_numpy(-2 * ratio_B / F).float()
    torch.testing.assert_close(own_B - other_B, expected_B, rtol=1e-4, atol=1e-4)


def test_a_sigmoid_autoencoder_is_the_papers_module() -> None:
    module = nn.Sequential(nn.Linear(F, 5), nn.ReLU(), nn.Linear(5, F), nn.Sigmoid())
    encoder, decoder = module[0], module[2]
    assert isinstance(encoder, nn.Linear)
    assert isinstance(decoder, nn.Linear)
    level = AutoencoderLevel(
        feature="alexnet:conv5",
        center=0.0,
        spread=1.0,
        mean_F=torch.zeros(F),
        std_F=torch.ones(F),
        encoder_FC=encoder.weight.detach().T,
        encoder_bias_C=encoder.bias.detach(),
        decoder_CF=decoder.weight.detach().T,
        decoder_bias_F=decoder.bias.detach(),
        output="sigmoid",
    )
    u_BF = _features(40).sigmoid()
    with torch.no_grad():
        expected_B = nn.functional.mse_loss(module(u_BF), u_BF, reduction="none").mean(1)
    torch.testing.assert_close(_errors(level, u_BF), expected_B)


def test_a_sigmoid_reconstructs_nothing_outside_its_range() -> None:
    level = _level("sigmoid")
    assert isinstance(level, AutoencoderLevel)
    far_BF = level.mean_F + 10 * level.std_F
    assert float(_errors(level, far_BF[None])) >= 81


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), K=st.integers(1, 9), offset=st.sampled_from([0.0, 30.0]))
def test_a_gaussian_error_is_the_least_mahalanobis_distance(
    seed: int, K: int, offset: float
) -> None:
    random = np.random.default_rng(seed)
    half = random.normal(size=(F, F))
    precision = half @ half.T / F + np.eye(F)
    means, x = random.normal(size=(K, F)) + offset, random.normal(size=(6, F)) + offset
    level = GaussianLevel(
        feature="embedding",
        center=0.0,
        spread=1.0,
        means_KF=torch.tensor(means).float(),
        whitening_FW=torch.tensor(np.linalg.cholesky(precision)).float(),
    )
    expected = [min(mahalanobis(row, mean, precision) ** 2 for mean in means) / F for row in x]
    torch.testing.assert_close(
        _errors(level, torch.tensor(x).float()), torch.tensor(expected).float(), rtol=2e-4, atol=0
    )


def test_a_gaussian_may_leave_directions_out() -> None:
    level = GaussianLevel(
        feature="embedding",
        center=0.0,
        spread=1.0,
        means_KF=torch.zeros(1, 3),
        whitening_FW=torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]),
    )
    errors_B = _errors(level, torch.tensor([[1.0, 1.0, 100.0], [2.0, 0.0, 0.0]]))
    torch.testing.assert_close(errors_B, torch.tensor([2.5, 2.0]))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), K=st.integers(1, 9), length=st.sampled_from([1e-3, 1.0, 1e3]))
def test_a_prototype_error_is_the_least_cosine_distance(seed: int, K: int, length: float) -> None:
    level = _level("prototype", seed=seed, size=K)
    assert isinstance(level, PrototypeLevel)
    x_BF = _features(seed=seed + 1) * length
    expected = cdist(x_BF.numpy(), level.prototypes_KF.numpy(), "cosine").min(1)
    torch.testing.assert_close(_errors(level, x_BF), torch.tensor(expected).float())


@pytest.mark.parametrize("kind", ["gaussian", "prototype"])
def test_what_is_known_exactly_has_a_finite_and_the_least_score(kind: str) -> None:
    level = _level(kind)
    selector = TaskSelector((level,), threshold=0.0, alpha=None)
    known_KF = level.tensors[0]
    known_K, other_B = (selector.scores({"embedding": x}) for x in (known_KF, _features()))
    assert known_K.isfinite().all()
    assert known_K.max() < other_B.min() - 5


def test_prototypes_in_half_precision_give_cosines_all_the_same() -> None:
    level = _level("prototype")
    assert isinstance(level, PrototypeLevel)
    half = replace(level, prototypes_KF=level.prototypes_KF.bfloat16())
    found_K = _errors(half, half.prototypes_KF.float() * 3)
    assert found_K.max() < 1e-6


@pytest.mark.parametrize("kind", LEVEL_KINDS)
def test_half_precision_tensors_are_scored_in_float32(kind: str) -> None:
    level = _level(kind)
    names = level.TENSORS
    half = {name: t.half() for name, t in zip(names, level.tensors, strict=True)}
    whole = {name: t.float() for name, t in half.items()}
    x_BF = _features()
    for features_BF in (x_BF, x_BF.half()):
        first = _errors(_changed(level, **half), features_BF)
        assert first.dtype == torch.float32
        assert torch.equal(first, _errors(_changed(level, **whole), features_BF))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(LEVEL_KINDS),
    B=st.integers(1, 40),
    seed=st.integers(0, 1000),
    size=st.integers(1, 40),
    scale=st.sampled_from([0.0, 1e-20, 100.0, math.inf]),
)
def test_neighbours_do_not_change_an_image_by_a_bit(
    kind: str, B: int, seed: int, size: int, scale: float
) -> None:
    level, x_BF = _level(kind, seed=seed, size=size), _features(B, seed=seed)
    crowd_BF, row = x_BF * scale, seed % B
    crowd_BF[row] = x_BF[row]
    assert torch.equal(_errors(level, crowd_BF)[row], _errors(level, x_BF)[row])


@pytest.mark.parametrize("kind", LEVEL_KINDS)
def test_other_levels_of_a_group_do_not_change_one_by_a_bit(kind: str) -> None:
    levels = [_level(kind, seed=seed) for seed in range(7)]
    x_BF, cpu = _features(), torch.device("cpu")
    assert len({level.group for level in levels}) == 1
    scorer: Any = type(levels[0]).scorer
    together_BG = scorer(levels, cpu)(x_BF)
    for g, level in enumerate(levels):
        assert torch.equal(scorer([level], cpu)(x_BF)[:, 0], together_BG[:, g])


def test_wide_autoencoders_are_scored_where_they_lie_and_the_same() -> None:
    random = torch.Generator().manual_seed(0)
    wide = [random_level("sigmoid", "embedding", 1100, size=1000, random=random) for _ in range(2)]
    x_BF = torch.rand(4, 1100, generator=random)
    scorer: Any = AutoencoderLevel.scorer
    scores_BG = scorer(wide, torch.device("cpu"))(x_BF)
    for level, scores_B in zip(wide, scores_BG.T, strict=True):
        errors_B1 = autoencoder_errors(x_BF, *(t[None] for t in level.tensors), output="sigmoid")
        assert torch.equal(scores_B, (errors_B1[:, 0].log() - level.center) / level.spread)


@pytest.mark.parametrize("kind", LEVEL_KINDS)
def test_no_image_has_no_score(kind: str) -> None:
    assert _errors(_level(kind), _features(0)).shape == (0,)


@pytest.mark.parametrize("kind", LEVEL_KINDS)
def test_the_same_level_is_one_with_the_same_bits(kind: str) -> None:
    level = _level(kind)
    copied = {name: t.clone() for name, t in zip(level.TENSORS, level.tensors, strict=True)}
    assert level.same(_changed(level, **copied))
    others: list[Level] = [_level(k, seed=1) for k in LEVEL_KINDS]
    others += [replace(level, center=2.0), replace(level, feature="stem:mean")]
    others += [_changed(level, **{level.TENSORS[0]: level.tensors[0].double()})]
    if isinstance(level, AutoencoderLevel):
        turned = "linear" if level.output == "sigmoid" else "sigmoid"
        others += [_changed(level, output=turned)]
    assert not any(level.same(other) for other in others)


@pytest.mark.parametrize(
    ("kind", "name", "cut"),
    [
        ("gaussian", "means_KF", (slice(None), slice(0))),
        ("gaussian", "means_KF", (slice(0),)),
        ("gaussian", "means_KF", (0,)),
        ("gaussian", "whitening_FW", (slice(1),)),
        ("gaussian", "whitening_FW", (slice(None), slice(0))),
        ("gaussian", "whitening_FW", (0,)),
        ("prototype", "prototypes_KF", (slice(0),)),
        ("prototype", "prototypes_KF", (0,)),
        ("sigmoid", "decoder_CF", (slice(1),)),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    kind: str, name: str, cut: tuple[slice | int, ...]
) -> None:
    level = _level(kind)
    with pytest.raises(ValueError, match=f"embedding: {name} has shape"):
        _changed(level, **{name: getattr(level, name)[cut]})


@pytest.mark.parametrize("kind", LEVEL_KINDS)
@pytest.mark.parametrize(("center", "spread"), [(math.nan, 1.0), (0.0, -1.0), (0.0, math.inf)])
def test_a_scale_that_makes_no_score_is_refused(kind: str, center: float, spread: float) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        replace(_level(kind), center=center, spread=spread)
