from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medley.backbone import Backbone
from medley.errors import DataError
from tests.models import tiny_backbone
from tests.trainer.test_experts import WIDTH, frozen_experts
from tests.trainer.test_training import IMAGES, Watch
from trainer.distributed import Team
from trainer.experts import BlockMixture, ExpertConfig
from trainer.methods import Lora, MoeAdapter
from trainer.options import RedundancyName
from trainer.redundancy import (
    LEAST_RANKS,
    MEASURES,
    TOKENS,
    Groups,
    MeasureName,
    SubspaceRedundancy,
    group_count,
    sampled,
)
from trainer.settings import Method, TrainSettings
from trainer.training import Trained, redundancy_weight, train

NAMES = tuple(MEASURES)
OF_TOKENS: tuple[MeasureName, ...] = ("distribution_divergence", "output_cosine")
SETTINGS = TrainSettings(
    iterations=20, batch_size=16, lr=2e-2, bottleneck=16, first_expert_block=1, redundancy_weight=1
)
EXPERTS, RANK, INPUTS, OUTPUTS, TOKEN_COUNT = 2, 6, 9, 8, 20
SEEDS = st.integers(0, 2**32 - 1)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def groups(
    seed: int = 0,
    *,
    tokens_SI: Tensor | None = None,
    counted_SE: Tensor | None = None,
    down_ERI: Tensor | None = None,
    bias_ER: Tensor | None = None,
    up_ERO: Tensor | None = None,
    experts: int = EXPERTS,
) -> Groups:
    """Two groups of three ranks in each expert; random where nothing is given."""
    tokens_SI = drawn(1, TOKEN_COUNT, INPUTS) if tokens_SI is None else tokens_SI
    return Groups.of(
        tokens_SI,
        drawn(seed, experts, RANK, INPUTS) if down_ERI is None else down_ERI,
        drawn(seed + 1, experts, RANK) if bias_ER is None else bias_ER,
        drawn(seed + 2, experts, RANK, OUTPUTS) if up_ERO is None else up_ERO,
        tokens_SI.new_ones(len(tokens_SI), experts) if counted_SE is None else counted_SE,
        groups=2,
    )


def alike(measure: MeasureName, one: Groups, other: Groups | None = None) -> Tensor:
    return MEASURES[measure](one, one if other is None else other, lambda sums: sums)


def rotation(seed: int, size: int) -> Tensor:
    return torch.linalg.qr(drawn(seed, size, size)).Q


def test_correlation_is_that_of_the_definition() -> None:
    one = groups()
    features_SGM = torch.einsum("si,gmi->sgm", one.tokens_SI, one.down_GMI)
    correlation = torch.corrcoef(features_SGM.flatten(1).T).view(4, 3, 4, 3)
    expected_GG = correlation.square().sum((1, 3)) / 3
    torch.testing.assert_close(alike("feature_correlation", one), expected_GG)


def test_divergence_is_that_of_the_definition() -> None:
    p_SGM = torch.softmax(groups().features, -1)
    log_p = p_SGM.log()
    kl_SGG = (p_SGM[:, :, None] * (log_p[:, :, None] - log_p[:, None])).sum(-1)
    expected_GG = torch.exp(-0.5 * (kl_SGG + kl_SGG.transpose(1, 2))).mean(0)
    torch.testing.assert_close(alike("distribution_divergence", groups()), expected_GG)


