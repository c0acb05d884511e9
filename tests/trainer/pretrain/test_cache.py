from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medley.mini import Stem
from trainer.pretrain.augment import Chance, augment
from trainer.pretrain.cache import (
    CachePlan,
    FeatureCache,
    fill_cache,
    make_shard,
    normalise,
    plan_cache,
    shard_path,
)
from trainer.pretrain.corpus import Corpus, Item
from trainer.pretrain.files import load_state, save_array, save_json, save_state
from trainer.pretrain.render import load_set


def corpus(*kinds: str) -> Corpus:
    items = [Item("toy", row, f"name {row}", kind) for row, kind in enumerate(kinds)]
    return Corpus(items, sorted(item.name for item in items), [], [])


def plan(most: int = 1000) -> CachePlan:
    copies = {"colour": 3.0, "noun": 1.0, "other": 0.5}
    things = corpus(*["colour"] * 4, *["noun"] * 3, *["other"] * 100)
    return plan_cache(things, copies, most=most, shard_images=8, seed=0)


def test_items_come_as_often_as_their_kind_says() -> None:
    times = np.bincount(plan().order, minlength=107)
    assert times[:4].tolist() == [3] * 4
    assert times[4:7].tolist() == [1] * 3
    assert set(times[7:].tolist()) == {0, 1}
    assert 30 < times[7:].sum() < 70


def test_a_shorter_cache_is_the_beginning_of_a_longer_one() -> None:
    assert np.array_equal(plan(most=20).order, plan().order[:20])


def test_shards_cover_every_row_once() -> None:
    whole = plan()
    rows = [item.row for index in range(whole.num_shards) for item in whole.shard(index)]
    assert rows == whole.order.tolist()


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A rendered set of three pictures and a random stem."""
    torch.manual_seed(0)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 128, 128, 4), np.uint8)
    save_array(tmp_path / "icons" / "toy.npy", pictures)
    about = {"mono": False, "names": ["a", "b", "c"], "categories": [""] * 3}
    save_json(tmp_path / "icons" / "toy.json", about)
    save_state(tmp_path / "stem.pt", Stem().state_dict())
    return tmp_path


def three_rows() -> CachePlan:
    return CachePlan(corpus("colour", "colour", "colour").items, np.array([2, 0, 1]), 3, seed=7)


def test_rows_are_the_stems_features_of_the_augmented_images(work: Path) -> None:
    things, path = three_rows(), shard_path(work / "cache", 0)
    make_shard(things.shard(0), (7, 0), work / "stem.pt", work / "icons", path)
    pictures = load_set("toy", work / "icons").pixels
    stem = Stem()
    stem.load_state_dict(load_state(work / "stem.pt"))
    with torch.inference_mode():
        cached = stem.mix(FeatureCache(things, work / "cache").stacked(np.arange(3)))
        expected = stem(normalise(augment([pictures[row] for row in (2, 0, 1)], Chance(7, 0))))
    # float16 keeps 11 bits of each feature; the mixer sums 432 of them
    torch.testing.assert_close(cached, expected, rtol=1e-2, atol=2e-2)


@pytest.mark.slow
def test_shards_are_made_once_by_several_processes(work: Path) -> None:
    things = replace(three_rows(), shard_images=2)

    def fill() -> list[int]:
        folders = (work / "stem.pt", work / "icons", work / "cache")
        return sorted(fill_cache(things, *folders, workers=2))

    assert fill() == [1, 2]
    assert fill() == []
    again = work / "again.npy"
    make_shard(things.shard(1), (7, 1), work / "stem.pt", work / "icons", again)
    assert again.read_bytes() == shard_path(work / "cache", 1).read_bytes()
