"""The public operations: the plain definition against float64, refusals, tracing, the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime import JITFunction

from kernels.expert_mixing import expert_mixing, expert_mixing_norm, fused, mix
from kernels.expert_mixing.table import Launch, find, rows
from tests.kernels.mixing_cases import Case, Form, Problem, build, errors
from tests.tolerances import PLAIN

FORMS: tuple[Form, ...] = get_args(Form)
USUAL = Case(B=5, L=7, D=32, R=8, E=6, K=2)

Arguments = dict[str, Any]


def arguments(case: Case) -> Arguments:
    """What the operation of the case's form takes, all of it sound."""
    p = build(case)
    names = ["x_BLD", "weights_S2RD", "biases_SF"]
    if case.form == "mix":
        slots_BK = p.slots_BK.where(p.slots_BK >= 0, p.slots_BK[:, :1])
        return {n: getattr(p, n) for n in (*names, "gates_BK", "keep_BLH", "relu")} | {
            "slots_BK": slots_BK.where(slots_BK >= 0, p.slots_BK.max())
        }
    names += ["paths_B", "routers_PDE", "slots_PE", "top_k_P", "scale_P", "max_top_k"]
    if case.form == "norm":
        names += ["out_bias_D", "norm_weight_D", "norm_bias_D", "eps"]
    return {name: getattr(p, name) for name in names}


OPERATIONS: dict[Form, Callable[..., Tensor | tuple[Tensor, Tensor]]] = {
    "mix": mix,
    "plain": expert_mixing,
    "norm": expert_mixing_norm,
}


def answers(form: Form, args: Arguments) -> tuple[Tensor, ...]:
    answer = OPERATIONS[form](**args)
    return answer if isinstance(answer, tuple) else (answer,)


@pytest.mark.parametrize("dtype", PLAIN, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(19, 128, 16, 22, 2), (5, 41, 5, 6, 3), (1, 80, 64, 64, 4)])
def test_the_plain_definition_agrees_with_float64(
    shape: tuple[int, int, int, int, int], form: Form, dtype: torch.dtype
) -> None:
    L, D, R, E, K = shape
    case = Case(B=6, L=L, D=D, R=R, E=E, K=K, P=4, form=form, dtype=dtype)
    args = arguments(case)
    p = replace(build(case), **({"slots_BK": args["slots_BK"]} if form == "mix" else {}))
    # r is the sum of three tensors of y's size, and its error goes by that of y.
    assert max(errors(answers(form, args), p)) <= PLAIN[dtype] * (2 if form == "norm" else 1)


@pytest.mark.parametrize(("relu", "keep"), [(False, False), (True, True), (False, True)])
def test_given_experts_may_be_linear_and_under_a_dropout_mask(relu: bool, keep: bool) -> None:
    case = replace(USUAL, form="mix", relu=relu, keep=keep)
    args = arguments(case)
    p: Problem = replace(build(case), slots_BK=args["slots_BK"])
    assert max(errors(answers("mix", args), p)) <= PLAIN[torch.float32]


def test_gradients_reach_given_experts_and_gates_through_a_dropout_mask() -> None:
    args = arguments(Case(B=2, L=3, D=5, R=3, E=3, K=2, form="mix", keep=True))
    args = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in args.items()
    }
    used = args["slots_BK"].flatten()
    args |= {
        "weights_S2RD": args["weights_S2RD"][used],
        "biases_SF": args["biases_SF"][used],
        "slots_BK": torch.arange(4).view(2, 2),
    }
    names = ("x_BLD", "gates_BK", "weights_S2RD", "biases_SF")

    def op(*values: Tensor) -> Tensor:
        return mix(**(args | dict(zip(names, values, strict=True))))

    assert torch.autograd.gradcheck(op, [args[name].requires_grad_() for name in names])


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_batch_gives_empty_answers(form: Form) -> None:
    args = arguments(replace(USUAL, form=form))
    for name in ("x_BLD", "paths_B", "slots_BK", "gates_BK"):
        if name in args:
            args[name] = args[name][:0]
    assert all(a.shape == (0, 7, 32) for a in answers(form, args))