def test_the_cosine_is_that_of_the_outputs() -> None:
    one = groups()
    output_SGO = torch.nn.functional.normalize(
        torch.einsum("sgm,gmo->sgo", one.features, one.up_GMO), dim=-1
    )
    expected_GG = (output_SGO @ output_SGO.mT).square().mean(0)
    torch.testing.assert_close(alike("output_cosine", one), expected_GG)


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_equal_groups_are_as_alike_as_can_be(seed: int) -> None:
    one = groups(seed)
    for measure in NAMES:
        each_GG = alike(measure, one)
        own_G = each_GG.diagonal()
        torch.testing.assert_close(each_GG, each_GG.T)
        # Not even one that spans the same and more is more alike, but for the measures' scale.
        assert (each_GG <= (own_G[:, None] * own_G).sqrt() + 1e-9).all() or measure == "weight"
        assert (each_GG > 0).all()
        if measure in OF_TOKENS:
            torch.testing.assert_close(own_G, torch.ones_like(own_G))
            assert (each_GG <= 1 + 1e-12).all()
    correlation_G = alike("feature_correlation", one).diagonal()
    assert ((correlation_G >= 1) & (correlation_G <= 3)).all()
    assert (alike("weight", one) <= 2 * 3).all()


def test_orthogonal_groups_are_not_redundant_at_all() -> None:
    down_ERI = torch.eye(INPUTS, dtype=torch.float64)[:RANK][None]
    up_ERO = torch.eye(OUTPUTS, dtype=torch.float64)[:RANK][None]
    # Tokens whose features are uncorrelated: each sign pattern once.
    tokens_SI = torch.tensor([[1, -1]], dtype=torch.float64).T
    tokens_SI = torch.cartesian_prod(*[tokens_SI[:, 0]] * INPUTS)
    one = groups(
        experts=1,
        tokens_SI=tokens_SI,
        down_ERI=down_ERI,
        up_ERO=up_ERO,
        bias_ER=down_ERI.new_zeros(1, RANK),
    )
    for measure in ("feature_correlation", "output_cosine", "weight"):
        assert alike(measure, one)[0, 1] < 1e-30, measure
    how = SubspaceRedundancy(groups=2)
    assert how.of(one) < 1e-30


def test_what_is_far_apart_has_no_common_distribution() -> None:
    down_ERI = drawn(0, 1, RANK, INPUTS)
    down_ERI[:, 3:] = -down_ERI[:, :3]
    near, far = (groups(experts=1, down_ERI=size * down_ERI) for size in (0.01, 100))
    assert alike("distribution_divergence", near)[0, 1] > 0.9
    assert alike("distribution_divergence", far)[0, 1] < 0.1


