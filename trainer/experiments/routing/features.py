"""Frozen features of the suite's images, extracted once and kept in the cache folder.

Legend: B images, N images of a task.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from medley.backbone import Backbone
from medley.routed import RoutedModel
from trainer.datasets import ImageSet, PixelPicture
from trainer.pretrain.augment import on_white
from trainer.pretrain.render import load_set, render_set
from trainer.sources import fetch, source
from trainer.suite import TASKS, load_task

__all__ = [
    "Taps",
    "TaskTaps",
    "all_taps",
    "class_names",
    "feature_sets",
    "rows",
    "shared_class_names",
]

FIT, CALIBRATION, TEST = 800, 400, 500  # images of a task; clipart has fewer: two thirds, one third
BATCH = 32
CANARY = "openmoji"

Taps = Mapping[str, Tensor]


@dataclass(frozen=True)
class TaskTaps:
    """One task's frozen features by name, of its training images and of its test images."""

    train: Taps
    test: Taps
    labels_N: Tensor  # of the training images

    def split(self, seed: int) -> tuple[Taps, Taps]:
        """Training images to fit on, and others to calibrate on."""
        fit, calibration = self._places(seed)
        return rows(self.train, fit), rows(self.train, calibration)

    def labels(self, seed: int) -> Tensor:
        """Classes of the images to fit on."""
        return self.labels_N[self._places(seed)[0]]

    def _places(self, seed: int) -> tuple[Tensor, Tensor]:
        order_N = torch.randperm(len(self.labels_N), generator=torch.Generator().manual_seed(seed))
        fitted = round(len(order_N) * FIT / (FIT + CALIBRATION))
        return order_N[:fitted], order_N[fitted:]

    @property
    def counts(self) -> tuple[int, int, int]:
        """Images fitted on, calibrated on and tested on."""
        parts = (*self.split(0), self.test)
        fit, calibration, test = (len(next(iter(part.values()))) for part in parts)
        return fit, calibration, test


def rows(taps: Taps, index: Tensor | slice) -> Taps:
    """The features of some of the images."""
    return {name: x_NF[index] for name, x_NF in taps.items()}


def all_taps(model: RoutedModel, folder: Path) -> tuple[dict[str, TaskTaps], Taps]:
    """Features of all tasks, and of the canary."""
    taps = {}
    for task in track(TASKS, "frozen features"):
        train = _sample(load_task(task, "train", cache=folder), FIT + CALIBRATION)
        test = _sample(load_task(task, "test", cache=folder), TEST)
        taps[task] = TaskTaps(
            _extracted(model, train, folder),
            _extracted(model, test, folder),
            torch.tensor([label for _, label in train.items]),
        )
    return taps, _extracted(model, _sample(_canary(folder), TEST), folder)


def _canary(folder: Path) -> ImageSet:
    """Emoji of a vendor that the base has never seen, without flags: a task has those."""
    icons = folder.expanduser() / "routing" / "icons"
    if not (icons / f"{CANARY}.json").exists():
        icons.mkdir(parents=True, exist_ok=True)
        render_set(CANARY, fetch(source(CANARY), folder), icons, mono=False, px=128)
    drawn = load_set(CANARY, icons)
    rows = [row for row, name in enumerate(drawn.names) if "flag" not in name]
    pictures = [
        PixelPicture((on_white([drawn.pixels[row]])[0] * 255).byte().permute(1, 2, 0).numpy())
        for row in rows
    ]
    return ImageSet(CANARY, (CANARY,), ("{}",), [(picture, 0) for picture in pictures])


def _sample(images: ImageSet, count: int) -> ImageSet:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images.subset(order[:count].tolist())


def _extracted(model: RoutedModel, images: ImageSet, folder: Path) -> Taps:
    """Every feature of every image, kept in the cache folder."""
    backbone = model.backbone
    singles, _ = feature_sets(len(backbone.image.blocks))
    names = [name for (name,) in singles]
    key = hashlib.sha256(" ".join([backbone.fingerprint, images.digest, *names]).encode())
    file = folder.expanduser() / "routing" / f"{key.hexdigest()[:16]}.safetensors"
    if not file.exists():
        with torch.inference_mode():
            parts = [model.frozen(x_BCHW, taps=names).taps for x_BCHW in _batches(backbone, images)]
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: torch.cat([part[name] for part in parts]) for name in names}, file)
    return load_file(file)


def _batches(backbone: Backbone, images: ImageSet) -> Iterator[Tensor]:
    for start in range(0, len(images), BATCH):
        rows = range(start, min(start + BATCH, len(images)))
        yield backbone.normalise(torch.stack([backbone.pixels(images.image(row)) for row in rows]))


def class_names(folder: Path) -> dict[str, frozenset[str]]:
    """Of every task, without regard to case."""
    return {
        task: frozenset(
            name.casefold() for name in load_task(task, "test", cache=folder).class_names
        )
        for task in TASKS
    }


def shared_class_names(folder: Path) -> list[tuple[str, str]]:
    """Pairs of tasks that have a class name in common."""
    names = class_names(folder)
    return [(a, b) for a, b in combinations(TASKS, 2) if names[a] & names[b]]


def feature_sets(blocks: int) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Every single feature, and sets of a shallow one with deeper ones."""
    depths = ["stem", *(f"block{n}" for n in range(1, blocks + 1))]
    names = [f"{depth}:{pool}" for depth in depths for pool in ("mean", "mean_std")]
    singles: list[tuple[str, ...]] = [(n,) for n in (*names, f"block{blocks}:cls", "embedding")]
    stem, first, half, last = (f"{depths[n]}:mean" for n in (0, 1, blocks // 2, blocks))
    several: list[tuple[str, ...]] = [
        (stem, half),
        (stem, last),
        (first, half),
        (first, last),
        (first, "embedding"),
        (half, last),
        (half, "embedding"),
        (stem, half, "embedding"),
    ]
    return singles, several
