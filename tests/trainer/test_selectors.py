"""Every kind of selector knows its own pictures; with a reference it refuses what is nobody's."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from medley.backbone import MINI, load_backbone
from medley.errors import DataError
from medley.routed import ZERO_SHOT
from trainer.ddas import false_reject_rate
from trainer.gaussians import RIDGE, STRENGTHS, Gaussian, class_level, strength_of_prior
from trainer.reference import (
    FEATURES,
    PAPER,
    Reference,
    load_reference,
    make_reference,
    save_reference,
)
from trainer.selectors import FITS, batch_paths, fit_paper
from trainer.settings import Selector, TrainSettings

F = 48
CAUSES = 4
NAMES = (*FEATURES, "embedding")
LABELS = 3
WORLD = 99  # the task whose pictures are nobody's


def _taps(task: int, count: int, *, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Features with a few causes, mixed in the task's own way; the world's vary in every way."""
    g = torch.Generator().manual_seed(1000 * task + seed)
    of_task = torch.Generator().manual_seed(task)
    labels_N = torch.randint(LABELS, (count,), generator=g)
    causes = F if task == WORLD else CAUSES
    taps = {}
    for name in NAMES:
        means_KF = torch.randn(LABELS, F, generator=of_task)
        mixing_CF = torch.randn(causes, F, generator=of_task)
        noise_NF = 0.3 * torch.randn(count, F, generator=g)
        taps[name] = means_KF[labels_N] + torch.randn(count, causes, generator=g) @ mixing_CF
        taps[name] += noise_NF
    return taps, labels_N


@pytest.fixture(scope="module")
def reference() -> Reference:
    return make_reference("sha256:0123456789abcdef", _taps(WORLD, 500)[0])


@pytest.mark.parametrize("name", FITS)
def test_a_selector_knows_its_own_pictures(name: str, reference: Reference) -> None:
    fit, labels_N = _taps(1, 300)
    selector = FITS[name](
        fit, labels_N, _taps(1, 200, seed=1)[0], alpha=0.05, iterations=150, reference=reference
    )
    assert {level.feature for level in selector.levels} == set(FITS[name].taps)
    assert false_reject_rate(selector, _taps(1, 500, seed=2)[0]) < 0.15
    if name not in ("prototype", "class-gaussians"):  # which have not looked at the spread's shape
        assert false_reject_rate(selector, _taps(2, 500)[0]) > 0.8


@pytest.mark.parametrize("name", FITS)
def test_a_selector_without_calibration_images_is_calibrated_on_its_own(
    name: str, reference: Reference
) -> None:
    fit, labels_N = _taps(1, 120)
    selector = FITS[name](fit, labels_N, None, alpha=0.1, iterations=80, reference=reference)
    assert false_reject_rate(selector, _taps(1, 500, seed=2)[0]) < 0.3


@pytest.mark.parametrize("name", FITS)
def test_equal_seeds_give_equal_selectors(name: str, reference: Reference) -> None:
    fit, labels_N = _taps(1, 60)
    first, again = (
        FITS[name](fit, labels_N, fit, seed=3, iterations=20, reference=reference) for _ in range(2)
    )
    assert first.threshold == again.threshold
    assert all(a.same(b) for a, b in zip(first.levels, again.levels, strict=True))


@pytest.mark.parametrize("name", FITS)
def test_a_selector_that_needs_a_reference_says_so(name: str) -> None:
    fit, labels_N = _taps(1, 40)
    if FITS[name].needs_reference:
        with pytest.raises(DataError, match=r"python -m trainer\.reference"):
            FITS[name](fit, labels_N, None, iterations=5)
    else:
        FITS[name](fit, labels_N, None, iterations=5)


def test_the_kinds_are_those_that_settings_may_name() -> None:
    assert set(FITS) == set(get_args(Selector))
    assert TrainSettings().selector == "ddas"


def test_the_reference_refuses_what_is_nobodys_and_nothing_is_promised(
    reference: Reference,
) -> None:
    fit, labels_N = _taps(1, 300)
    world = _taps(WORLD, 500, seed=5)[0]
    selector = FITS["gaussian+reference"](fit, labels_N, None, reference=reference)
    assert selector.alpha is None
    assert selector.threshold == math.inf
    assert false_reject_rate(selector, world) > 0.95
    assert false_reject_rate(replace(selector, reference=(), margin=None), world) == 0


def test_one_image_is_too_few_for_a_gaussian(reference: Reference) -> None:
    fit, labels_N = _taps(1, 1)
    with pytest.raises(DataError, match="1 images are too few"):
        FITS["gaussian+reference"](fit, labels_N, None, reference=reference)


