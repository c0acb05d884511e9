"""One training run in its folder: from a data set to a bundle, with report and plots.

It wires the parts together and knows no mathematics; `trainer/commands.py` gives it what people
type.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from medley.backbone import Backbone
from medley.bundle import Bundle
from medley.errors import DataError
from medley.manifest import Manifest
from medley.unified import Unified, unified_name
from trainer.checkpoint import make_folder, write_whole
from trainer.datasets import ImageSet, few_shot, split
from trainer.distributed import ALONE, Team
from trainer.export import Label, export, require_exportable
from trainer.freezing import Usage, frozen_experts, keep, measure_usage
from trainer.fuse import fuse_alone
from trainer.methods import FrozenExperts, MoeAdapter, OwnTowers, ParameterCounts
from trainer.plots import curves_png, usage_png
from trainer.product import Product, of_experts, of_trigger
from trainer.settings import TrainSettings
from trainer.training import History, Trained, Watcher, train

__all__ = ["Outcome", "learn", "training_parts", "unified_row"]


@dataclass(frozen=True)
class Outcome:
    """What a run left behind."""

    bundle: Bundle
    path: Path
    report: dict[str, Any]
    counts: ParameterCounts
    unified: Unified | None = None  # of `lora` and `finetune`; its file lies beside the bundle

    @property
    def unified_path(self) -> Path | None:
        """The file of the unified model."""
        if self.unified is None:
            return None
        return self.path.with_name(unified_name(self.unified.digest))


def learn(
    backbone: Backbone,
    images: ImageSet,
    settings: TrainSettings,
    *,
    label: Label,
    folder: Path,
    after: Sequence[Bundle] = (),
    resume: bool = False,
    checkpoint_every_s: float = 60.0,
    watcher: Watcher,
    team: Team = ALONE,
) -> Outcome:
    """Learn a task into `<task>-<version>.safetensors`; report and plots lie in a folder beside.

    `lora` and `finetune` also write the unified model that the bundle names, a fusion of one task.

    All processes of a team make the bundle, each in a folder of its own: give others than the first
    one that is thrown away (`Team.place`). Only the first draws plots and resumes from its folder.

    Raises:
        DataError: the data cannot be learnt from, a setting does not suit the backbone or a bundle,
        earlier bundles are given to a method without experts, or the folder cannot be written.
        BundleError: an earlier bundle does not fit, or the bundle cannot be written.
    """
    started_s = time.monotonic()
    require_exportable(backbone, settings)
    if after and settings.method != "moe_adapter":
        raise DataError(f"{settings.method} cannot use experts of earlier tasks", code="settings")
    _check_names(label, images)
    name = f"{label.task}-{label.version}"
    details = folder / name
    make_folder(details)
    frozen = frozen_experts(after, backbone, settings)
    train_part, held_out = training_parts(images, settings)
    data_digest = images.digest
    trained = train(
        backbone,
        train_part,
        held_out,
        settings,
        frozen=frozen,
        checkpoint=details / "checkpoint.pt",
        identity=_identity(backbone, images, data_digest, settings, after),
        resume=resume,
        checkpoint_every_s=checkpoint_every_s,
        watcher=watcher,
        team=team,
    )
    trained_s = time.monotonic()
    left = _left(trained, frozen, backbone, settings, label, folder)
    path = folder / f"{name}.safetensors"
    bundle = export(
        left.product,
        backbone,
        train_part,
        held_out,
        settings,
        label=label,
        after=after,
        data_digest=data_digest,
        path=path,
        team=team,
    )
    report = (
        _report(bundle, path, images, trained.history)
        | left.report(folder)
        | {
            "training_s": round(trained_s - started_s, 1),
            "export_s": round(time.monotonic() - trained_s, 1),
        }
    )
    if team.is_first:
        _write_reports(details, report, trained.history, left.usage)
    return Outcome(bundle, path, report, left.counts, left.unified)


@dataclass(frozen=True, kw_only=True)
class _Left:
    """What training left, by whatever method."""

    product: Product
    counts: ParameterCounts
    usage: Usage | None = None  # of experts
    unified: Unified | None = None  # of deltas

    def report(self, folder: Path) -> dict[str, Any]:
        """What only some methods have to report; files are in `folder`."""
        found: dict[str, Any] = {}
        if self.usage is not None:
            found |= _usage_report(self.usage, self.product)
        if self.unified is not None:
            file = unified_name(self.unified.digest)
            found["unified"] = {
                "file": file,
                "digest": self.unified.digest,
                "size_bytes": (folder / file).stat().st_size,
                "elements": self.unified.elements,
            }
        return found


def _left(
    trained: Trained,
    frozen: FrozenExperts,
    backbone: Backbone,
    settings: TrainSettings,
    label: Label,
    folder: Path,
) -> _Left:
    learner = trained.learner
    if isinstance(learner, MoeAdapter):
        usage = measure_usage(learner, trained.trunk, settings)
        kept = keep(learner, frozen, usage, settings)
        product = of_experts(kept, backbone, settings)
        return _Left(product=product, counts=learner.counts(kept), usage=usage)
    assert isinstance(learner, OwnTowers)
    unified, trigger = fuse_alone(learner, backbone, settings, label=label, folder=folder)
    product = of_trigger(unified, trigger, backbone)
    return _Left(product=product, counts=learner.counts(), unified=unified)


def _check_names(label: Label, images: ImageSet) -> None:
    """Refuse before training what the manifest would refuse after it."""
    for name, value in {
        "task": label.task,
        "version": label.version,
        "licence": label.licence,
        "class_names": images.class_names,
        "templates": images.templates,
    }.items():
        try:
            TypeAdapter(Manifest.model_fields[name].rebuild_annotation()).validate_python(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise DataError(
                f"{name} {first['input']!r}: {first['msg']}", code="settings"
            ) from error


def training_parts(images: ImageSet, settings: TrainSettings) -> tuple[ImageSet, ImageSet | None]:
    """Images to learn from and images held out, which no gradient sees; few shots hold none out."""
    if settings.shots is not None:  # too few to hold any back: DDAS cross-fits
        return few_shot(images, settings.shots, settings.seed), None
    return split(images, settings.hold_out, settings.seed)


def _identity(
    backbone: Backbone,
    images: ImageSet,
    data_digest: str,
    settings: TrainSettings,
    after: Sequence[Bundle],
) -> str:
    """Digest of everything that decides what is learnt."""
    parts = {
        "backbone": backbone.fingerprint,
        "data": data_digest,
        "templates": images.templates,
        "settings": settings.as_dict(),
        "after": [bundle.digest for bundle in after],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _report(bundle: Bundle, path: Path, images: ImageSet, history: History) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "task": manifest.task,
        "version": manifest.version,
        "bundle": path.name,
        "digest": bundle.digest,
        "size_bytes": path.stat().st_size,
        "backbone": manifest.backbone.model_dump(mode="json"),
        "images": len(images),
        "classes": len(images.class_names),
        "settings": dict(manifest.training.settings),
        "metrics": dict(manifest.training.metrics),
        "selector": manifest.selector.model_dump(mode="json"),
        "after": list(manifest.training.after),
        "history": vars(history),
    }


def _usage_report(usage: Usage, product: Product) -> dict[str, Any]:
    towers = {"vision": product.vision, "text": product.text}
    return {
        "experts_kept": {
            name: {block: len(digests) for block, digests in tower.blocks.items()}
            for name, tower in towers.items()
        },
        "usage": {
            tower: {block: [round(float(s), 4) for s in shares] for block, shares in blocks.items()}
            for tower, blocks in usage.items()
        },
    }


def _write_reports(
    folder: Path, report: dict[str, Any], history: History, usage: Usage | None
) -> None:
    write_whole(folder / "report.json", json.dumps(report, indent=1).encode())
    write_whole(folder / "report.md", _markdown(report).encode())
    write_whole(folder / "curves.png", curves_png(history))
    if usage is not None:
        write_whole(folder / "usage.png", usage_png(usage))


def unified_row(report: Mapping[str, Any]) -> dict[str, str]:
    """The row of a table that names the unified model, if there is one: both must be carried."""
    if "unified" not in report:
        return {}
    file, size_bytes = report["unified"]["file"], report["unified"]["size_bytes"]
    return {"unified model": f"{file}, {size_bytes / 1e6:.2f} MB"}


def _at(alpha: float | None) -> str:
    return "" if alpha is None else f" at alpha {alpha:.3g}"


def _markdown(report: dict[str, Any]) -> str:
    selector = report["selector"]
    calibration = selector["calibration"]
    rows = {
        "bundle": f"{report['bundle']}, {report['size_bytes'] / 1e6:.2f} MB",
        "digest": report["digest"],
        **unified_row(report),
        "backbone": f"{report['backbone']['name']}, {report['backbone']['fingerprint']}",
        "data": f"{report['images']} images of {report['classes']} classes",
        "seconds": f"{report['training_s']} to train, {report['export_s']} to calibrate and export",
        "who decides": f"{calibration['method']}{_at(selector['alpha'])}; refuses "
        f"{calibration['false_reject_rate']:.3f} of {calibration['images']} images",
        **{name.replace("_", " "): f"{value:.4f}" for name, value in report["metrics"].items()},
        **{name.replace("_", " "): value for name, value in report["settings"].items()},
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    pictures = ["![loss and accuracy](curves.png)"]
    if "usage" in report:
        pictures.append("![share of the gates by expert](usage.png)")
    title = f"# {report['task']} {report['version']}"
    return "\n\n".join([title, f"| | |\n|---|---|\n{table}", *pictures]) + "\n"
