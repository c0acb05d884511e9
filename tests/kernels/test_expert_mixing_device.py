"""The operations at the shapes that are served, on a CUDA device; on a CPU the smallest of them.

What holds of the kernel at any shape is in `test_expert_mixing_fused.py`, for devices too.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor
from triton import knobs

from kernels.expert_mixing import expert_mixing_norm, fused, mix
from kernels.expert_mixing.table import find
from tests.devices import CUDA, DEVICES, ON_CUDA
from tests.kernels.memory import moved
from tests.kernels.mixing_cases import Case, Form, Problem, answered, build, errors
from tests.tolerances import FUSED, PLAIN

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
VIT_B_16 = Case(B=1, L=197, D=768, R=64, E=22, K=2, P=5)
VIT_L_14 = replace(VIT_B_16, L=257, D=1024)
TEXT = replace(VIT_B_16, L=77, D=512, form="mix")
SERVED = [
    *(replace(case, form=form) for case in (VIT_B_16, VIT_L_14) for form in ("plain", "norm")),
    TEXT,
    replace(VIT_B_16, form="mix", keep=True),  # as in training
]


def name(case: Case) -> str:
    return f"{case.B}x{case.L}x{case.D}-{case.form}-{case.dtype}"


def ran(p: Problem, device: str) -> tuple[Tensor, ...]:
    return tuple(answer.cpu() for answer in answered(moved(p, device)))


def tolerance(case: Case, device: str) -> float:
    # r is the sum of three tensors of y's size, and its error goes by that of y.
    table = FUSED if device == "cuda" else PLAIN
    return table[case.dtype] * (2 if case.form == "norm" else 1)


@pytest.mark.parametrize(
    ("device", "case"),
    [
        *(("cpu", case) for case in SERVED if case.D == 768),
        *(
            pytest.param("cuda", replace(case, B=rows, dtype=dtype), marks=ON_CUDA)
            for case in SERVED
            for rows in (1, 8, 64)
            for dtype in DTYPES
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else name(value),
)
def test_the_operations_agree_with_float64(device: str, case: Case) -> None:
    """Images of several tasks and of none; unused slots and all memory beside are NaN."""
    p = build(case)
    answers = ran(p, device)
    assert [a.dtype for a in answers] == [case.dtype] * len(answers)
    assert max(errors(answers, p)) <= tolerance(case, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", get_args(Form))
@pytest.mark.parametrize("token", [0, 150])
def test_what_is_no_number_stays_in_its_image(device: str, form: Form, token: int) -> None:
    p = build(replace(VIT_B_16, B=6, form=form, dtype=torch.bfloat16))
    p.slots_BK.copy_(p.slots_BK.where(p.slots_BK >= 0, p.slots_BK[:, :1]))  # or a CPU refuses
    clean = ran(p, device)
    p.x_BLD[2, token, 7] = torch.nan
    for before, after in zip(clean, ran(p, device), strict=True):
        others = [0, 1, 3, 4, 5]
        assert torch.equal(before[others], after[others])
        assert not after[2, token].isfinite().all()


def only(p: Problem, rows: list[int]) -> Problem:
    names = ("x_BLD", "paths_B", "slots_BK", "gates_BK")
    return replace(p, **{name: getattr(p, name)[rows] for name in names})


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", get_args(Form))
@pytest.mark.parametrize(("some", "all_rows"), [(1, 2), (5, 16), (40, 64)])
def test_a_row_is_the_same_to_the_bit_in_any_batch_of_one_row_of_the_table(
    device: str, form: Form, dtype: torch.dtype, some: int, all_rows: int
) -> None:
    case = replace(VIT_B_16, B=all_rows, form=form, dtype=dtype)
    launches = {
        find(rows, case.L, hidden=case.K * case.R, itemsize=dtype.itemsize)
        for rows in (some, all_rows)
    }
    assert len(launches) == 1
    p = build(case)
    rows = random.Random(0).sample(range(all_rows), some)
    together, apart = ran(p, device), ran(only(p, rows), device)
    assert all(torch.equal(t[rows], a) for t, a in zip(together, apart, strict=True))


def gradients(p: Problem) -> list[Tensor]:
    """Of a weighted sum of y, with respect to x, gates and the pool; in float64, on the host."""
    inputs = [p.x_BLD, p.gates_BK, p.weights_S2RD, p.biases_SF]
    x_BLD, gates_BK, *pool = (tensor.detach().requires_grad_() for tensor in inputs)
    y_BLD = mix(x_BLD, p.slots_BK, gates_BK, *pool, relu=p.relu, keep_BLH=p.keep_BLH)
    weight_BLD = torch.arange(y_BLD.numel(), device=y_BLD.device).view(y_BLD.shape).cos()
    found = torch.autograd.grad((y_BLD * weight_BLD).sum(), [x_BLD, gates_BK, *pool])
    return [gradient.cpu().double() for gradient in found]


def exactly(p: Problem) -> Problem:
    names = ("x_BLD", "gates_BK", "weights_S2RD", "biases_SF", "keep_BLH")
    return replace(p, **{name: getattr(p, name).double() for name in names})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [TEXT, replace(VIT_B_16, form="mix")], ids=name)
def test_gradients_of_linear_experts_agree_with_float64(
    device: str, dtype: torch.dtype, case: Case
) -> None:
    """Linear, since a hidden unit about 0 may pass a ReLU in one precision and not in another."""
    p = build(replace(case, B=3, relu=False, keep=True, dtype=dtype))
    p.slots_BK[1, 1] = p.slots_BK[0, 0]  # an expert of two rows: its gradient is their sum
    for gradient, expected in zip(gradients(moved(p, device)), gradients(exactly(p)), strict=True):
        assert expected.any()
        # One more product than forwards, and what comes in is rounded as well.
        assert (gradient - expected).norm() <= 2 * PLAIN[dtype] * expected.norm()


Soak = Callable[[int, int, random.Random], object]


def soak_norm(p: Problem) -> Soak:
    """Any batch, of any tokens, for any of the first paths and slots of a pool."""

    def call(rows: int, tokens: int, chance: random.Random) -> object:
        paths, slots = (chance.randint(1, len(t)) for t in (p.slots_PE, p.weights_S2RD))
        mixed = [chance.randrange(-1, paths) for _ in range(rows)]
        return expert_mixing_norm(
            p.x_BLD.new_ones(rows, tokens, p.x_BLD.shape[2]),
            torch.tensor(mixed, device=p.x_BLD.device),
            p.weights_S2RD[:slots],
            p.biases_SF[:slots],
            p.routers_PDE[:paths],
            p.slots_PE[:paths],
            p.top_k_P[:paths],
            p.scale_P[:paths],
            p.out_bias_D,
            p.norm_weight_D,
            p.norm_bias_D,
            max_top_k=p.max_top_k,
            eps=p.eps,
        )

    return call


def soak_mix(p: Problem) -> Soak:
    def call(rows: int, tokens: int, chance: random.Random) -> object:
        slots = chance.randint(1, len(p.weights_S2RD))
        chosen = [[chance.randrange(slots) for _ in range(p.max_top_k)] for _ in range(rows)]
        return mix(
            p.x_BLD.new_ones(rows, tokens, p.x_BLD.shape[2]),
            torch.tensor(chosen, device=p.x_BLD.device),
            p.gates_BK.new_ones(rows, p.max_top_k),
            p.weights_S2RD[:slots],
            p.biases_SF[:slots],
        )

    return call


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("soak", [soak_norm, soak_mix])
def test_no_batch_compiles_a_kernel_again_once_the_table_is_warm(
    device: str, soak: Callable[[Problem], Soak], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[object] = []
    hook = "jit_post_compile_hook"
    monkeypatch.setattr(knobs.runtime, hook, lambda **given: compiled.append(given["repr"]))
    # What other tests have compiled is not known here.
    monkeypatch.setattr(fused.kernel, "device_caches", defaultdict(fused.kernel.create_binder))
    chance = random.Random(0)
    call = soak(moved(build(replace(VIT_B_16, dtype=torch.bfloat16)), device))
    batches = [(chance.randint(1, 300), chance.randint(1, 300)) for _ in range(200)]
    firsts = {find(*batch, hidden=128, itemsize=2): batch for batch in batches}
    for batch in firsts.values():
        call(*batch, chance)
    assert len(compiled) == len(firsts) >= 4
    for batch in batches:
        call(*batch, chance)
    assert compiled[len(firsts) :] == []
