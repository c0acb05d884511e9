"""From a trained learner to a bundle: keep what matters, round, calibrate, measure, write.

Everything that is measured here is measured on what is written: experts are rounded to their
storage type first, and run through the routed model that a server runs.

Legend: N images, C classes, E experts, D width, F width of a tap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medley.admission import backbone_ref, record_self_test
from medley.backbone import Backbone
from medley.bundle import (
    Bundle,
    Tower,
    expert_tensors,
    selector_spec,
    selector_tensors,
    tower_spec,
    write_bundle,
)
from medley.classifier import Ask, Classifier, logits
from medley.errors import BundleError, DataError
from medley.experts import BlockExperts, TaskExperts
from medley.manifest import Calibration, Manifest, SelfTest, Training
from medley.pool import Capacity
from medley.prompts import class_text_features
from medley.routed import ZERO_SHOT, RoutedModel
from medley.selector import TaskSelector, conformal_threshold
from trainer.datasets import ImageSet
from trainer.ddas import false_reject_rate
from trainer.distributed import ALONE, Team
from trainer.experts import BlockMixture, TowerMixture
from trainer.frozen import frozen_buckets, frozen_taps
from trainer.methods import FrozenExperts, MoeAdapter
from trainer.pixels import pixels_of
from trainer.reference import load_reference
from trainer.selectors import FITS
from trainer.settings import TrainSettings
from trainer.trunk import CHUNK, ImageTrunk

__all__ = [
    "Label",
    "Usage",
    "capacity_for",
    "export",
    "frozen_experts",
    "keep",
    "measure_usage",
    "require_exportable",
]

STORAGE = torch.bfloat16
SELF_TEST_IMAGES = 4
SELF_TEST_TOLERANCE = (
    0.05  # logits are 100 times a cosine; other kernels and devices move them by 1e-3
)
USAGE_IMAGES = 2048  # the gates of more images than this change no decision
BUCKET = 16

Usage = dict[Tower, dict[int, Tensor]]  # share of the gates by tower, block: (E,), sums to 1


@dataclass(frozen=True, kw_only=True)
class Label:
    """What a bundle is called and under which terms it may be used."""

    task: str
    version: str
    licence: str


def require_exportable(backbone: Backbone, settings: TrainSettings) -> None:
    """Refuse what no bundle can hold; better before training than after.

    Raises:
        DataError: the method has no bundle format, the experts are linear, or the selector needs a
        reference that the backbone does not have.
    """
    if settings.method != "moe_adapter":
        raise DataError(
            f"{settings.method} has no bundle format; only moe_adapter makes bundles",
            code="settings",
        )
    if not settings.relu:
        raise DataError(
            "experts without ReLU are for ablations; a bundle's experts have one", code="settings"
        )
    if FITS[settings.selector].needs_reference and load_reference(backbone) is None:
        raise DataError(
            f"selector {settings.selector} needs a reference, and {backbone.name} has none; "
            "python -m trainer.reference makes one",
            code="settings",
        )


def frozen_experts(
    bundles: Sequence[Bundle], backbone: Backbone, settings: TrainSettings
) -> FrozenExperts:
    """Gather the experts of earlier bundles that this run's routers may choose, each of them once.

    Raises:
        BundleError: a bundle of another backbone, or whose experts cannot stand beside this run's;
        all problems are listed.
    """
    problems = [p for bundle in bundles for p in _misfits(bundle, backbone, settings)]
    if problems:
        raise BundleError(problems, code="after")
    image_blocks = range(settings.first_image_block(backbone), len(backbone.image.blocks))
    return FrozenExperts(
        vision=_united([b.experts("vision") for b in bundles], image_blocks),
        text=_united([b.experts("text") for b in bundles], settings.text_blocks(backbone)),
    )


def measure_usage(learner: MoeAdapter, trunk: ImageTrunk, settings: TrainSettings) -> Usage:
    """Measure each expert's share of the gates over training images and prompts, without noise.

    The trunk's team shares the images.
    """
    usage: Usage = {"vision": {}, "text": {}}

    def watch(tower: Tower, mixtures: TowerMixture) -> Callable[[int, Tensor], None]:
        def observe(block: int, x_BLD: Tensor) -> None:
            mass_E = mixtures[block].gates(x_BLD).sum(0)
            usage[tower][block] = usage[tower].get(block, torch.zeros_like(mass_E)) + mass_E

        return observe

    order = np.random.default_rng(settings.seed).permutation(len(trunk.images))[:USAGE_IMAGES]
    learner.eval()
    with torch.no_grad():
        for start in range(0, len(order), CHUNK):
            entrance = trunk.batch(order[start : start + CHUNK], 0)
            learner.image_features(entrance, observe=watch("vision", learner.vision))
        if learner.text is not None:
            learner.observe_text(watch("text", learner.text))
    usage["vision"] = {b: trunk.team.total(mass_E) for b, mass_E in usage["vision"].items()}
    return {
        tower: {block: (mass_E / mass_E.sum()).cpu() for block, mass_E in blocks.items()}
        for tower, blocks in usage.items()
    }


def keep(
    learner: MoeAdapter, frozen: FrozenExperts, usage: Usage, settings: TrainSettings
) -> TaskExperts:
    """Keep each block's experts that carry the task, and the router's columns for them.

    A reused expert is passed on untouched, so that it keeps its digest; a new one is rounded to the
    storage type.
    """

    def tower(
        mixtures: TowerMixture, shares: Mapping[int, Tensor], old: Mapping[int, BlockExperts]
    ) -> dict[int, BlockExperts]:
        return {
            block: _kept(
                mixtures[block],
                old.get(block),
                _chosen(shares[block], mixtures[block].counts_E, settings),
            )
            for block in mixtures.blocks
        }

    return TaskExperts(
        vision=tower(learner.vision, usage["vision"], frozen.vision),
        text={} if learner.text is None else tower(learner.text, usage["text"], frozen.text),
        top_k=settings.top_k,
        scale=settings.scale,
    )


def export(
    experts: TaskExperts,
    backbone: Backbone,
    train: ImageSet,
    held_out: ImageSet | None,
    settings: TrainSettings,
    *,
    label: Label,
    after: Sequence[Bundle],
    data_digest: str,
    path: Path,
    team: Team = ALONE,
) -> Bundle:
    """Calibrate DDAS, measure on held-out images, record the self-test and write the bundle.

    The processes of a team share what is computed for each image; the rest each does for itself.

    Args:
        experts: as `keep` returns them.
        backbone: the one they were trained on.
        train: what they were trained on; fits the autoencoders.
        held_out: calibrates their thresholds; None: cross-fitting on `train`.
        settings: of the run; go into the manifest.
        label: task, version, licence.
        after: the bundles whose experts could be reused.
        data_digest: of all images given, hex.
        path: of the file.
        team: all of it must call alike.

    Raises:
        BundleError: it cannot be written.
        DataError: no bundle can hold what these settings train.
    """
    require_exportable(backbone, settings)
    classifier = Classifier(_routed(backbone, experts, settings), buckets=(BUCKET,))
    model = classifier.model
    route = model.load(experts)
    class_text_CE = class_text_features(model, train.class_names, train.templates, route)
    selector, calibration = _calibrated(classifier, train, held_out, settings, team)
    classifier.selectors.add(route, selector)
    sample = held_out or train
    self_test = record_self_test(
        classifier, route, class_text_CE, pixels_of(backbone, sample, _spread(sample))
    )
    manifest = Manifest(
        task=label.task,
        version=label.version,
        class_names=train.class_names,
        templates=train.templates,
        backbone=backbone_ref(classifier),
        method="moe_adapter",
        first_expert_block=model.first_expert_block,
        bottleneck=settings.bottleneck,
        top_k=settings.top_k,
        scale=settings.scale,
        vision=tower_spec(backbone.image.width, experts.vision),
        text=tower_spec(backbone.text.width if backbone.text else 1, experts.text),
        selector=selector_spec(selector, calibration),
        training=Training(
            data_digest=f"sha256:{data_digest}",
            seed=settings.seed,
            settings=settings.as_dict(),
            metrics={}
            if held_out is None
            else _metrics(classifier, route, class_text_CE, held_out, team),
            after=tuple(bundle.digest for bundle in after),
        ),
        licence=label.licence,
        self_test=SelfTest(
            images=len(self_test["self_test.pixels"]), tolerance=SELF_TEST_TOLERANCE
        ),
    )
    tensors = {
        **expert_tensors("vision", experts.vision),
        **expert_tensors("text", experts.text),
        **selector_tensors(selector),
        **self_test,
        "class_text_features": class_text_CE.cpu(),
    }
    return write_bundle(manifest, {n: t.contiguous() for n, t in tensors.items()}, path)


def capacity_for(tasks: Sequence[TaskExperts]) -> Capacity:
    """Just enough room for these tasks."""
    blocks = [b for task in tasks for tower in (task.vision, task.text) for b in tower.values()]
    top_k = max(task.top_k for task in tasks)
    experts = max(block.num_experts for block in blocks)
    return Capacity(
        paths=len(tasks),
        slots=experts * len(tasks),
        experts=max(experts, top_k),
        bottleneck=max(block.down_ERD.shape[1] for block in blocks),
        max_top_k=top_k,
    )


def _routed(backbone: Backbone, experts: TaskExperts, settings: TrainSettings) -> RoutedModel:
    first = settings.first_image_block(backbone)
    return RoutedModel(backbone, first_expert_block=first, capacity=capacity_for([experts]))


def _misfits(bundle: Bundle, backbone: Backbone, settings: TrainSettings) -> list[str]:
    manifest = bundle.manifest
    name = f"{manifest.task} {manifest.version}"
    if manifest.backbone.fingerprint != backbone.fingerprint:
        return [f"{name} was learnt on another backbone ({manifest.backbone.name}), not this one"]
    problems = [
        f"{name} has {field} {theirs:g}, this run {ours:g}; experts that share a block must agree"
        for field, theirs, ours in (
            ("bottleneck", manifest.bottleneck, settings.bottleneck),
            ("scale", manifest.scale, settings.scale),
        )
        if theirs != ours
    ]
    experts = [*bundle.experts("vision").values(), *bundle.experts("text").values()]
    if any(block.down_ERD.dtype != STORAGE for block in experts):
        problems.append(f"{name} does not store its experts as {STORAGE}; they cannot be reused")
    return problems


def _united(towers: Sequence[Mapping[int, BlockExperts]], blocks: range) -> dict[int, BlockExperts]:
    """One stack of experts a block, without repetitions, in the order of the bundles."""
    united = {}
    for block in blocks:
        distinct = {
            experts.digest(i): (experts, i)
            for tower in towers
            if (experts := tower.get(block)) is not None
            for i in range(experts.num_experts)
        }
        if distinct:
            united[block] = _stacked(list(distinct.values()))
    return united


def _stacked(members: Sequence[tuple[BlockExperts, int]]) -> BlockExperts:
    def stack(name: str) -> Tensor:
        return torch.stack([getattr(experts, name)[i] for experts, i in members])

    down_ERD = stack("down_ERD")
    return BlockExperts(
        down_ERD,
        stack("down_bias_ER"),
        stack("up_ERD"),
        stack("up_bias_ED"),
        router_DE=torch.zeros(down_ERD.shape[2], len(members)),  # nobody's: every task has its own
    )


def _chosen(share_E: Tensor, counts_E: Tensor, settings: TrainSettings) -> list[int]:
    """Which experts stay: the fewest that cover the mass, or the paper's most counted."""
    if settings.freeze == "count":
        order = counts_E.argsort(descending=True, stable=True)
        return sorted(order[: settings.freeze_count].tolist())
    order = share_E.argsort(descending=True, stable=True)
    covered = share_E[order].cumsum(0)
    needed = int((covered < settings.freeze_mass).sum()) + 1
    return sorted(order[:needed].tolist())


