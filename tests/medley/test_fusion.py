"""medley/fusion.py: the paper's lemmas as laws, and the numbers of its reference implementation."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from medley.fusion import (
    Deltas,
    Fusion,
    Trigger,
    decouple,
    pack_masks,
    packed_bytes,
    unify,
    unpack_masks,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "condu_small.safetensors"
SHAPES = {"b": (2, 3), "a": (7,), "c": (1, 1)}
# With zeros and exact opposites among them, on which sign elections depend.
VALUES = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 3e-5, -7.25])


@st.composite
def some_deltas(draw: st.DrawFn, *, least: int = 1, most: int = 5) -> list[Deltas]:
    def one(shape: tuple[int, ...]) -> Tensor:
        size = int(torch.Size(shape).numel())
        return torch.tensor(draw(st.lists(VALUES, min_size=size, max_size=size))).view(shape)

    count = draw(st.integers(least, most))
    return [{name: one(shape) for name, shape in SHAPES.items()} for _ in range(count)]


def l1(tensors: Deltas) -> float:
    return float(sum(t.double().abs().sum() for t in tensors.values()))


@given(some_deltas())
def test_what_is_decoupled_has_the_elected_sign_or_is_zero(deltas: list[Deltas]) -> None:
    fusion = unify(deltas)
    for trigger in fusion.triggers:
        for name, part in decouple(fusion.unified, trigger).items():
            total = sum(delta[name].double() for delta in deltas)
            assert isinstance(total, Tensor)
            elected = torch.where(total > 0, 1.0, -1.0)
            assert ((part == 0) | (part.sign() == elected)).all()


@given(some_deltas())
def test_the_unified_delta_is_the_largest_of_those_that_agree(deltas: list[Deltas]) -> None:
    fusion = unify(deltas)
    for name, unified in fusion.unified.items():
        of_tasks = torch.stack([delta[name] for delta in deltas])
        agreeing = torch.stack([trigger.masks[name] for trigger in fusion.triggers])
        assert torch.equal(unified.abs(), (of_tasks.abs() * agreeing).amax(0))


@given(some_deltas())
def test_the_rescaler_keeps_the_l1_norm_of_all_that_has_anything_left(
    deltas: list[Deltas],
) -> None:
    fusion = unify(deltas, rescale="l1")
    for delta, trigger in zip(deltas, fusion.triggers, strict=True):
        if any(mask.any() for mask in trigger.masks.values()):
            assert l1(decouple(fusion.unified, trigger)) == pytest.approx(l1(delta), rel=1e-5)


@given(some_deltas())
def test_the_papers_rescaler_keeps_the_sum_of_the_tensors_means(deltas: list[Deltas]) -> None:
    def means(tensors: Deltas) -> float:
        return float(sum(t.double().abs().mean() for t in tensors.values()))

    fusion = unify(deltas, rescale="paper")
    for delta, trigger in zip(deltas, fusion.triggers, strict=True):
        if any(mask.any() for mask in trigger.masks.values()):
            kept = decouple(fusion.unified, trigger)
            assert means(kept) == pytest.approx(means(delta), rel=1e-5)


@given(some_deltas(most=1))
@pytest.mark.parametrize("rescale", ["l1", "paper"])
def test_one_task_alone_is_kept_exactly(rescale: str, deltas: list[Deltas]) -> None:
    fusion = unify(deltas, rescale=rescale)  # type: ignore[arg-type]
    assert fusion.triggers[0].rescaler == 1.0
    kept = decouple(fusion.unified, fusion.triggers[0])
    assert all(torch.equal(kept[name], deltas[0][name]) for name in SHAPES)


@given(some_deltas(least=2, most=4))
def test_the_order_of_the_tasks_does_not_matter_by_a_bit(deltas: list[Deltas]) -> None:
    once = unify(deltas)
    for order in itertools.permutations(range(len(deltas))):
        again = unify([deltas[i] for i in order])
        assert all(torch.equal(once.unified[n], again.unified[n]) for n in SHAPES)
        for place, i in enumerate(order):
            assert again.triggers[place].rescaler == once.triggers[i].rescaler
            assert torch.equal(
                pack_masks(again.triggers[place].masks), pack_masks(once.triggers[i].masks)
            )


def test_no_order_rounds_a_sum_to_another_sign() -> None:
    values = (1e-30, 1.0, -1.0)  # from the left 1e-30 is lost or not
    signs = {
        tuple(unify([{"a": torch.tensor([v])} for v in order]).unified["a"].sign().tolist())
        for order in itertools.permutations(values)
    }
    assert len(signs) == 1


@given(some_deltas(least=2))
def test_a_mask_only_shrinks_when_what_was_decoupled_is_fused_again(deltas: list[Deltas]) -> None:
    first = unify(deltas[:-1])
    old = [decouple(first.unified, trigger) for trigger in first.triggers]
    second = unify([*old, deltas[-1]])
    for before, after in zip(first.triggers, second.triggers, strict=False):
        for name in SHAPES:
            assert not (after.masks[name] & ~before.masks[name]).any()


@given(some_deltas(most=3))
def test_masks_come_back_from_their_bits(deltas: list[Deltas]) -> None:
    masks = {name: tensor > 0 for name, tensor in deltas[0].items()}
    packed = pack_masks(masks)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_bytes(14) == 2
    back = unpack_masks(packed, SHAPES)
    assert all(torch.equal(back[name], masks[name]) for name in SHAPES)
    with pytest.raises(ValueError, match="2 bytes of mask for 22 elements"):
        unpack_masks(packed, SHAPES | {"d": (8,)})


def test_sessions_of_the_reference_implementation_are_reproduced() -> None:
    golden = load_file(GOLDEN)
    fusion: Fusion | None = None
    for session in range(4):

        def part(what: str, session: int = session) -> dict[str, Tensor]:
            start = f"session{session}.{what}."
            return {n.removeprefix(start): t for n, t in golden.items() if n.startswith(start)}

        triggers = fusion.triggers if fusion else []
        old = [decouple(fusion.unified, t) for t in triggers] if fusion else []
        fusion = unify([*old, part("new_delta")], rescale="paper")
        close(fusion.unified, part("unified"))
        for task, trigger in enumerate(fusion.triggers):
            theirs = float(golden[f"session{session}.rescalers"][task])
            assert trigger.rescaler == pytest.approx(theirs, abs=1e-6)
            for name, mask in part(f"mask{task}").items():
                assert torch.equal(trigger.masks[name], mask.bool())
            close(decouple(fusion.unified, trigger), part(f"decoupled{task}"))


def test_what_cannot_be_fused_is_refused() -> None:
    good = {"a": torch.ones(2)}
    for bad, said in (
        ([], "no delta"),
        ([{}], "no delta"),
        ([good, {"a": torch.ones(3)}], "names or shapes"),
        ([good, {"b": torch.ones(2)}], "names or shapes"),
        ([good, {"a": torch.tensor([1.0, torch.nan])}], "a has values that are not finite"),
    ):
        with pytest.raises(ValueError, match=said):
            unify(bad)
    with pytest.raises(ValueError, match="names or shapes"):
        decouple(good, Trigger({"a": torch.ones(3, dtype=torch.bool)}, 1.0))


def test_a_task_of_which_nothing_is_left_is_zero_and_not_nan() -> None:
    weak, strong = {"a": torch.tensor([-1.0])}, {"a": torch.tensor([2.0])}
    fusion = unify([weak, strong])
    assert fusion.triggers[0].rescaler == 1.0
    assert decouple(fusion.unified, fusion.triggers[0])["a"].item() == 0.0


def close(ours: Deltas, theirs: Deltas) -> None:
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=0)
