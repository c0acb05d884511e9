"""`medley fuse`: several tasks' deltas to one unified model. Heavy imports wait until it runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from trainer.options import BackboneName, Device, Weights
from trainer.progress import bars

if TYPE_CHECKING:
    from medley.unified import Unified
    from trainer.fuse import Fused, Member

__all__ = ["fuse_command"]

_UNIFIED = re.compile(r"unified-[0-9a-f]{12}\.safetensors")
out, err = Console(), Console(stderr=True)


class RescaleName(StrEnum):
    """What a rescaler keeps of a delta: its L1 norm, or what the paper's code keeps."""

    L1 = "l1"
    PAPER = "paper"


def fuse_command(
    bundles: Annotated[
        list[Path],
        typer.Argument(help="Bundles of lora or finetune, or folders of them; unified beside."),
    ],
    folder: Annotated[Path, typer.Option("--out", help="New folder of the fusion.")],
    rescale: Annotated[
        RescaleName, typer.Option(help="What rescalers keep; paper: its code's arithmetic.")
    ] = RescaleName.L1,
    backbone: BackboneName = "medley-mini",
    weights: Weights = None,
    device: Device = "cpu",
) -> None:
    """Fuse tasks into one unified model and write a new version of every task's bundle."""
    from medley.backbone import load_backbone
    from trainer.fuse import fuse

    members = _members(bundles)
    base = load_backbone(backbone, weights=weights, device=device)
    with bars(err) as show:
        done = show.counting("tasks", len(members))
        fused = fuse(members, base, folder, rescale=rescale.value, on_task=done)
    _print_fused(fused)


def _members(paths: Sequence[Path]) -> list[Member]:
    """Read bundles, each unified model once; unified models among the files are passed over."""
    from medley.bundle import read_bundle
    from medley.unified import unified_of
    from trainer.fuse import Member

    files = [file for path in paths for file in (_inside(path) if path.is_dir() else [path])]
    read: dict[tuple[Path, str], Unified | None] = {}
    members = []
    for file in files:
        if _UNIFIED.fullmatch(file.name):
            continue
        bundle = read_bundle(file)
        fusion = bundle.manifest.fusion
        place = file.parent, fusion.unified if fusion else ""
        if place not in read:
            read[place] = unified_of(bundle.manifest, file.parent)
        members.append(Member(bundle, read[place]))
    return members


def _inside(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _print_fused(fused: Fused) -> None:
    report = fused.report
    table = Table("task", "version", "rescaler", "elements kept", "relative error", "MB")
    for task in report.tasks:
        table.add_row(
            task.task,
            task.version,
            f"{task.rescaler:.4f}",
            f"{task.kept:.1%}",
            f"{task.relative_error:.4f}",
            f"{task.size_bytes / 1e6:.2f}",
        )
    out.print(table)
    out.print(f"{fused.unified_path} ({report.size_bytes / 1e6:.2f} MB)", soft_wrap=True)