@pytest.mark.parametrize("empty", ["slots", "paths", "experts"])
@pytest.mark.parametrize("form", ["plain", "norm"])
def test_where_there_is_nothing_to_mix_nothing_is_added(form: Form, empty: str) -> None:
    args = arguments(replace(USUAL, form=form))
    args["paths_B"] = torch.full_like(args["paths_B"], -1)
    match empty:
        case "slots":
            args |= {name: args[name][:0] for name in ("weights_S2RD", "biases_SF")}
            args["slots_PE"] = torch.full_like(args["slots_PE"], -1)
        case "paths":
            names = ("routers_PDE", "slots_PE", "top_k_P", "scale_P")
            args |= {name: args[name][:0] for name in names}
        case _:
            args["routers_PDE"] = args["routers_PDE"][:, :, :0].contiguous()
            args["slots_PE"] = args["slots_PE"][:, :0].contiguous()
    nothing = args["x_BLD"] + args["out_bias_D"] if form == "norm" else torch.zeros(5, 7, 32)
    assert torch.equal(answers(form, args)[0], nothing)


def shorter(tensor: Tensor) -> Tensor:
    return tensor[..., :-1].contiguous()


def strided(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor], -1)[..., 0]


def other_dtype(tensor: Tensor) -> Tensor:
    return tensor.int() if tensor.dtype == torch.int64 else tensor.half()


