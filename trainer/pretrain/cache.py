"""The feature cache: what the frozen trunk sees in augmented images, computed once.

One .npy file of float16 rows a shard. Which image is in which row follows from the seed alone, so
shards can be made in any order, by several processes, and again after an interruption.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medley.mini import IMAGE_SIZE, MINI_PREPROCESS, Stem, stack_levels
from trainer.pretrain.augment import Chance, augment
from trainer.pretrain.corpus import Corpus, Item
from trainer.pretrain.files import load_state, map_array, save_array
from trainer.pretrain.render import load_set

_BATCH = 16  # the trunk's fastest on a CPU: 200 images/s and core against 130 with 64 (2026-11)
_FINE, _COARSE = (112, IMAGE_SIZE // 16), (320, IMAGE_SIZE // 32)  # channels, side
ROW = _FINE[0] * _FINE[1] ** 2 + _COARSE[0] * _COARSE[1] ** 2


@dataclass(frozen=True)
class CachePlan:
    """Which item every row of the cache shows.

    Attributes:
        items: the corpus's items.
        order: (rows,) index into them.
        shard_images: rows in one shard.
        seed: of the order and of the augmentation.
    """

    items: list[Item]
    order: NDArray[np.int64]
    shard_images: int
    seed: int

    @property
    def num_shards(self) -> int:
        """How many files."""
        return -(-len(self.order) // self.shard_images)

    def shard(self, index: int) -> list[Item]:
        """The items of one shard, in order."""
        start = index * self.shard_images
        return [self.items[row] for row in self.order[start : start + self.shard_images]]


def plan_cache(
    corpus: Corpus, copies: dict[str, float], *, most: int, shard_images: int, seed: int
) -> CachePlan:
    """Repeat each item as often as its kind says (2.5: two or three times), shuffle, cut.

    Args:
        corpus: its items and their kinds.
        copies: repetitions by kind.
        most: rows kept.
        shard_images: rows a shard.
        seed: of the shuffle.
    """
    chance = np.random.default_rng(seed)
    wanted = np.array([copies[item.kind] for item in corpus.items])
    times = np.floor(wanted + chance.random(len(wanted))).astype(np.int64)
    order = chance.permutation(np.repeat(np.arange(len(wanted)), times))
    return CachePlan(corpus.items, order[:most], shard_images, seed)


def fill_cache(
    plan: CachePlan, stem: Path, icons: Path, folder: Path, *, workers: int
) -> Iterator[int]:
    """Compute the shards that ``folder`` lacks; yields the number of rows of each new one.

    Args:
        plan: what goes where.
        stem: state of the `Stem`, as `files.save_state` wrote it.
        icons: folder of rendered sets.
        folder: of the cache.
        workers: processes, one thread each.
    """
    missing = [index for index in range(plan.num_shards) if not shard_path(folder, index).exists()]
    context = get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(workers, context) as pool:
        jobs = {
            pool.submit(
                make_shard,
                plan.shard(index),
                (plan.seed, index),
                stem,
                icons,
                shard_path(folder, index),
            )
            for index in missing
        }
        for job in as_completed(jobs):
            yield job.result()


def make_shard(
    items: list[Item], chance: tuple[int, int], stem_state: Path, icons: Path, path: Path
) -> int:
    """One shard, in a process of its own; loading the trunk again costs 2 % of it."""
    torch.set_num_threads(1)
    stem = Stem()
    stem.load_state_dict(load_state(stem_state))
    sets = {name: load_set(name, icons) for name in sorted({item.set_name for item in items})}
    draw = Chance(*chance)
    rows = np.empty((len(items), ROW), np.float16)
    for start in range(0, len(items), _BATCH):
        some = items[start : start + _BATCH]
        pictures = [np.asarray(sets[item.set_name].pixels[item.row]) for item in some]
        rows[start : start + len(some)] = _features(stem, augment(pictures, draw))
    save_array(path, rows)
    return len(items)


def shard_path(folder: Path, index: int) -> Path:
    """Where a shard lies."""
    return folder / f"{index:05d}.npy"


class FeatureCache:
    """Random access to the rows of a complete cache."""

    def __init__(self, plan: CachePlan, folder: Path) -> None:
        self._shards = [map_array(shard_path(folder, index)) for index in range(plan.num_shards)]
        self._shard_images = plan.shard_images
        self.num_rows = len(plan.order)

    def stacked(self, rows: NDArray[np.int64]) -> Tensor:
        """The mixer's input for these rows: (len(rows), 432, h, w) float32."""
        values = np.stack([self._row(int(row)) for row in rows])
        return unpack(torch.from_numpy(values).float())

    def _row(self, row: int) -> NDArray[np.float16]:
        shard, place = divmod(row, self._shard_images)
        return np.asarray(self._shards[shard][place])


def pack(fine_BChw: Tensor, coarse_BChw: Tensor) -> Tensor:
    """Both levels as rows (B, ROW)."""
    return torch.cat([fine_BChw.flatten(1), coarse_BChw.flatten(1)], dim=1)


def unpack(rows_BR: Tensor) -> Tensor:
    """Rows back to the mixer's input (B, 432, h, w)."""
    fine, coarse = rows_BR.split([_FINE[0] * _FINE[1] ** 2, _COARSE[0] * _COARSE[1] ** 2], dim=1)
    return stack_levels(
        fine.unflatten(1, (_FINE[0], _FINE[1], _FINE[1])),
        coarse.unflatten(1, (_COARSE[0], _COARSE[1], _COARSE[1])),
    )


def normalise(images_B3SS: Tensor) -> Tensor:
    """Images between 0 and 1 to the base's preprocessing."""
    mean = torch.tensor(MINI_PREPROCESS.mean)[:, None, None]
    std = torch.tensor(MINI_PREPROCESS.std)[:, None, None]
    return (images_B3SS - mean) / std


@torch.inference_mode()
def _features(stem: Stem, images_B3SS: Tensor) -> NDArray[np.float16]:
    values: NDArray[np.float16] = pack(*stem.levels(normalise(images_B3SS))).half().numpy()
    return values
