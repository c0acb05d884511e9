"""Low-rank updates of a linear layer: the plain definition against float64, laws and refusals."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.expert_mixing import add_low_rank_
from tests.kernels.low_rank_cases import Case, build, update_error
from tests.tolerances import PLAIN

USUAL = Case(B=6, L=7, I=32, O=48, R=8)
UPDATE = ("x_BLI", "slots_B", "down_SRI", "up_SRO", "scale_S")


def arguments(case: Case) -> dict[str, Any]:
    """What the operation takes, all of it sound: a CPU refuses the slot that is out of range."""
    p = build(case)
    slots_B = p.slots_B.where(p.slots_B < len(p.scale_S), -1)
    return {"y_BLO": p.y_BLO} | {name: getattr(p, name) for name in UPDATE} | {"slots_B": slots_B}


def low_rank(**update: Tensor) -> Tensor:
    """The updates alone."""
    width = update["up_SRO"].shape[2]
    y_BLO = update["x_BLI"].new_zeros(*update["x_BLI"].shape[:2], width)
    return add_low_rank_(y_BLO, **update)


@pytest.mark.parametrize("dtype", PLAIN, ids=str)
@pytest.mark.parametrize("shape", [(19, 128, 512, 16), (7, 41, 24, 5), (1, 16, 64, 1)])
def test_the_plain_definition_agrees_with_float64(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    L, inputs, outputs, R = shape
    case = replace(USUAL, L=L, I=inputs, O=outputs, R=R, dtype=dtype)
    args = arguments(case)
    assert (
        update_error(low_rank(**{name: args[name] for name in UPDATE}), build(case)) <= PLAIN[dtype]
    )


def test_a_layer_with_its_update_is_the_layer_of_the_merged_weight() -> None:
    args = arguments(USUAL)
    g = torch.Generator().manual_seed(1)
    weight_OI = torch.randn(48, 32, generator=g) / 32**0.5
    y_BLO = torch.nn.functional.linear(args["x_BLI"], weight_OI)
    add_low_rank_(**(args | {"y_BLO": y_BLO}))
    for x_LI, y_LO, slot in zip(args["x_BLI"], y_BLO, args["slots_B"].tolist(), strict=True):
        merged_OI = weight_OI.clone()
        if slot >= 0:
            merged_OI += args["scale_S"][slot] * args["up_SRO"][slot].T @ args["down_SRI"][slot]
        # Two float32 sums of about 40 terms of size one, added in another order.
        torch.testing.assert_close(y_LO, x_LI @ merged_OI.T, rtol=1e-5, atol=1e-5)


def test_rows_without_a_slot_keep_their_bits() -> None:
    args = arguments(USUAL)
    y_BLO = args["y_BLO"].clone()
    none_B = args["slots_B"] < 0
    assert 0 < none_B.sum() < len(none_B)
    assert add_low_rank_(**args) is args["y_BLO"]
    assert torch.equal(args["y_BLO"][none_B], y_BLO[none_B])
    assert (args["y_BLO"][~none_B] != y_BLO[~none_B]).any(-1).all()


def test_alone_the_update_of_a_row_without_a_slot_is_zero() -> None:
    args = arguments(USUAL)
    y_BLO = low_rank(**{name: args[name] for name in UPDATE})
    assert y_BLO.isfinite().all()  # unused slots are NaN
    assert not y_BLO[args["slots_B"] < 0].any()


def test_a_smaller_rank_padded_with_zeros_adds_the_same() -> None:
    args = arguments(USUAL)
    args = {name: args[name] for name in UPDATE}
    padded = {n: torch.nn.functional.pad(args[n], (0, 0, 0, 8)) for n in ("down_SRI", "up_SRO")}
    torch.testing.assert_close(low_rank(**(args | padded)), low_rank(**args), rtol=1e-6, atol=1e-6)


@given(seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_a_row_does_not_depend_on_the_other_rows_of_a_batch(seed: int) -> None:
    args, other = (arguments(replace(USUAL, B=8, seed=seed + i)) for i in range(2))
    args = {name: args[name] for name in UPDATE}
    before = low_rank(**args)
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(8, generator=g)
    keep = torch.rand(8, generator=g) < 0.5
    x_BLI = torch.where(keep[:, None, None], args["x_BLI"], other["x_BLI"])[order]
    slots_B = torch.where(keep, args["slots_B"], args["slots_B"].flip(0))[order]
    after = torch.empty_like(before)
    after[order] = low_rank(**(args | {"x_BLI": x_BLI, "slots_B": slots_B}))
    assert torch.equal(after[keep], before[keep])


def test_an_empty_batch_and_an_empty_pool_add_nothing() -> None:
    args = arguments(USUAL)
    rows = {n: args[n][:0] for n in ("y_BLO", "x_BLI", "slots_B")}
    assert add_low_rank_(**(args | rows)).shape == (0, 7, 48)
    pool = {n: args[n][:0] for n in ("down_SRI", "up_SRO", "scale_S")}
    none_B = torch.full_like(args["slots_B"], -1)
    y_BLO = args["y_BLO"].clone()
    assert torch.equal(add_low_rank_(**(args | pool | {"slots_B": none_B})), y_BLO)


WRONGS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "shorter": (lambda t: t[..., :-1].contiguous(), "has shape"),
    "strided": (lambda t: torch.stack([t, t], -1)[..., 0], "is not contiguous: its strides are"),
    "of another dtype": (
        lambda t: t.int() if t.dtype == torch.int64 else t.half(),
        "is torch.float16, expected torch.float32|is torch.int32, expected torch.int64",
    ),
    "elsewhere": (lambda t: t.to("meta"), "is on meta, x_BLI on cpu"),
}


@pytest.mark.parametrize("wrong", WRONGS)
def test_a_tensor_that_does_not_fit_is_refused_by_name(wrong: str) -> None:
    args = arguments(USUAL)
    change, message = WRONGS[wrong]
    for name, tensor in args.items():
        if name == "x_BLI" and wrong != "strided":  # what the others have to fit
            continue
        with pytest.raises(ValueError, match=message) as refused:
            add_low_rank_(**(args | {name: change(tensor)}))
        assert wrong == "shorter" or name in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x_BLI", torch.zeros(6, 32), "expected \\(B, L, I\\), \\(S, R, I\\) and \\(S, R, O\\)"),
        ("x_BLI", torch.zeros(6, 0, 32), "x_BLI has shape .* expected at least one token"),
        ("x_BLI", torch.zeros(6, 7, 32, dtype=torch.int64), "x_BLI is torch.int64"),
        ("slots_B", torch.full((6,), 5), "slots_B holds 5, there are 5"),
    ],
)
def test_a_wrong_value_is_refused_with_the_value(name: str, value: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_low_rank_(**(arguments(USUAL) | {name: value}))


@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_a_device_is_traced_without_one(device: str) -> None:
    args = arguments(replace(USUAL, dtype=torch.bfloat16))
    with FakeTensorMode() if device == "cuda" else nullcontext():
        fake = {n: torch.empty(t.shape, dtype=t.dtype, device=device) for n, t in args.items()}
        assert add_low_rank_(**fake) is fake["y_BLO"]
        y_BLO = low_rank(**{name: fake[name] for name in UPDATE})
    assert (y_BLO.device.type, y_BLO.shape, y_BLO.dtype) == (device, (6, 7, 48), torch.bfloat16)
