"""ConDU's arithmetic: the deltas of several tasks to one unified delta and back.

A delta is what fine-tuning added to the pre-trained weights, by tensor name. Of every element the
tasks elect a sign, the unified delta keeps the largest value among those that agree with it, and a
task keeps a trigger: which elements agree (a mask), and how much smaller or larger it was (one
rescaler). Only tensors; files are `medley/unified.py` and `medley/bundle.py`.

Source: ConDU, arXiv:2503.10705, the unify and decouple steps; elect, mask and rescale as in
EMR-Merging, arXiv:2405.17461.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Deltas",
    "Fusion",
    "Rescale",
    "Trigger",
    "decouple",
    "pack_masks",
    "packed_bytes",
    "unify",
    "unpack_masks",
]

Deltas = Mapping[str, Tensor]
# What the rescaler keeps of a delta: its L1 norm, or as the paper's code has it the sum of its
# tensors' mean magnitudes, in which a bias of 256 numbers weighs as much as a matrix of 262,144.
Rescale = Literal["l1", "paper"]


@dataclass(frozen=True)
class Trigger:
    """What a task needs beside the unified delta: bool masks in its shapes, and a factor."""

    masks: Mapping[str, Tensor]
    rescaler: float


@dataclass(frozen=True)
class Fusion:
    """A unified delta, float32, and a trigger for each task, in the order of the deltas."""

    unified: dict[str, Tensor]
    triggers: list[Trigger]


def unify(deltas: Sequence[Deltas], *, rescale: Rescale = "l1") -> Fusion:
    """Fuse the deltas of all tasks; their order does not matter.

    By element, with s the sign of the sum (-1 where it is zero): mask_i = delta_i * s > 0 and
    unified = s * max_i mask_i |delta_i|. One task alone is kept exactly, with rescaler 1.

    Args:
        deltas: of at least one task, float32, all with the same names and shapes.
        rescale: what the rescalers keep, see `Rescale`.

    Raises:
        ValueError: no task, names or shapes that differ, or a value that is not finite.
    """
    _check(deltas)
    unified: dict[str, Tensor] = {}
    masks: list[dict[str, Tensor]] = [{} for _ in deltas]
    for name in sorted(deltas[0]):
        unified[name], of_tasks = _elect([delta[name] for delta in deltas])
        for mine, mask in zip(masks, of_tasks, strict=True):
            mine[name] = mask
    triggers = [
        Trigger(mine, _rescaler(delta, mine, unified, rescale))
        for delta, mine in zip(deltas, masks, strict=True)
    ]
    return Fusion(unified, triggers)


def decouple(unified: Deltas, trigger: Trigger) -> dict[str, Tensor]:
    """Give a task its delta back, as far as the unified one has kept it: rescaler * mask * unified.

    Raises:
        ValueError: the masks are not of these names and shapes.
    """
    _check([unified, trigger.masks])
    return {
        name: torch.where(trigger.masks[name], trigger.rescaler * tensor, 0.0)
        for name, tensor in unified.items()
    }


def pack_masks(masks: Mapping[str, Tensor]) -> Tensor:
    """Eight elements to a byte, the first in the lowest bit; tensors in the order of their names.

    Returns:
        uint8, (`packed_bytes` of all elements,); bits beyond the last element are zero.
    """
    flat = [masks[name].flatten() for name in sorted(masks)]
    bits = torch.cat(flat).cpu().numpy()
    return torch.from_numpy(np.packbits(bits, bitorder="little"))


def unpack_masks(packed: Tensor, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Undo `pack_masks`.

    Raises:
        ValueError: there are more or fewer bytes than these shapes need.
    """
    sizes = [int(np.prod(shapes[name])) for name in sorted(shapes)]
    if len(packed) != packed_bytes(sum(sizes)):
        raise ValueError(f"{len(packed)} bytes of mask for {sum(sizes)} elements")
    bits = np.unpackbits(packed.numpy(), count=sum(sizes), bitorder="little")
    flat = torch.from_numpy(bits.view(np.bool_)).split(sizes)
    return {name: part.view(*shapes[name]) for name, part in zip(sorted(shapes), flat, strict=True)}


def packed_bytes(elements: int) -> int:
    """How many bytes the masks of so many elements take."""
    return -(-elements // 8)


def _elect(of_tasks: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One tensor's unified values, and each task's mask."""
    # Sorted, so that the rounding of a sum knows no order of tasks.
    total = torch.stack([delta.double() for delta in of_tasks]).sort(0).values.sum(0)
    sign = torch.where(total > 0, 1.0, -1.0)
    masks = [delta * sign > 0 for delta in of_tasks]
    agreed = [torch.where(m, d.abs(), 0.0) for m, d in zip(masks, of_tasks, strict=True)]
    return sign * torch.stack(agreed).amax(0), masks


def _rescaler(
    delta: Deltas, masks: Mapping[str, Tensor], unified: Deltas, rescale: Rescale
) -> float:
    had = _magnitude(delta, rescale)
    has = _magnitude({n: torch.where(masks[n], unified[n], 0.0) for n in unified}, rescale)
    return had / has if has else 1.0  # nothing is left of it: no factor brings anything back


def _magnitude(tensors: Deltas, rescale: Rescale) -> float:
    by_name = [tensors[name].double().abs() for name in sorted(tensors)]
    return sum(float(t.mean() if rescale == "paper" else t.sum()) for t in by_name)


def _check(tensors: Sequence[Mapping[str, Tensor]]) -> None:
    if not tensors or not tensors[0]:
        raise ValueError("there is no delta to fuse")
    first = {name: tensor.shape for name, tensor in tensors[0].items()}
    for one in tensors:
        if {name: tensor.shape for name, tensor in one.items()} != first:
            raise ValueError("the deltas differ in their tensors' names or shapes")
        for name, tensor in one.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name} has values that are not finite")