def test_a_prior_is_so_many_more_images() -> None:
    own, prior = (Gaussian.of(_taps(task, 90)[0]["embedding"]) for task in (1, WORLD))
    mixed = own.with_prior(prior, 30)
    expected_FF = (90 * own.covariance_FF + 30 * prior.covariance_FF) / 120
    torch.testing.assert_close(mixed.covariance_FF, expected_FF)
    assert mixed.mean_F is own.mean_F


def test_a_prior_counts_for_more_where_images_are_few() -> None:
    # A task that is like the prior: the fewer images, the better the prior is than they are.
    prior = Gaussian.of(_taps(WORLD, 2000)[0]["embedding"])
    many, few = (_taps(WORLD, count, seed=1)[0]["embedding"] for count in (2 * F, 2 * F - 1))
    assert strength_of_prior([many], [prior]) == STRENGTHS[0]
    assert strength_of_prior([few], [prior]) > STRENGTHS[0]


def test_classes_share_the_covariance_within_them() -> None:
    taps, labels_N = _taps(1, 3000)
    level = class_level(taps["embedding"], labels_N, "embedding")
    means_KF = torch.stack([taps["embedding"][labels_N == k].mean(0) for k in range(LABELS)])
    torch.testing.assert_close(level.means_KF, means_KF)
    centred_NF = (taps["embedding"] - means_KF[labels_N]).double()
    within_FF = centred_NF.T @ centred_NF / 3000
    ball_FF = within_FF.diagonal().mean() * torch.eye(F)
    inverse_FF = torch.linalg.inv((1 - RIDGE) * within_FF + RIDGE * ball_FF)
    whitening_FF = level.whitening_FW.double()
    torch.testing.assert_close(whitening_FF @ whitening_FF.T, inverse_FF, rtol=1e-3, atol=1e-3)


def test_the_papers_rule_has_one_threshold_and_refuses_alpha_of_all_together(
    reference: Reference,
) -> None:
    tasks = {"one": 1, "two": 2, "three": 3}
    fit = {name: _taps(task, 200)[0] for name, task in tasks.items()}
    held_out = {name: _taps(task, 200, seed=1)[0] for name, task in tasks.items()}
    selectors = fit_paper(fit, held_out, reference=reference, against_reference=False, alpha=0.1)
    assert len({s.threshold for s in selectors.values()}) == 1
    rates = [false_reject_rate(selectors[name], held_out[name]) for name in tasks]
    assert 0.07 < sum(rates) / 3 <= 0.1
    guarded = fit_paper(fit, held_out, reference=reference, against_reference=True, alpha=0.1)
    for name, task in tasks.items():
        fresh = _taps(task, 300, seed=2)[0]
        assert not (guarded[name].accepted(fresh) & ~selectors[name].accepted(fresh)).any()


def test_a_batch_is_decided_by_its_mean_error(reference: Reference) -> None:
    tasks = {"one": 1, "two": 2}
    fit = {name: _taps(task, 200)[0] for name, task in tasks.items()}
    selectors = fit_paper(fit, fit, reference=reference, against_reference=False)
    fresh = _taps(2, 200, seed=1)[0]
    paths_N = batch_paths(selectors, fresh)
    assert paths_N.tolist() == [1] * 200
    assert batch_paths(selectors, _taps(WORLD, 128)[0]).tolist() == [ZERO_SHOT] * 128
    alone = batch_paths(selectors, fresh, 1)
    accepted_NT = torch.stack([s.accepted(fresh) for s in selectors.values()], 1)
    assert (alone == ZERO_SHOT).tolist() == (~accepted_NT.any(1)).tolist()


def test_a_reference_comes_back_from_its_file(reference: Reference, tmp_path: Path) -> None:
    backbone = replace(load_backbone(MINI), fingerprint=reference.fingerprint)
    assert load_reference(backbone, tmp_path) is None
    path = tmp_path / "references" / "0123456789abcdef.safetensors"
    save_reference(reference, path)
    again = load_reference(backbone, tmp_path)
    assert again is not None
    assert again.ddas.same(reference.ddas)
    assert again.paper.same(reference.paper)
    for name, gaussian in reference.gaussians.items():
        assert again.gaussians[name].images == gaussian.images == 500
        torch.testing.assert_close(again.gaussians[name].covariance_FF, gaussian.covariance_FF)


def test_the_shipped_reference_is_that_of_the_shipped_base(tmp_path: Path) -> None:
    reference = load_reference(load_backbone(MINI), tmp_path)
    assert reference is not None
    assert tuple(reference.gaussians) == FEATURES
    assert reference.paper.code_size == PAPER.code_size
    for gaussian in reference.gaussians.values():
        assert gaussian.images == 6000
        assert torch.linalg.eigvalsh(gaussian.covariance_FF).min() > 0
