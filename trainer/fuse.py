"""Fusing tasks: their deltas to one unified model, and a new version of every task's bundle.

A task that has just been learnt is a fusion of one, which holds its delta exactly. Several fusions
become one: each task is decoupled from the unified model it belongs to, and all are unified. So
the same function does the paper's sessions (the last fusion and one new task) and the better
variant (all from fusions of one, whose deltas nothing has changed). The arithmetic is
`medley/fusion.py`, the command `trainer/fuse_command.py`.

Source: ConDU, arXiv:2503.10705.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from medley.admission import backbone_ref, retire
from medley.backbone import Backbone
from medley.bundle import Bundle, selector_tensors, write_bundle
from medley.classifier import Classifier
from medley.decoupled import deltas_of
from medley.errors import BundleError, DataError
from medley.fusion import Rescale, Trigger, unify
from medley.manifest import Manifest
from medley.routed import RoutedModel
from medley.unified import Unified, UnifiedManifest, unified_name, write_unified
from trainer.capacity import capacity_for
from trainer.checkpoint import make_folder
from trainer.export import BUCKET, Label, recorded
from trainer.fusion_report import FusionReport, fusion_report, write_report
from trainer.methods import OwnTowers
from trainer.product import Product, of_trigger
from trainer.settings import TrainSettings

__all__ = ["Fused", "Member", "fuse", "fuse_alone", "fused_version"]

LONGEST_VERSION = 31
_FUSED = re.compile(r"\.f\d+-[0-9a-f]{6}$")


@dataclass(frozen=True, eq=False)
class Member:
    """A task that is to be fused: its trigger bundle and the unified model that it names."""

    bundle: Bundle
    unified: Unified | None  # None: the bundle names none, and cannot be fused

    @property
    def name(self) -> str:
        """For messages and manifests: task@version."""
        return f"{self.bundle.manifest.task}@{self.bundle.manifest.version}"


@dataclass(frozen=True, eq=False)
class Fused:
    """What a fusion left; bundles and their files in the order of the tasks' names."""

    unified: Unified
    unified_path: Path
    bundles: tuple[Bundle, ...]
    paths: tuple[Path, ...]
    report: FusionReport


def fuse_alone(
    learner: OwnTowers,
    backbone: Backbone,
    settings: TrainSettings,
    *,
    label: Label,
    folder: Path,
) -> tuple[Unified, Trigger]:
    """Write the unified model of one task that has just been learnt: its delta, exactly.

    Raises:
        BundleError: it cannot be written.
    """
    lora = settings.method == "lora"
    fusion = unify([learner.deltas()])
    manifest = UnifiedManifest(
        method="lora" if lora else "finetune",
        backbone=backbone_ref(backbone),
        first_expert_block=learner.first_image_block,
        rank=settings.bottleneck if lora else None,
        scale=settings.bottleneck**-0.5 if lora else None,
        tasks=(f"{label.task}@{label.version}",),
    )
    unified = write_unified(manifest, fusion.unified, learner.start(), folder)
    return unified, fusion.triggers[0]


def fuse(
    members: Sequence[Member],
    backbone: Backbone,
    folder: Path,
    *,
    rescale: Rescale = "l1",
    on_task: Callable[[int], None] = lambda _: None,
) -> Fused:
    """Fuse tasks into a new folder: a unified model, a bundle of each, and a report.

    Equal members give equal bytes, in whatever order. What depends on the weights, class text
    features and self-test, is made anew; selector and prototypes are carried over. All deltas are
    held in memory: four bytes for each element of each task.

    Args:
        members: of one backbone, method and rank, each task once.
        backbone: the one they were learnt on.
        folder: not there yet, or empty; it appears whole or not at all.
        rescale: what the rescalers keep, see `medley.fusion`.
        on_task: told of each task that is done.

    Raises:
        BundleError: they cannot be fused (code `fusion`; everything that does not fit is listed),
            a unified model is not the one that is named, or a file cannot be written.
        DataError: the folder is not empty, or cannot be written.
    """
    members = sorted(members, key=lambda member: member.name)
    problems = _misfits(members, backbone)
    if problems:
        raise BundleError(problems, code="fusion")
    given = [deltas_of(member.bundle, member.unified) for member in members]
    first = members[0].unified
    assert first is not None
    with _whole(folder) as place:
        fusion = unify(given, rescale=rescale)
        names = tuple(member.name for member in members)
        about = first.manifest.model_copy(update={"tasks": names})
        unified = write_unified(about, fusion.unified, first.start, place)
        bundles = []
        renew = _Renewal(unified, backbone, rescale)
        for member, trigger in zip(members, fusion.triggers, strict=True):
            bundles.append(renew.written(member.bundle, trigger, len(members), place))
            on_task(1)
        files = [bundle_name(bundle.manifest) for bundle in bundles]
        written = [unified_name(unified.digest), *files]
        sizes = [(place / name).stat().st_size for name in written]
        report = fusion_report(unified, bundles, given, fusion, rescale=rescale, sizes=sizes)
        write_report(report, place)
    return Fused(
        unified,
        folder / written[0],
        tuple(bundles),
        tuple(folder / name for name in files),
        report,
    )


