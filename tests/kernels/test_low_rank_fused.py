"""The kernel of the low-rank updates, interpreted and on a device, against float64 and its laws."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.expert_mixing import table
from kernels.expert_mixing.table import Launch, find
from tests.kernels.interpreter import Interpreter
from tests.kernels.low_rank_cases import Case, Problem, build, error, launched
from tests.kernels.mixing_cases import small
from tests.kernels.mutants import LOW_RANK_MUTANTS, written
from tests.kernels.runner import Runner
from tests.tolerances import FUSED

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
USUAL = Case(B=6, L=18, I=64, O=96, R=24)


def tolerance(dtype: torch.dtype) -> float:
    # The sum with y is rounded to it, and is of about twice the size of the update alone.
    return FUSED[dtype] * 2


def assert_right(runner: Runner, case: Case, launch: Launch | None = None) -> None:
    p = build(case)
    y_BLO = runner.call(launched, p, launch)
    assert y_BLO.dtype is case.dtype
    assert error(y_BLO, p) <= tolerance(case.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [USUAL, Case(B=4, L=1, I=80, O=16, R=64), Case(B=3, L=33, I=48, O=256, R=5)],
    ids=lambda c: f"{c.L}x{c.I}x{c.O}-{c.R}",
)
def test_the_kernel_agrees_with_float64(runner: Runner, case: Case, dtype: torch.dtype) -> None:
    assert_right(runner, replace(case, dtype=dtype), small(split=2))


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_the_kernel_agrees_with_float64_at_any_size(runner: Runner, data: st.DataObject) -> None:
    case = Case(
        B=data.draw(st.integers(0, 4)),
        L=data.draw(st.integers(1, 35)),
        I=16 * data.draw(st.integers(1, 10)),
        O=16 * data.draw(st.integers(1, 10)),
        R=data.draw(st.integers(1, 70)),
        dtype=data.draw(st.sampled_from(DTYPES)),
        seed=data.draw(st.integers(0, 1000)),
    )
    assert_right(runner, case, small(split=data.draw(st.sampled_from([1, 2, 3]))))


@pytest.mark.parametrize(("inputs", "outputs"), [(768, 3072), (3072, 768)])
def test_the_tiles_of_a_large_batch_are_right_at_the_layers_of_a_vit_b_16(
    runner: Runner, inputs: int, outputs: int
) -> None:
    launch = find(256, 197, hidden=64, itemsize=2)
    case = Case(B=1, L=197, I=inputs, O=outputs, R=64, dtype=torch.bfloat16)
    assert_right(runner, case, launch)


@pytest.mark.parametrize("slot", [5, -2, 2**40, -(2**40)])
def test_a_slot_out_of_range_is_none(runner: Runner, slot: int) -> None:
    p = build(USUAL)
    p.slots_B[2] = slot
    y_BLO = runner.call(launched, p, small())
    assert torch.equal(y_BLO[2], p.y_BLO[2])
    assert error(y_BLO, p) <= tolerance(USUAL.dtype)


def test_a_pool_may_have_no_slots(runner: Runner) -> None:
    p = build(USUAL)
    empty = {n: getattr(p, n)[:0].clone() for n in ("down_SRI", "up_SRO", "scale_S")}
    assert torch.equal(runner.call(launched, replace(p, **empty), small()), p.y_BLO)


def alone(p: Problem, b: int) -> Problem:
    names = ("y_BLO", "x_BLI", "slots_B")
    return replace(p, **{name: getattr(p, name)[b : b + 1].clone() for name in names})


def test_a_row_is_the_same_to_the_bit_in_any_batch(runner: Runner) -> None:
    p = build(replace(USUAL, dtype=torch.bfloat16))
    together = runner.call(launched, p, small(split=2))
    for b in range(USUAL.B):
        assert torch.equal(runner.call(launched, alone(p, b), small(split=2))[0], together[b])


def test_a_value_that_is_no_number_stays_in_its_image(runner: Runner) -> None:
    p = build(USUAL)
    clean = runner.call(launched, p, small())
    p.x_BLI[2, 5, 7] = torch.nan
    after = runner.call(launched, p, small())
    others = [0, 1, 3, 4, 5]
    assert torch.equal(after[others], clean[others])
    assert after[2, 5].isnan().all()


@cache
def _register_on_cpu() -> None:
    """Let the registered operation run on the CPU too, by the interpreted kernel."""
    from kernels.expert_mixing import fused_low_rank, ops

    @ops.add_low_rank_cuda_.register_kernel("cpu")
    def _(*args: Tensor) -> None:
        fused_low_rank.add_low_rank_(*args)


def registered(p: Problem) -> Tensor:
    """Ask the registered operation, as a server does. For `Runner.call`."""
    from kernels.expert_mixing import ops

    if p.x_BLI.device.type == "cpu":
        _register_on_cpu()
    y_BLO = p.y_BLO.clone()
    with torch.inference_mode():
        ops.add_low_rank_cuda_(y_BLO, p.x_BLI, p.slots_B, p.down_SRI, p.up_SRO, p.scale_S)
    return y_BLO


def test_the_registered_operation_changes_y_in_inference_mode(runner: Runner) -> None:
    p = build(USUAL)
    assert error(runner.call(registered, p), p) <= tolerance(USUAL.dtype)


def test_a_layer_that_no_tensor_core_takes_is_refused(runner: Runner) -> None:
    for inputs, outputs in ((40, 64), (64, 40)):
        p = build(replace(USUAL, I=inputs, O=outputs))
        with pytest.raises(ValueError, match="width 40 is not a multiple of 16"):
            runner.call(launched, p)


SOURCE = Path(table.__file__).with_name("fused_low_rank.py")


def wrong(interpreter: Interpreter, source: Path) -> bool:
    p = build(replace(USUAL, dtype=torch.float32))
    try:
        y_BLO = interpreter.call(launched, p, small(split=3), source=source)
    except AssertionError:
        return True
    return error(y_BLO, p) > tolerance(torch.float32)


def test_the_kernel_itself_passes(interpreter: Interpreter, tmp_path: Path) -> None:
    assert not wrong(interpreter, written(tmp_path, "low_rank", SOURCE.read_text()))


@pytest.mark.parametrize("name", LOW_RANK_MUTANTS)
def test_a_mutant_is_caught(interpreter: Interpreter, tmp_path: Path, name: str) -> None:
    old, new = LOW_RANK_MUTANTS[name]
    text = SOURCE.read_text()
    assert text.count(old) == 1
    number = list(LOW_RANK_MUTANTS).index(name)
    assert wrong(interpreter, written(tmp_path, f"low_rank_{number}", text.replace(old, new)))
