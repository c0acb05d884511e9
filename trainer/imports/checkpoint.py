"""A checkpoint of MoE-Adapters4CL: the whole CLIP, all experts and one router for each task.

Only read here, by the names that its authors gave the tensors; `bundles.py` makes bundles of it.

Legend: E experts, R bottleneck, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from open_clip.transformer import QuickGELU
from torch import Tensor

from medley.backbone import Backbone
from medley.bundle import Tower
from medley.errors import BackboneError, BundleError
from medley.experts import BlockExperts, TaskExperts
from medley.state_dict import read_state_dict

__all__ = ["SCALE", "TOP_K", "Checkpoint", "read_checkpoint"]

TOP_K = 2
SCALE = 0.1  # a constant of the authors' adapter, not a tensor

# The authors' CLIP has OpenAI's weights, which were stored in float16.
RTOL, ATOL = 1e-3, 1e-6

_RESBLOCKS: dict[Tower, str] = {
    "vision": "visual.transformer.resblocks",
    "text": "transformer.resblocks",
}
# What the authors have put into a block; ln_3, mean and std are there and never used.
_NOT_FROZEN = (".adaptmlp", ".router", ".w_noise", ".ln_3.", ".mean", ".std")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What the authors' training has written after some task; later tasks are in it untrained."""

    name: str
    digest: str  # of the file, "sha256:..."
    tensors: Mapping[str, Tensor]

    def learnt(self) -> int:
        """How many tasks, from the first, have a router that was ever trained.

        Raises:
            BundleError: it is no checkpoint of this kind, or a task is missing in between.
        """
        trained: dict[int, bool] = {}
        for name, tensor in self.tensors.items():
            place, _, number = name.rpartition(".")
            if place.endswith(".router_list") and number.isdecimal():
                trained[int(number)] = trained.get(int(number), False) or bool(tensor.any())
        if not trained:
            raise self._refused(self._other_kind())
        tasks = sorted(task for task, done in trained.items() if done)
        if tasks != list(range(len(tasks))) or not tasks:
            raise self._refused(f"the routers of tasks {tasks} are trained, and no others")
        return len(tasks)

    def frozen(self) -> dict[str, Tensor]:
        """The whole CLIP under everything that was learnt, in float32, by open_clip's names."""
        return {
            name: tensor.float().contiguous()
            for name, tensor in self.tensors.items()
            if not any(mark in f".{name}" for mark in _NOT_FROZEN)
        }

    def check_backbone(self, backbone: Backbone) -> None:
        """Refuse a backbone that is not the frozen part of this checkpoint, up to rounding.

        Raises:
            BackboneError: a tensor is missing or differs, or the activation is another.
        """
        own = backbone.model.state_dict()
        differences = [d for name, tensor in own.items() if (d := self._difference(name, tensor))]
        if differences:
            more = f", and {len(differences) - 1} more differ" if len(differences) > 1 else ""
            raise BackboneError(
                f"{self.name} was not learnt on {backbone.name}: {differences[0]}{more}",
                code="wrong_backbone",
            )
        if not any(isinstance(module, QuickGELU) for module in backbone.model.modules()):
            raise BackboneError(
                f"{self.name} was learnt with QuickGELU, which {backbone.name} does not have; "
                "take the architecture with -quickgelu behind its name",
                code="wrong_backbone",
            )

    def experts(self, backbone: Backbone) -> tuple[TaskExperts, ...]:
        """All experts once, with the router of each learnt task; they share their tensors.

        Raises:
            BundleError: a tensor is missing, has another shape or is not finite.
        """
        problems: list[str] = []
        tasks = range(self.learnt())
        text_blocks, text_width = (
            (len(backbone.text.blocks), backbone.text.width) if backbone.text else (0, 0)
        )
        vision = self._tower(
            "vision", len(backbone.image.blocks), backbone.image.width, tasks, problems
        )
        text = self._tower("text", text_blocks, text_width, tasks, problems)
        if problems:
            more = f", and {len(problems) - 1} more problems" if len(problems) > 1 else ""
            raise self._refused(problems[0] + more)
        return tuple(
            TaskExperts(vision=vision[t], text=text[t], top_k=TOP_K, scale=SCALE) for t in tasks
        )

    def _tower(
        self, tower: Tower, blocks: int, width: int, tasks: range, problems: list[str]
    ) -> list[dict[int, BlockExperts]]:
        """One tower's blocks for each task; the text tower may have been trained without any."""
        prefix = _RESBLOCKS[tower]
        if tower == "text" and not any(
            name.startswith(f"{prefix}.0.adaptmlp_list.") for name in self.tensors
        ):
            return [{} for _ in tasks]
        by_block = {
            block: self._block(f"{prefix}.{block}", width, tasks, problems)
            for block in range(blocks)
        }
        return [{block: of_task[t] for block, of_task in by_block.items()} for t in tasks]

    def _block(self, prefix: str, D: int, tasks: range, problems: list[str]) -> list[BlockExperts]:
        def take(name: str, *shape: int) -> Tensor:
            tensor = self.tensors.get(f"{prefix}.{name}")
            if tensor is None:
                problems.append(f"{prefix}.{name} is missing")
            elif tensor.shape != shape:
                found = tuple(tensor.shape)
                problems.append(f"{prefix}.{name} has shape {found}, expected {shape}")
            elif not tensor.isfinite().all():
                problems.append(f"{prefix}.{name} has values that are not finite")
            else:
                return tensor
            return torch.zeros(shape)

        def stacked(name: str, *shape: int) -> Tensor:
            return torch.stack([take(f"adaptmlp_list.{e}.{name}", *shape) for e in range(E)])

        E, R = self._sizes(prefix)
        shared = BlockExperts(
            stacked("down_proj.weight", R, D),
            stacked("down_proj.bias", R),
            stacked("up_proj.weight", D, R).mT.contiguous(),
            stacked("up_proj.bias", D),
            router_DE=torch.zeros(D, E),
        )
        return [replace(shared, router_DE=take(f"router_list.{t}", D, E)) for t in tasks]

    def _sizes(self, prefix: str) -> tuple[int, int]:
        """E as the names count them, R of the first; what is wrong shows in the others."""
        list_of = f"{prefix}.adaptmlp_list."
        experts = {
            int(number)
            for name in self.tensors
            if name.startswith(list_of)
            and (number := name[len(list_of) :].partition(".")[0])
            and number.isdecimal()
        }
        first = self.tensors.get(f"{list_of}0.down_proj.bias")
        return len(experts) or 1, 1 if first is None else first.numel()

    def _difference(self, name: str, own: Tensor) -> str | None:
        theirs = self.tensors.get(name)
        if theirs is None:
            return f"{name} is not in the checkpoint"
        if theirs.shape != own.shape:
            return f"{name} has shape {tuple(theirs.shape)}, the backbone {tuple(own.shape)}"
        ours, theirs = own.cpu().float(), theirs.float()
        if torch.allclose(ours, theirs, rtol=RTOL, atol=ATOL):
            return None
        return f"{name} differs by {float((ours - theirs).abs().max()):.3g}"

    def _other_kind(self) -> str:
        if any(name.endswith(".router1") for name in self.tensors):
            return (
                "it is of class-incremental learning: one router for all tasks, no experts of any"
            )
        return "it has no router_list, so it is not of MoE-Adapters4CL"

    def _refused(self, why: str) -> BundleError:
        return BundleError([f"{self.name}: {why}"], code="checkpoint")


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's tensors; nothing in it is executed.

    Raises:
        BackboneError: with code `weights`: see `read_state_dict`.
    """
    tensors = read_state_dict(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Checkpoint(path.name, f"sha256:{digest}", tensors)