@given(seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_what_changes_nothing_changes_no_measure(seed: int) -> None:
    """Sizes and signs of ranks, shifts of all features, and rotations of what a group spans."""
    one = groups(seed)
    size_G11 = drawn(seed + 3, 4, 1, 1).exp()
    scaled = replace(one, down_GMI=one.down_GMI * size_G11, bias_GM=one.bias_GM * size_G11[..., 0])
    resized = replace(one, up_GMO=one.up_GMO * size_G11)
    moved = replace(one, bias_GM=one.bias_GM + drawn(seed + 4, 4, 3))
    lifted = replace(one, bias_GM=one.bias_GM + drawn(seed + 4, 4, 1))
    turn = rotation(seed + 5, 3)
    turned = replace(
        one,
        down_GMI=turn @ one.down_GMI,
        bias_GM=one.bias_GM @ turn.T,
        up_GMO=turn @ one.up_GMO,
    )
    whirl = rotation(seed + 6, INPUTS)
    elsewhere = replace(one, tokens_SI=one.tokens_SI @ whirl, down_GMI=one.down_GMI @ whirl)
    same: dict[MeasureName, tuple[Groups, ...]] = {
        "feature_correlation": (scaled, resized, moved, elsewhere),
        "distribution_divergence": (resized, lifted, elsewhere),
        "output_cosine": (scaled, resized, turned, elsewhere),
        "weight": (scaled, resized, moved, elsewhere),
    }
    for measure, others in same.items():
        for other in others:
            torch.testing.assert_close(alike(measure, other), alike(measure, one))


@pytest.mark.parametrize("measure", NAMES)
def test_gradients_are_those_of_finite_differences(measure: MeasureName) -> None:
    counted_SE = (drawn(7, TOKEN_COUNT, EXPERTS) > -0.5).double()
    frozen = groups(20, experts=1)
    how = SubspaceRedundancy(measure=measure, groups=2)

    def redundancy(down_ERI: Tensor, bias_ER: Tensor, up_ERO: Tensor) -> Tensor:
        new = groups(down_ERI=down_ERI, bias_ER=bias_ER, up_ERO=up_ERO, counted_SE=counted_SE)
        return how.of(new, frozen)

    leaves = (
        drawn(3, EXPERTS, RANK, INPUTS).requires_grad_(),
        drawn(4, EXPERTS, RANK).requires_grad_(),
        drawn(5, EXPERTS, RANK, OUTPUTS).requires_grad_(),
    )
    assert torch.autograd.gradcheck(redundancy, leaves)


@pytest.mark.parametrize("measure", NAMES)
def test_descent_takes_groups_apart(measure: MeasureName) -> None:
    down_ERI = drawn(0, 1, RANK, INPUTS)
    down_ERI[:, 3:] = down_ERI[:, :3] + 0.1 * drawn(1, 1, 3, INPUTS)
    leaves = [down_ERI.requires_grad_(), drawn(2, 1, RANK, OUTPUTS).requires_grad_()]
    how, found = SubspaceRedundancy(measure=measure, groups=2), []
    optimiser = torch.optim.Adam(leaves, lr=0.05)
    for _ in range(60):
        redundancy = how.of(groups(experts=1, down_ERI=leaves[0], up_ERO=leaves[1]))
        optimiser.zero_grad()
        redundancy.backward()
        optimiser.step()
        found.append(float(redundancy.detach()))
    assert found[-1] < 0.5 * found[0]


@pytest.mark.parametrize("measure", NAMES)
def test_updates_that_add_nothing_yet_have_finite_gradients(measure: MeasureName) -> None:
    up_ERO = torch.zeros(EXPERTS, RANK, OUTPUTS, dtype=torch.float64, requires_grad=True)
    down_ERI = drawn(0, EXPERTS, RANK, INPUTS).requires_grad_()
    still_SI = drawn(1, 1, INPUTS).expand(TOKEN_COUNT, -1)  # constant features
    for tokens_SI in (None, still_SI):
        new = groups(down_ERI=down_ERI, up_ERO=up_ERO, tokens_SI=tokens_SI)
        SubspaceRedundancy(measure=measure, groups=2).of(new).backward()
    assert down_ERI.grad is not None
    assert down_ERI.grad.isfinite().all()
    assert up_ERO.grad is None or torch.equal(up_ERO.grad, torch.zeros_like(up_ERO))


@pytest.mark.parametrize("measure", NAMES)
def test_terms_are_added_and_only_of_experts_that_meet(measure: MeasureName) -> None:
    frozen = groups(20, experts=1)
    apart_SE = torch.eye(2, dtype=torch.float64).repeat(TOKEN_COUNT // 2, 1)  # never the same token

    def redundancy(counted_SE: Tensor | None = None, **terms: bool) -> float:
        which = {"within": False, "across": False, "frozen": False, **terms}
        how = SubspaceRedundancy(measure=measure, groups=2, **which)
        return float(how.of(groups(counted_SE=counted_SE), frozen))

    parts = [redundancy(within=True), redundancy(across=True), redundancy(frozen=True)]
    assert min(parts) > 0
    assert redundancy(within=True, across=True, frozen=True) == pytest.approx(sum(parts))
    assert redundancy() == 0
    assert redundancy(apart_SE, across=True) == 0
    assert redundancy(apart_SE, within=True) > 0


@pytest.mark.parametrize("measure", NAMES)
def test_tokens_of_other_experts_do_not_count(measure: MeasureName) -> None:
    counted_SE = (drawn(7, TOKEN_COUNT, 1) > -0.5).double()
    kept = counted_SE[:, 0].bool()
    tokens_SI = drawn(1, TOKEN_COUNT, INPUTS)
    how = SubspaceRedundancy(measure=measure, groups=2)
    some = how.of(groups(experts=1, counted_SE=counted_SE))
    alone = how.of(groups(experts=1, tokens_SI=tokens_SI[kept]))
    torch.testing.assert_close(some, alone)
    nobody = how.of(groups(experts=1, counted_SE=torch.zeros_like(counted_SE)))
    assert nobody == 0


@pytest.mark.parametrize(
    ("rank", "wanted", "count"),
    [(64, 8, 8), (32, 8, 4), (24, 8, 3), (20, 8, 2), (17, 8, 1), (4, 8, 1), (64, 3, 2)],
)
def test_groups_are_equal_and_never_too_small(rank: int, wanted: int, count: int) -> None:
    assert group_count(rank, wanted) == count
    assert rank % count == 0
    assert count == 1 or rank // count >= LEAST_RANKS


def test_processes_look_at_the_tokens_that_one_alone_looks_at() -> None:
    x_BLD = torch.randn(7, 2 * TOKENS, 2)
    whole_BLD = sampled(x_BLD, Team().part(7))
    assert whole_BLD.shape == (7, TOKENS // 7, 2)
    parts = (Team(rank, 3).part(7) for rank in range(3))
    assert torch.equal(torch.cat([sampled(x_BLD[p.rows], p) for p in parts]), whole_BLD)
    assert torch.equal(sampled(x_BLD[:, :5], Team().part(7)), x_BLD[:, :5])


@pytest.mark.parametrize("measure", NAMES)
def test_processes_that_add_up_their_sums_see_the_whole_batch(measure: MeasureName) -> None:
    """Threads stand for processes; test_distributed.py has real ones, and their gradients."""
    how, shares = SubspaceRedundancy(measure=measure, groups=2), (3, 17, 0)
    counted_SE, tokens_SI = (drawn(7, TOKEN_COUNT, EXPERTS) > -0.5).double(), drawn(1, 20, INPUTS)
    frozen = [
        groups(20, experts=1, tokens_SI=t_SI) for t_SI in (tokens_SI, *tokens_SI.split(shares))
    ]
    parts = zip(tokens_SI.split(shares), counted_SE.split(shares), frozen[1:], strict=True)
    meeting, said = Barrier(len(shares)), [torch.empty(0)] * len(shares)

    def redundancy(rank: int, tokens_SI: Tensor, counted_SE: Tensor, frozen: Groups) -> Tensor:
        def total(own: Tensor) -> Tensor:
            said[rank] = own
            meeting.wait()
            whole = torch.stack(said).sum(0)
            meeting.wait()
            return whole

        return how.of(groups(tokens_SI=tokens_SI, counted_SE=counted_SE), frozen, total=total)

    with ThreadPoolExecutor(len(shares)) as pool:
        found = [pool.submit(redundancy, rank, *part) for rank, part in enumerate(parts)]
    whole = how.of(groups(counted_SE=counted_SE), frozen[0])
    for one in found:
        torch.testing.assert_close(one.result(), whole)


def mixture(how: SubspaceRedundancy | None, **changed: Any) -> BlockMixture:
    config = ExpertConfig(num_new=3, bottleneck=16, top_k=2, scale=0.1, dropout=0.1, redundancy=how)
    torch.manual_seed(0)
    made = BlockMixture(WIDTH, None, replace(config, **changed))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def test_looking_changes_neither_answers_nor_random_numbers() -> None:
    x_BLD, answers = torch.randn(6, 5, WIDTH), []
    for how in (None, SubspaceRedundancy()):
        y_BLD, penalties = mixture(how)(x_BLD)
        answers.append((y_BLD, torch.rand(3)))
        assert bool(penalties.redundancy > 0) == (how is not None)
    assert all(torch.equal(one, other) for one, other in zip(*answers, strict=True))
    assert mixture(SubspaceRedundancy()).eval()(x_BLD)[1].redundancy == 0


def test_gradients_reach_new_experts_and_not_what_they_read() -> None:
    frozen = frozen_experts()
    torch.manual_seed(0)
    config = ExpertConfig(num_new=2, bottleneck=4, top_k=2, scale=0.1, dropout=0.1)
    how = SubspaceRedundancy(within=False, across=False)  # frozen ones alone
    x_BLD = torch.randn(6, 5, WIDTH, requires_grad=True)
    for measure in NAMES:
        made = BlockMixture(
            WIDTH, frozen, replace(config, redundancy=replace(how, measure=measure))
        )
        with torch.no_grad():
            made.up_ERD.normal_()
        _, penalties = made(x_BLD)
        assert penalties.redundancy > 0
        penalties.redundancy.backward()
        assert x_BLD.grad is None
        grads = [made.down_ERD.grad, made.up_ERD.grad]
        assert any(grad is not None and grad.abs().sum() > 0 for grad in grads), measure


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


def learnt(backbone: Backbone, folder: Path, **changed: Any) -> Trained:
    return train(
        backbone,
        IMAGES,
        None,
        replace(SETTINGS, **changed),
        checkpoint=folder / "checkpoint.pt",
        identity="x",
        resume=False,
        checkpoint_every_s=1e9,
        watcher=Watch(),
    )


@pytest.mark.parametrize("method", ["moe_adapter", "lora"])
def test_training_makes_updates_less_redundant(
    backbone: Backbone, tmp_path: Path, method: Method
) -> None:
    how, found = SubspaceRedundancy(), []
    for redundancy in ("off", "feature_correlation"):
        run = learnt(backbone, tmp_path, method=method, redundancy=redundancy)
        assert isinstance(run.learner, MoeAdapter | Lora)
        found.append(float(run.learner.redundancy(run.trunk.batch(np.arange(16), 0), how)))
    assert 0 < found[1] < 0.9 * found[0]


def test_without_weight_the_bits_are_those_of_off(backbone: Backbone, tmp_path: Path) -> None:
    off = learnt(backbone, tmp_path)
    weightless = learnt(backbone, tmp_path, redundancy="weight", redundancy_weight=0.0)
    assert off.history.losses == weightless.history.losses
    states = (run.learner.state_dict() for run in (off, weightless))
    assert all(torch.equal(*pair) for pair in zip(*(s.values() for s in states), strict=True))


def test_the_weight_grows_over_the_first_tenth() -> None:
    on = replace(SETTINGS, redundancy="weight", iterations=100, redundancy_weight=0.5)
    weights = [redundancy_weight(on, step) for step in (0, 5, 10, 99)]
    assert weights == [0.0, 0.25, 0.5, 0.5]
    assert redundancy_weight(replace(on, redundancy="off"), 50) == 0
    assert redundancy_weight(replace(on, iterations=1), 0) == 0  # there is nothing to warm up in


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "finetune"}, "finetune has no low-rank updates: redundancy must be off"),
        ({"method": "lora", "bottleneck": 8}, "nothing is compared: bottleneck is 8"),
        ({"redundancy_weight": -1.0}, "redundancy_weight is -1; it must be at least 0"),
        ({"redundancy_groups": 0}, "redundancy_groups is 0; it must be at least 1"),
        (
            {"redundancy_across": False, "redundancy_frozen": False, "redundancy_groups": 1},
            "nothing is compared: bottleneck is 16, a group has at least 8 ranks",
        ),
    ],
)
def test_settings_that_compare_nothing_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(SETTINGS, redundancy="weight", **changed)


def test_a_method_without_low_rank_updates_learns_without() -> None:
    on = replace(SETTINGS, redundancy="weight")
    assert on.for_method("finetune").redundancy == "off"
    assert on.for_method("lora").redundancy == "weight"


def test_the_command_knows_every_measure() -> None:
    assert [name.value for name in RedundancyName] == ["off", *MEASURES]