def elsewhere(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


WRONGS: dict[Callable[[Tensor], Tensor], str] = {
    shorter: "has shape",
    strided: "is not contiguous: its strides are",
    other_dtype: "is torch.",
    elsewhere: "is on meta, x_BLD on cpu",
}
NORM = {"out_bias_D", "norm_weight_D", "norm_bias_D"}


@pytest.mark.parametrize("wrong", WRONGS, ids=lambda w: w.__name__)
@pytest.mark.parametrize("form", FORMS)
def test_a_tensor_that_does_not_fit_is_refused_by_name(
    form: Form, wrong: Callable[[Tensor], Tensor]
) -> None:
    args = arguments(replace(USUAL, form=form, keep=form == "mix"))
    for name, tensor in args.items():
        # x is what the others have to fit, and the norm's tensors may be of any dtype.
        if not isinstance(tensor, Tensor) or (wrong is other_dtype and name in NORM):
            continue
        if name == "x_BLD" and wrong is not strided:
            continue
        with pytest.raises(ValueError, match=WRONGS[wrong]) as error:
            OPERATIONS[form](**(args | {name: wrong(tensor)}))
        assert wrong is shorter or name in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x_BLD", torch.zeros(5, 32), "expected \\(B, L, D\\) and \\(S, 2, R, D\\)"),
        ("x_BLD", torch.zeros(5, 0, 32), "expected at least one token"),
        ("x_BLD", torch.zeros(5, 7, 32, dtype=torch.int64), "x_BLD is torch.int64"),
        ("slots_PE", torch.zeros(3, dtype=torch.int64), "expected \\(P, E\\)"),
        ("max_top_k", 7, "max_top_k 7 is not in 1..6"),
        ("max_top_k", 0, "max_top_k 0 is not in 1..6"),
        ("paths_B", torch.tensor([0, 1, 2, 3, 0]), "paths_B holds 3, there are 3"),
        ("slots_PE", torch.full((3, 6), 21), "slots_PE holds 21, there are 21"),
    ],
)
def test_a_wrong_value_is_refused_with_the_value(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expert_mixing(**(arguments(USUAL) | {name: value}))


@pytest.mark.parametrize("slot", [21, -1])
def test_a_given_slot_out_of_range_is_refused_on_a_cpu(slot: int) -> None:
    args = arguments(replace(USUAL, form="mix"))
    args["slots_BK"][2, 1] = slot
    with pytest.raises(ValueError, match=f"slots_BK holds {slot}, there are 21"):
        mix(**args)


def on_cuda(args: Arguments) -> Arguments:
    """Tensors of the same shapes on a device that need not be there: under FakeTensorMode."""
    return {
        name: torch.empty(value.shape, dtype=value.dtype, device="cuda")
        if isinstance(value, Tensor)
        else value
        for name, value in args.items()
    }


@pytest.mark.parametrize("form", FORMS)
def test_a_device_is_traced_without_one(form: Form) -> None:
    args = arguments(replace(USUAL, form=form, keep=form == "mix", dtype=torch.bfloat16))
    with FakeTensorMode():
        traced = answers(form, on_cuda(args))
    assert len(traced) == (2 if form == "norm" else 1)
    for answer in traced:
        assert answer.device.type == "cuda"
        assert (answer.shape, answer.dtype) == (args["x_BLD"].shape, torch.bfloat16)


def test_more_experts_than_the_kernel_has_room_for_are_refused_on_a_device() -> None:
    args = arguments(replace(USUAL, E=65))
    with FakeTensorMode():
        fake = on_cuda(args)
        with pytest.raises(ValueError, match="65 experts a path, the kernel has room for 64"):
            expert_mixing(**fake)


@pytest.mark.parametrize("form", FORMS)
def test_the_plain_definition_is_traced_in_one_piece(form: Form) -> None:
    args = arguments(replace(USUAL, form=form))
    traced = torch.compile(answers, backend="eager", fullgraph=True)(form, args)
    assert all(torch.equal(a, b) for a, b in zip(traced, answers(form, args), strict=True))


def test_neither_batch_nor_tokens_nor_pool_sizes_compile_the_kernel_again() -> None:
    assert isinstance(fused.kernel, JITFunction)
    p = build(USUAL)
    call = fused.prepare(
        p.x_BLD,
        torch.empty_like(p.x_BLD),
        weights_S2RD=p.weights_S2RD,
        biases_SF=p.biases_SF,
        slots=p.slots_BK,
        gates_BK=p.gates_BK,
        max_top_k=2,
    )
    integers = {n for n, v in call.arguments.items() if isinstance(v, int)}
    special = {q.name for q in fused.kernel.params if not q.do_not_specialize}
    assert integers == {"L", "P", "S"}
    assert not integers & special
    assert set(call.arguments) | set(call.constants) == set(fused.kernel.arg_names)
    assert not {"B", "L", "P", "S"} & set(call.constants)


@pytest.mark.parametrize("hidden", [8, 64, 128, 192, 256, 320, 512])
@pytest.mark.parametrize("keep", [False, True])
def test_every_size_in_half_precision_has_a_launch(hidden: int, keep: bool) -> None:
    for tokens in (1, 16, 50, 77, 197, 257, 577):
        for batch in (0, 1, 2, 4, 8, 16, 32, 64, 256, 5000):
            launch = find(batch, tokens, hidden=hidden, itemsize=2, keep=keep)
            assert launch.block_m <= max(16, 2 * tokens)


def test_a_larger_batch_never_gets_smaller_tiles() -> None:
    for hidden, itemsize in ((128, 2), (256, 2), (512, 2), (128, 4)):
        launches = [find(b, 197, hidden=hidden, itemsize=itemsize) for b in (1, 2, 4, 8, 32, 256)]
        assert [launch.block_m for launch in launches] == sorted(x.block_m for x in launches)


@pytest.mark.parametrize(("hidden", "itemsize"), [(513, 2), (129, 4), (8, 8)])
def test_more_hidden_units_than_there_are_registers_for_are_refused(
    hidden: int, itemsize: int
) -> None:
    with pytest.raises(ValueError, match=f"{hidden} hidden units .* of {itemsize} bytes, room for"):
        find(8, 197, hidden=hidden, itemsize=itemsize)


@pytest.mark.parametrize("width", [16, 48, 64, 80, 256, 512, 768, 1024, 1280])
def test_a_launch_fits_every_width_without_a_rest(width: int) -> None:
    for row in rows():
        launch = row.launch.fit(width)
        assert width % launch.block_k == 0
        assert width % (launch.split * launch.block_n) == 0
        assert min(launch.block_k, launch.block_n) >= 16


def test_the_widths_of_clip_get_the_launches_of_the_table_as_they_are() -> None:
    for row in rows():
        for width in (512, 768, 1024):
            assert row.launch.fit(width) == row.launch


@pytest.mark.parametrize("width", [0, 8, 100])
def test_a_width_that_no_tensor_core_takes_is_refused(width: int) -> None:
    launch = Launch(block_m=16, block_k=64, block_n=64, num_warps=4, num_stages=3, split=4)
    with pytest.raises(ValueError, match=f"width {width} is not a multiple of 16"):
        launch.fit(width)


def test_every_row_of_the_table_is_used() -> None:
    used = {
        id(find(batch, tokens, hidden=row.max_hidden, itemsize=row.itemsize, keep=keep))
        for row in rows()
        for batch in (1, 2, 4, 8, 16, 32, 64)
        for tokens in (1, 50, 77, 197)
        for keep in (False, True)
    }
    assert used == {id(row.launch) for row in rows()}
