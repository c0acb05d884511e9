"""The fused kernel, interpreted and on a device, against float64 and the laws of the operation."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.expert_mixing.table import find
from tests.kernels.mixing_cases import Case, Form, Paths, Problem, build, errors, launched, small
from tests.kernels.runner import Runner
from tests.tolerances import FUSED

FORMS: tuple[Form, ...] = get_args(Form)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [
    Case(B=4, L=19, D=128, R=16, E=22, K=2),
    Case(B=3, L=5, D=64, R=8, E=6, K=3),
    Case(B=2, L=33, D=48, R=24, E=7, K=2),
    Case(B=4, L=1, D=80, R=64, E=64, K=4),
    Case(B=2, L=17, D=512, R=32, E=22, K=2),
    Case(B=1, L=18, D=768, R=64, E=22, K=2),
    Case(B=1, L=7, D=1024, R=128, E=8, K=1),
    Case(B=1, L=4, D=64, R=128, E=9, K=4),
    Case(B=5, L=16, D=32, R=40, E=6, K=3),
]


def tolerance(case: Case) -> float:
    # r is the sum of three tensors of y's size, and its error goes by that of y.
    return FUSED[case.dtype] * (2 if case.form == "norm" else 1)


def assert_right(runner: Runner, case: Case, *, split: int = 1) -> None:
    p = build(case)
    answers = runner.call(launched, p, small(split=split))
    assert [a.dtype for a in answers] == [case.dtype] * len(answers)
    assert max(errors(answers, p)) <= tolerance(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda c: f"{c.L}x{c.D}-{c.K}x{c.R}-{c.E}")
def test_the_kernel_agrees_with_float64(
    runner: Runner, shape: Case, form: Form, dtype: torch.dtype
) -> None:
    assert_right(runner, replace(shape, form=form, dtype=dtype))


@pytest.mark.parametrize("paths", get_args(Paths))
@pytest.mark.parametrize("form", ["plain", "norm"])
def test_the_kernel_agrees_with_float64_whatever_the_batch_is_made_of(
    runner: Runner, form: Form, paths: Paths
) -> None:
    assert_right(
        runner, Case(B=5, L=18, D=64, R=16, E=6, K=2, P=5, form=form, paths=paths), split=2
    )


@pytest.mark.parametrize(("relu", "keep"), [(False, False), (True, True), (False, True)])
def test_given_experts_may_be_linear_and_under_a_dropout_mask(
    runner: Runner, relu: bool, keep: bool
) -> None:
    assert_right(runner, Case(B=3, L=18, D=64, R=24, E=6, K=3, form="mix", relu=relu, keep=keep))


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_the_kernel_agrees_with_float64_at_any_size(runner: Runner, data: st.DataObject) -> None:
    K = data.draw(st.integers(1, 4))
    case = Case(
        B=data.draw(st.integers(0, 4)),
        L=data.draw(st.integers(1, 35)),
        D=16 * data.draw(st.integers(1, 10)),
        R=data.draw(st.integers(1, 40)),
        E=data.draw(st.integers(K, 12)),
        K=K,
        P=data.draw(st.integers(1, 5)),
        form=data.draw(st.sampled_from(FORMS)),
        dtype=data.draw(st.sampled_from(DTYPES)),
        keep=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 1000)),
    )
    assert_right(runner, case, split=data.draw(st.sampled_from([1, 2, 3])))


def vit_b_16(dtype: torch.dtype, form: Form) -> Case:
    return Case(B=2, L=197, D=768, R=64, E=22, K=2, P=1, form=form, dtype=dtype)


def test_the_tiles_of_a_large_batch_are_right_at_the_shape_of_a_vit_b_16(
    runner: Runner,
) -> None:
    case = vit_b_16(torch.bfloat16, "norm")
    launch = find(256, case.L, hidden=case.K * case.R, itemsize=2)
    assert launch.block_m == 256
    p = build(case)
    assert max(errors(runner.call(launched, p, launch), p)) <= tolerance(case)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tiles_of_every_batch_are_right_at_the_shape_of_a_vit_b_16(
    runner: Runner, dtype: torch.dtype, form: Form
) -> None:
    case = vit_b_16(dtype, form)
    p = build(case)
    for rows in (1, 4, 16, 32, 256):
        launch = find(rows, case.L, hidden=case.K * case.R, itemsize=dtype.itemsize)
        assert max(errors(runner.call(launched, p, launch), p)) <= tolerance(case)


USUAL = Case(B=5, L=18, D=64, R=16, E=6, K=2)


@pytest.mark.parametrize("form", ["plain", "norm"])
def test_rows_without_experts_get_nothing_at_all(runner: Runner, form: Form) -> None:
    case = replace(USUAL, B=4, form=form)  # paths 0, none, 1, and 2 which has none in this block
    p = build(case)
    p.x_BLD[1, 3] = torch.nan
    answer_BLD = runner.call(launched, p, small())[0]
    for b in (1, 3):
        nothing = p.x_BLD[b] + p.out_bias_D if form == "norm" else torch.zeros(case.L, case.D)
        torch.testing.assert_close(answer_BLD[b], nothing, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_batch_writes_nothing(runner: Runner, form: Form) -> None:
    p = build(replace(USUAL, B=0, form=form))
    assert runner.call(launched, p)[0].shape == (0, 18, 64)


def test_a_path_may_name_no_experts_and_a_pool_may_have_no_slots(runner: Runner) -> None:
    p = build(USUAL)
    empty = replace(
        p,
        weights_S2RD=p.weights_S2RD[:0].clone(),
        biases_SF=p.biases_SF[:0].clone(),
        routers_PDE=p.routers_PDE[:, :, :0].clone(),
        slots_PE=p.slots_PE[:, :0].clone(),
    )
    assert not runner.call(launched, empty, small())[0].any()


@pytest.mark.parametrize("path", [3, -2, 2**40, -(2**40)])
def test_a_path_out_of_range_is_none(runner: Runner, path: int) -> None:
    p = build(USUAL)
    p.paths_B[2] = path
    answers = runner.call(launched, p, small())
    assert not answers[0][2].any()
    assert max(errors(answers, p)) <= tolerance(USUAL)


@pytest.mark.parametrize("slot", [3 * 6 + 3, -2, 2**40, -(2**40)])
@pytest.mark.parametrize("form", ["plain", "mix"])
def test_a_slot_out_of_range_is_none(runner: Runner, form: Form, slot: int) -> None:
    p = build(replace(USUAL, form=form))
    p.slots_PE[0, 2:4] = slot
    p.slots_BK[0, 0] = slot
    assert max(errors(runner.call(launched, p, small()), p)) <= tolerance(USUAL)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("token", [0, 5])
def test_a_value_that_is_no_number_stays_in_its_image(
    runner: Runner, token: int, form: Form, value: float
) -> None:
    p = build(replace(USUAL, form=form))
    clean = runner.call(launched, p, small())
    p.x_BLD[2, token, 7] = value
    for before, after in zip(clean, runner.call(launched, p, small()), strict=True):
        others = [0, 1, 3, 4]
        assert torch.equal(before[others], after[others])
        assert not after[2, token].isfinite().all()


def alone(p: Problem, b: int) -> Problem:
    names = ("x_BLD", "paths_B", "slots_BK", "gates_BK")
    return replace(p, **{name: getattr(p, name)[b : b + 1].clone() for name in names})


@pytest.mark.parametrize("form", FORMS)
def test_a_row_is_the_same_to_the_bit_in_any_batch(runner: Runner, form: Form) -> None:
    p = build(replace(USUAL, form=form, dtype=torch.bfloat16))
    together = runner.call(launched, p, small(split=2))
    for b in range(USUAL.B):
        single = runner.call(launched, alone(p, b), small(split=2))
        assert all(torch.equal(s[0], t[b]) for s, t in zip(single, together, strict=True))


def test_where_an_expert_lives_does_not_change_a_bit(runner: Runner) -> None:
    p = build(USUAL)
    order = torch.randperm(len(p.weights_S2RD), generator=torch.Generator().manual_seed(1))
    moved_to = torch.cat([order.argsort(), torch.tensor([-1])])  # the last for -1
    moved = replace(
        p,
        weights_S2RD=p.weights_S2RD[order],
        biases_SF=p.biases_SF[order],
        slots_PE=moved_to[p.slots_PE],
    )
    before, after = (runner.call(launched, q, small())[0] for q in (p, moved))
    assert torch.equal(before, after)


def tied(p: Problem, *, apart: float) -> Problem:
    """Expert 4 of path 0 with (almost) the logit of expert 1, both above all others of row 0."""
    routers_PDE = p.routers_PDE.clone()
    logit = (p.x_BLD[0, 0] @ routers_PDE[0]).max() + 1
    direction_D = p.x_BLD[0, 0] / p.x_BLD[0, 0].square().sum()
    routers_PDE[0, :, 1] = logit * direction_D
    routers_PDE[0, :, 4] = (logit + apart) * direction_D
    return replace(p, routers_PDE=routers_PDE, top_k_P=torch.ones_like(p.top_k_P))


@pytest.mark.parametrize("apart", [1e-6, -1e-6])
def test_of_two_near_ties_either_is_right(runner: Runner, apart: float) -> None:
    p = tied(build(USUAL), apart=apart)
    assert max(errors(runner.call(launched, p, small()), p)) <= tolerance(USUAL)


def test_of_two_equal_logits_the_lower_index_is_chosen(runner: Runner) -> None:
    p = tied(build(USUAL), apart=0)
    without = p.slots_PE.clone()
    without[0, 4] = -1
    both, first = (
        runner.call(launched, q, small())[0][0] for q in (p, replace(p, slots_PE=without))
    )
    assert torch.equal(both, first)


@pytest.mark.parametrize("offset", [100.0, -100.0])
def test_the_layer_norm_does_not_suffer_from_a_large_mean(runner: Runner, offset: float) -> None:
    p = build(replace(USUAL, form="norm", paths="null"))
    p.x_BLD.add_(offset)
    _, z_error = errors(runner.call(launched, p, small()), p)
    # Of a mean of 100, a float32 has eps / 2 * 100 = 6e-6 left of a deviation of 1.
    assert z_error <= 1e-5


def public(p: Problem) -> tuple[Tensor, ...]:
    """The launchers as the registered operations call them. For `Runner.call`."""
    from kernels.expert_mixing import fused

    pool = (p.weights_S2RD, p.biases_SF)
    routing = (p.paths_B, *pool, p.routers_PDE, p.slots_PE, p.top_k_P, p.scale_P)
    if p.form == "plain":
        return (fused.expert_mixing(p.x_BLD, *routing, max_top_k=p.max_top_k),)
    if p.form == "norm":
        norm = (p.out_bias_D, p.norm_weight_D, p.norm_bias_D)
        return fused.expert_mixing_norm(p.x_BLD, *routing, *norm, max_top_k=p.max_top_k, eps=p.eps)
    return (fused.mix(p.x_BLD, p.slots_BK, p.gates_BK, *pool, keep_BLH=p.keep_BLH, relu=p.relu),)


@pytest.mark.parametrize("form", FORMS)
def test_the_launchers_take_what_the_operations_take(runner: Runner, form: Form) -> None:
    p = build(replace(USUAL, form=form, relu=form != "mix", keep=form == "mix"))
    assert max(errors(runner.call(public, p), p)) <= tolerance(replace(USUAL, form=form))


@cache
def _register_on_cpu() -> None:
    """Let the registered operation run on the CPU too, by the interpreted kernel."""
    from kernels.expert_mixing import fused, ops

    @ops.mix_cuda.register_kernel("cpu")
    def _(*args: Any) -> Tensor:
        *tensors, relu, keep_BLH = args
        return fused.mix(*tensors, relu=relu, keep_BLH=keep_BLH)


def gradients(p: Problem, *, plain: bool) -> list[Tensor]:
    """Of a weighted sum of y, with respect to x, gates and the pool. For `Runner.call`."""
    from kernels.expert_mixing import ops, reference

    if p.x_BLD.device.type == "cpu":
        _register_on_cpu()
    inputs = [p.x_BLD, p.gates_BK, p.weights_S2RD, p.biases_SF]
    x_BLD, gates_BK, *pool = (tensor.detach().requires_grad_() for tensor in inputs)
    args = (x_BLD, p.slots_BK, gates_BK, *pool)
    if plain:
        y_BLD = reference.mix(*args, relu=p.relu, keep_BLH=p.keep_BLH)
    else:
        y_BLD = ops.mix_cuda(*args, p.relu, p.keep_BLH)
    weight_BLD = torch.arange(y_BLD.numel(), device=y_BLD.device).view(y_BLD.shape).cos()
    return list(torch.autograd.grad((y_BLD * weight_BLD).sum(), [x_BLD, gates_BK, *pool]))


@pytest.mark.parametrize(("relu", "keep"), [(True, False), (True, True), (False, True)])
def test_gradients_through_the_kernel_are_those_of_the_plain_definition(
    runner: Runner, relu: bool, keep: bool
) -> None:
    p = build(replace(USUAL, form="mix", relu=relu, keep=keep))
    p = replace(p, slots_BK=p.slots_BK.where(p.slots_BK >= 0, p.slots_BK.max()))
    ours = runner.call(gradients, p, plain=False)
    for gradient, expected in zip(ours, runner.call(gradients, p, plain=True), strict=True):
        assert gradient.any()
        torch.testing.assert_close(gradient, expected)


def test_a_width_that_no_tensor_core_takes_is_refused(runner: Runner) -> None:
    p = build(replace(USUAL, D=40))
    with pytest.raises(ValueError, match="width 40 is not a multiple of 16"):
        runner.call(launched, p)