def _kept(mixture: BlockMixture, old: BlockExperts | None, chosen: list[int]) -> BlockExperts:
    def pick(name: str) -> Tensor:
        new = getattr(mixture, name).detach().cpu().to(STORAGE)
        return (new if old is None else torch.cat([getattr(old, name), new]))[chosen]

    return BlockExperts(
        pick("down_ERD"),
        pick("down_bias_ER"),
        pick("up_ERD"),
        pick("up_bias_ED"),
        # float32: it is small, and rounding it would send images elsewhere than they were trained
        # to go.
        router_DE=mixture.router.gate_DE.detach().cpu()[:, chosen],
    )


def _calibrated(
    classifier: Classifier,
    train: ImageSet,
    held_out: ImageSet | None,
    settings: TrainSettings,
    team: Team,
) -> tuple[TaskSelector, Calibration]:
    run = FITS[settings.selector]
    fit, labels_N = frozen_taps(classifier, train, run.taps, team=team), train.labels
    calibration = (
        None if held_out is None else frozen_taps(classifier, held_out, run.taps, team=team)
    )
    enough = held_out is not None and (
        not run.promises or _can_promise(settings.alpha, len(held_out))
    )
    if held_out is not None and calibration is not None and not enough:
        # Too few to promise alpha: every image counts.
        fit = {name: torch.cat([fit[name], calibration[name]]) for name in run.taps}
        labels_N = np.concatenate([labels_N, held_out.labels])
    selector = run(
        fit,
        torch.from_numpy(labels_N.copy()),
        calibration if enough else None,
        alpha=settings.alpha,
        seed=settings.seed,
        iterations=settings.ddas_iterations,
        reference=load_reference(classifier.model.backbone),
        team=team,
    )
    measured = calibration if calibration is not None and enough else fit
    promise = "split conformal" if enough else "cross-fitted conformal"
    return selector, Calibration(
        method=promise if run.promises else "against a reference, measured and not promised",
        images=len(next(iter(measured.values()))),
        false_reject_rate=false_reject_rate(selector, measured),
    )