def bundle_name(manifest: Manifest) -> str:
    """What the file of a bundle is called."""
    return f"{manifest.task}-{manifest.version}.safetensors"


def fused_version(version: str, tasks: int, unified: str) -> str:
    """Name the version of a task in a fusion: how many tasks, and which unified model.

    `1` becomes `1.f4-3fa9c1`, and that, when it is fused again, `1.f5-07be44`.
    """
    return f"{_FUSED.sub('', version)}.f{tasks}-{unified.removeprefix('sha256:')[:6]}"


class _Renewal:
    """Writes the new versions of tasks whose deltas have been fused."""

    def __init__(self, unified: Unified, backbone: Backbone, rescale: Rescale) -> None:
        self._unified, self._backbone, self._rescale = unified, backbone, rescale
        self._classifier: Classifier | None = None

    def written(self, old: Bundle, trigger: Trigger, tasks: int, folder: Path) -> Bundle:
        """Make what depends on the weights anew, carry over what does not, and write."""
        product = of_trigger(self._unified, trigger, self._backbone)
        before = old.manifest
        settings = before.training.settings | {"fused_from": old.digest, "rescale": self._rescale}
        training = before.training.model_copy(
            update={"settings": settings, "metrics": _before_fusion(before.training.metrics)}
        )
        manifest = before.model_copy(
            update={
                **product.described(),
                "version": fused_version(before.version, tasks, self._unified.digest),
                "training": training,
            }
        )
        tensors = {**self._recorded(old, product), **selector_tensors(old.selector())}
        tensors |= product.tensors
        if old.prototypes is not None:
            tensors["prototypes"] = old.prototypes
        return write_bundle(
            manifest,
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            folder / bundle_name(manifest),
        )

    def _recorded(self, old: Bundle, product: Product) -> dict[str, torch.Tensor]:
        classifier, manifest = self._room_for(product), old.manifest
        path = classifier.model.load(product.update)
        classifier.selectors.add(path, old.selector())
        pixels_NCHW = old.tensors["self_test.pixels"]
        found = recorded(
            classifier, path, manifest.class_names, manifest.templates, pixels_NCHW=pixels_NCHW
        )
        retire(path, classifier)
        return found

    def _room_for(self, product: Product) -> Classifier:
        """One model for all of them: they are of one size, and come and go one by one."""
        if self._classifier is None:
            model = RoutedModel(
                self._backbone,
                first_expert_block=self._unified.manifest.first_expert_block,
                capacity=capacity_for([product.update]),
            )
            self._classifier = Classifier(model, buckets=(BUCKET,))
        return self._classifier


def _before_fusion(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics of the task alone, named so: nobody has measured it as it is now."""
    return {f"alone_{name.removeprefix('alone_')}": value for name, value in metrics.items()}


def _misfits(members: Sequence[Member], backbone: Backbone) -> list[str]:
    """Everything that keeps these tasks from being fused."""
    if not members:
        return ["there is no bundle to fuse"]
    strangers = [
        f"{member.name} was learnt by {member.bundle.manifest.method}, which has nothing to fuse; "
        "only bundles of lora and finetune have"
        for member in members
        if member.unified is None
    ]
    if strangers:
        return strangers
    counts = Counter(member.bundle.manifest.task for member in members)
    problems = [f"{n} bundles of the task {task}" for task, n in counts.items() if n > 1]
    for member in members:
        problems += _differences(member, members[0], backbone)
        longest = fused_version(member.bundle.manifest.version, len(members), "0" * 6)
        if len(longest) > LONGEST_VERSION:
            problems.append(f"{member.name}: the version is too long to be given a suffix")
    return problems


def _differences(member: Member, other: Member, backbone: Backbone) -> list[str]:
    assert member.unified is not None
    assert other.unified is not None
    mine, theirs = member.unified.manifest, other.unified.manifest
    if member.bundle.manifest.backbone.fingerprint != backbone.fingerprint:
        return [f"{member.name} was learnt on another backbone ({mine.backbone.name}), not this"]
    problems = [
        f"{member.name} has {what} {ours}, {other.name} has {others}"
        for what, ours, others in (
            ("method", mine.method, theirs.method),
            ("rank", mine.rank, theirs.rank),
            ("first_expert_block", mine.first_expert_block, theirs.first_expert_block),
            ("scale", mine.scale, theirs.scale),
        )
        if ours != others
    ]
    if problems:
        return problems
    if member.unified.shapes != other.unified.shapes:
        return [f"{member.name} and {other.name} have not changed the same tensors"]
    start, starts = member.unified.start, other.unified.start
    if not all(torch.equal(start[name], starts[name]) for name in start):
        return [f"{member.name} and {other.name} did not start from the same factors"]
    return []


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder beside, which takes its place when everything is in it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is there already, and not an empty folder", code="settings")
    folder = folder.absolute()  # "." has no name
    place = folder.with_name(f".{folder.name}.unfinished-{secrets.token_hex(8)}")
    make_folder(place)
    try:
        yield place
        place.replace(folder)
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror}", code="not_written") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
