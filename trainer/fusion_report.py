"""What a fusion kept of each task, measured on the deltas themselves, and how it is written down.

It knows deltas and triggers and no images: how well the fused tasks answer is for `medley
evaluate`.

Legend: T tasks, N elements of a tensor.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from medley.bundle import Bundle
from medley.fusion import Deltas, Fusion, Rescale, decouple
from medley.unified import Unified, unified_name
from trainer.checkpoint import write_whole
from trainer.plots import agreement_png

__all__ = ["FusedTask", "FusionReport", "fusion_report", "write_report"]

CHUNK = 2**22  # elements of a tensor whose signs are compared at once


@dataclass(frozen=True, kw_only=True)
class FusedTask:
    """What became of one task.

    Attributes:
        task, version, digest: of its new bundle.
        was: the version that was fused, with its digest.
        rescaler: of its trigger.
        kept: elements of its mask, as a share of those in which its delta was not zero.
        relative_error: length of (decoupled - given delta) as a share of the given one's.
        size_bytes: of its bundle.
    """

    task: str
    version: str
    digest: str
    was: str
    rescaler: float
    kept: float
    relative_error: float
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class FusionReport:
    """A fusion in numbers.

    Attributes:
        agreement_TT: for two tasks, how often their given deltas have the same sign, of the
            elements that both have changed.
    """

    method: str
    rescale: Rescale
    unified: str
    elements: int
    size_bytes: int
    tasks: tuple[FusedTask, ...]
    agreement_TT: tuple[tuple[float, ...], ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)


def fusion_report(
    unified: Unified,
    bundles: Sequence[Bundle],
    given: Sequence[Deltas],
    fusion: Fusion,
    *,
    rescale: Rescale,
    sizes: Sequence[int],
) -> FusionReport:
    """Measure a fusion.

    Args:
        unified: what was written.
        bundles: of all tasks.
        given: their deltas before, in the same order.
        fusion: of these.
        rescale: how.
        sizes: bytes of the unified model and then of each bundle.
    """
    tasks = []
    for bundle, delta, trigger, size, was in zip(
        bundles, given, fusion.triggers, sizes[1:], unified.manifest.tasks, strict=True
    ):
        changed = sum(int(tensor.count_nonzero()) for tensor in delta.values())
        kept = sum(int(mask.sum()) for mask in trigger.masks.values())
        tasks.append(
            FusedTask(
                task=bundle.manifest.task,
                version=bundle.manifest.version,
                digest=bundle.digest,
                was=was,
                rescaler=trigger.rescaler,
                kept=kept / max(1, changed),
                relative_error=_relative_error(decouple(fusion.unified, trigger), delta),
                size_bytes=size,
            )
        )
    return FusionReport(
        method=unified.manifest.method,
        rescale=rescale,
        unified=unified.digest,
        elements=unified.elements,
        size_bytes=sizes[0],
        tasks=tuple(tasks),
        agreement_TT=_agreement(given),
    )


def write_report(report: FusionReport, folder: Path) -> None:
    """Write report.json, report.md and signs.png.

    Raises:
        DataError: they cannot be written.
    """
    write_whole(folder / "report.json", json.dumps(report.as_dict(), indent=1).encode())
    write_whole(folder / "report.md", _markdown(report).encode())
    names = [task.task for task in report.tasks]
    agreement_TT = torch.tensor(report.agreement_TT, dtype=torch.float64).numpy()
    write_whole(folder / "signs.png", agreement_png(agreement_TT, names))


def _relative_error(ours: Deltas, theirs: Deltas) -> float:
    # In the order of names: that of a file read back is drawn by lot, and sums round.
    apart = sum(float((ours[n] - theirs[n]).double().square().sum()) for n in sorted(theirs))
    length = sum(float(theirs[n].double().square().sum()) for n in sorted(theirs))
    return (apart / length) ** 0.5 if length else 0.0


def _agreement(given: Sequence[Deltas]) -> tuple[tuple[float, ...], ...]:
    """Signs are +1 and -1, so products of them count those that agree less those that do not."""
    T = len(given)
    difference_TT, both_TT = (torch.zeros(T, T, dtype=torch.float64) for _ in range(2))
    for name in given[0]:
        flat = [delta[name].flatten() for delta in given]
        for parts in zip(*(one.split(CHUNK) for one in flat), strict=True):
            sign_TN = torch.stack(parts).sign()
            difference_TT += sign_TN @ sign_TN.T
            both_TT += sign_TN.abs() @ sign_TN.abs().T
    share_TT = (both_TT + difference_TT) / (2 * both_TT.clamp(min=1))
    return tuple(tuple(row) for row in share_TT.tolist())


def _markdown(report: FusionReport) -> str:
    rows = "\n".join(
        f"| {t.task} | {t.was} | {t.version} | {t.rescaler:.4f} | {t.kept:.1%} "
        f"| {t.relative_error:.4f} | {t.size_bytes / 1e6:.2f} |"
        for t in report.tasks
    )
    return f"""# {len(report.tasks)} tasks fused

Method {report.method}, rescalers keep {_KEPT[report.rescale]}. Unified model
`{unified_name(report.unified)}`, {report.size_bytes / 1e6:.2f} MB, {report.elements:,} elements.

| task | was | is | rescaler | elements kept | relative error | MB |
|---|---|---|---|---|---|---|
{rows}

Elements kept: those that agree with the elected sign, of those that the task has changed. Relative
error: of the delta that the task gets back, against the one that was given.

![how often two tasks have changed an element in the same direction](signs.png)
"""


_KEPT: dict[Rescale, str] = {
    "l1": "the L1 norm of each delta",
    "paper": "the sum of each delta's mean magnitudes by tensor, as the paper's code does",
}
