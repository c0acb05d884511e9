"""The mixing op against a loop over experts in float64, and the laws that it obeys."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.expert_mixing import choose, expert_mixing, route


def problem(
    *,
    rows: int,
    tokens: int,
    width: int,
    rank: int,
    experts: int,
    paths: int,
    top_k: int,
    seed: int,
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    slots = paths * experts + 3
    order = torch.randperm(slots, generator=g)[: paths * experts].view(paths, experts)
    return {
        "x_BLD": torch.randn(rows, tokens, width, generator=g),
        "paths_B": torch.randint(-1, paths, (rows,), generator=g),
        "weights_S2RD": torch.randn(slots, 2, rank, width, generator=g) / width**0.5,
        "biases_SF": torch.randn(slots, rank + width, generator=g),
        "routers_PDE": torch.randn(paths, width, experts, generator=g),
        "slots_PE": order,
        "top_k_P": torch.full((paths,), top_k),
        "scale_P": torch.rand(paths, generator=g) + 0.05,
    }


def loop_over_experts(p: dict[str, Tensor]) -> Tensor:
    """Do what the paper says, one row and one expert at a time, in float64."""
    y = torch.zeros_like(p["x_BLD"], dtype=torch.float64)
    rank = p["weights_S2RD"].shape[2]
    for b, path in enumerate(p["paths_B"].tolist()):
        present = (p["slots_PE"][path] >= 0).nonzero()[:, 0]
        if path < 0 or len(present) == 0:
            continue
        x = p["x_BLD"][b].double()
        logits = x[0] @ p["routers_PDE"][path].double()[:, present]
        best = logits.topk(min(int(p["top_k_P"][path]), len(present)))
        for gate, index in zip(best.values.softmax(0), best.indices, strict=True):
            slot = p["slots_PE"][path, present[index]]
            down, up = p["weights_S2RD"][slot].double()
            bias = p["biases_SF"][slot].double()
            hidden = (x @ down.T + bias[:rank]).relu()
            y[b] += gate * p["scale_P"][path].double() * (hidden @ up + bias[rank:])
    return y


SHAPES = [
    {"rows": 4, "tokens": 17, "width": 64, "rank": 8, "experts": 6, "paths": 3, "top_k": 2},
    {"rows": 3, "tokens": 7, "width": 41, "rank": 5, "experts": 5, "paths": 2, "top_k": 3},
    {"rows": 2, "tokens": 1, "width": 16, "rank": 1, "experts": 1, "paths": 1, "top_k": 1},
    {"rows": 8, "tokens": 5, "width": 32, "rank": 64, "experts": 9, "paths": 4, "top_k": 4},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_loop_over_experts(shape: dict[str, int]) -> None:
    p = problem(**shape, seed=1)
    y = expert_mixing(**p, max_top_k=shape["top_k"])
    # Two products of up to 64 terms each and a sum of four: a few dozen roundings of size-one
    # numbers.
    torch.testing.assert_close(y.double(), loop_over_experts(p), rtol=1e-5, atol=2e-5)


def test_an_empty_batch_gives_an_empty_answer() -> None:
    p = problem(rows=0, tokens=5, width=16, rank=4, experts=3, paths=2, top_k=2, seed=0)
    assert expert_mixing(**p, max_top_k=2).shape == (0, 5, 16)


def test_rows_without_a_path_are_exactly_zero_even_when_every_unused_slot_is_nan() -> None:
    p = problem(rows=6, tokens=5, width=16, rank=4, experts=3, paths=2, top_k=2, seed=3)
    p["paths_B"] = torch.tensor([-1, 0, -1, 1, 0, -1])
    unused = torch.ones(len(p["weights_S2RD"]), dtype=torch.bool)
    unused[p["slots_PE"].flatten()] = False
    p["weights_S2RD"][unused] = float("nan")
    p["biases_SF"][unused] = float("nan")
    y = expert_mixing(**p, max_top_k=2)
    assert torch.equal(y[p["paths_B"] < 0], torch.zeros(3, 5, 16))
    assert y.isfinite().all()


def test_a_path_with_fewer_experts_than_top_k_uses_those_it_has() -> None:
    p = problem(rows=5, tokens=4, width=16, rank=4, experts=4, paths=2, top_k=3, seed=4)
    p["paths_B"] = torch.tensor([0, 1, 0, 1, 1])
    p["slots_PE"][1, 1:] = -1
    y = expert_mixing(**p, max_top_k=3)
    torch.testing.assert_close(y.double(), loop_over_experts(p), rtol=1e-5, atol=2e-5)


def test_a_path_without_experts_in_this_block_adds_nothing() -> None:
    p = problem(rows=4, tokens=4, width=16, rank=4, experts=2, paths=2, top_k=1, seed=5)
    p["paths_B"] = torch.tensor([1, 1, 0, 1])
    p["slots_PE"][1] = -1
    y = expert_mixing(**p, max_top_k=2)
    assert torch.equal(y[[0, 1, 3]], torch.zeros(3, 4, 16))
    assert y[2].abs().max() > 0


def test_nan_in_one_image_stays_in_its_row() -> None:
    p = problem(rows=3, tokens=4, width=16, rank=4, experts=3, paths=2, top_k=2, seed=6)
    p["paths_B"] = torch.tensor([0, 1, 0])
    clean = expert_mixing(**p, max_top_k=2)
    p["x_BLD"][1] = float("nan")
    assert torch.equal(expert_mixing(**p, max_top_k=2)[[0, 2]], clean[[0, 2]])


@given(seed=st.integers(0, 2**31), top_k=st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_gates_are_a_distribution_over_the_best_experts(seed: int, top_k: int) -> None:
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))
    expert, gates = route(logits, torch.full((6,), top_k), max_top_k=4)
    torch.testing.assert_close(gates.sum(-1), torch.ones(6))
    assert (gates[:, top_k:] == 0).all()
    worst_chosen = logits.gather(1, expert[:, :top_k]).min(-1).values
    assert ((logits > worst_chosen[:, None]).sum(-1) < top_k).all()


@given(seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_a_row_does_not_depend_on_the_other_rows_of_a_batch(seed: int) -> None:
    shape = {"rows": 8, "tokens": 5, "width": 32, "rank": 8, "experts": 4, "paths": 3, "top_k": 2}
    p, other = problem(**shape, seed=seed), problem(**shape, seed=seed + 1)
    before = expert_mixing(**p, max_top_k=2)
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(8, generator=g)
    keep = torch.rand(8, generator=g) < 0.5
    p["x_BLD"] = torch.where(keep[:, None, None], p["x_BLD"], other["x_BLD"])[order]
    p["paths_B"] = torch.where(keep, p["paths_B"], other["paths_B"])[order]
    after = torch.empty_like(before)
    after[order] = expert_mixing(**p, max_top_k=2)
    assert torch.equal(after[keep], before[keep])


def test_gradients_reach_experts_router_and_input() -> None:
    p = problem(rows=3, tokens=4, width=6, rank=3, experts=3, paths=2, top_k=2, seed=8)
    p = {k: v.double() if v.is_floating_point() else v for k, v in p.items()}
    p["paths_B"] = torch.tensor([0, -1, 1])
    names = ("x_BLD", "weights_S2RD", "biases_SF", "routers_PDE")
    for name in names:
        p[name].requires_grad_()

    def op(*values: Tensor) -> Tensor:
        return expert_mixing(**(p | dict(zip(names, values, strict=True))), max_top_k=2)

    assert torch.autograd.gradcheck(op, [p[n] for n in names])


def test_a_task_id_beyond_the_table_is_refused() -> None:
    p = problem(rows=2, tokens=4, width=16, rank=4, experts=3, paths=2, top_k=2, seed=9)
    p["paths_B"] = torch.tensor([0, 2])
    with pytest.raises(ValueError, match="paths_B holds 2, there are 2"):
        expert_mixing(**p, max_top_k=2)


def test_choose_marks_rows_that_have_no_expert() -> None:
    p = problem(rows=3, tokens=4, width=16, rank=4, experts=3, paths=2, top_k=2, seed=10)
    p["paths_B"] = torch.tensor([0, -1, 1])
    args = (p["x_BLD"], p["paths_B"], p["routers_PDE"], p["slots_PE"], p["top_k_P"])
    assert choose(*args, max_top_k=2)[2].tolist() == [True, False, True]