def _can_promise(alpha: float, held_out: int) -> bool:
    """Whether so many held-out images are enough to promise alpha."""
    return conformal_threshold(torch.zeros(held_out), alpha) != math.inf


def _metrics(
    classifier: Classifier, route: int, class_text_CE: Tensor, held_out: ImageSet, team: Team
) -> dict[str, float]:
    model = classifier.model
    zero_shot_CE = class_text_features(model, held_out.class_names, held_out.templates)
    return {
        "held_out_accuracy": _accuracy(classifier, route, class_text_CE, held_out, team),
        "held_out_accuracy_zero_shot": _accuracy(
            classifier, ZERO_SHOT, zero_shot_CE, held_out, team
        ),
    }


def _accuracy(
    classifier: Classifier, path: int, class_text_CE: Tensor, images: ImageSet, team: Team
) -> float:
    scale, taps = classifier.model.backbone.logit_scale, classifier.selectors.taps
    guesses = team.pooled(
        [
            int(logits(features_E, class_text_CE, scale).argmax())
            for features_E in classifier.follow(frozen, [Ask(path)] * count).features_BE
        ]
        for frozen, count in frozen_buckets(classifier, images, taps=taps, team=team)
    )
    return float((np.concatenate(guesses) == images.labels).mean())


def _spread(images: ImageSet) -> list[int]:
    """A few images from all over the set: classes lie in order."""
    count = min(SELF_TEST_IMAGES, len(images))
    return [i * len(images) // count for i in range(count)]
