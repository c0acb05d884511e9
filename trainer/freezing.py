"""Activate and freeze: which experts a run may choose of earlier tasks, and which of its own stay.

Only `moe_adapter` has any. What is kept goes into the task's bundle, so nothing that is learnt
later can change it.

Legend: E experts, D width.

Source: MoE-Adapters, arXiv:2403.11549; by gate mass instead of counts, docs/adr/0009.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from medley.backbone import Backbone
from medley.bundle import Bundle, Tower
from medley.errors import BundleError
from medley.experts import BlockExperts, TaskExperts
from trainer.experts import BlockMixture, TowerMixture
from trainer.methods import FrozenExperts, MoeAdapter
from trainer.settings import TrainSettings
from trainer.trunk import CHUNK, ImageTrunk

__all__ = ["Usage", "frozen_experts", "keep", "measure_usage"]

STORAGE = torch.bfloat16
USAGE_IMAGES = 2048  # the gates of more images than this change no decision

Usage = dict[Tower, dict[int, Tensor]]  # share of the gates by tower, block: (E,), sums to 1


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


def _misfits(bundle: Bundle, backbone: Backbone, settings: TrainSettings) -> list[str]:
    manifest = bundle.manifest
    name = f"{manifest.task} {manifest.version}"
    if manifest.method != "moe_adapter":
        return [f"{name} was learnt by {manifest.method} and has no experts"]
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
