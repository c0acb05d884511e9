from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medley.backbone import Backbone
from medley.classifier import Ask, Classifier
from medley.errors import DataError
from medley.pool import Capacity
from medley.routed import RoutedModel
from tests.models import random_experts, tiny_backbone
from tests.trainer.tiny import NoLargeFiles, pictures
from trainer.datasets import ImageSet, few_shot, split
from trainer.frozen import FrozenStore, frozen_buckets, frozen_features, frozen_taps
from trainer.kept import KeptPicture, kept_hidden
from trainer.pixels import pixels_of

FIRST_BLOCK, BUCKET = 2, 4
TAPS = ("stem:mean", "block1:mean")
CAPACITY = Capacity(paths=2, slots=16, experts=4, bottleneck=8, max_top_k=2)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


def classifier_of(
    backbone: Backbone, *, first: int = FIRST_BLOCK, bucket: int = BUCKET
) -> Classifier:
    model = RoutedModel(backbone, first_expert_block=first, capacity=CAPACITY)
    return Classifier(model, buckets=(bucket,))


@pytest.fixture
def images() -> ImageSet:
    return pictures(["red", "green"], 9, seed=3)


@pytest.fixture
def kept(backbone: Backbone, images: ImageSet, tmp_path: Path) -> ImageSet:
    return FrozenStore(tmp_path, classifier_of(backbone), taps=TAPS).keep(images)


def test_kept_features_are_those_of_the_classifier_to_the_last_bit(
    backbone: Backbone, images: ImageSet, kept: ImageSet
) -> None:
    classifier = classifier_of(backbone)
    fresh = frozen_taps(classifier, images, TAPS)
    for name, features_NF in frozen_taps(classifier, kept, TAPS).items():
        assert torch.equal(features_NF, fresh[name])
    assert torch.equal(frozen_features(classifier, kept), frozen_features(classifier, images))


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15, deadline=None
)
@given(st.lists(st.integers(0, 17), min_size=1, max_size=9))
def test_any_choice_of_kept_images_gives_the_bits_of_the_images_themselves(
    backbone: Backbone, images: ImageSet, kept: ImageSet, chosen: list[int]
) -> None:
    classifier = classifier_of(backbone)
    path = classifier.model.load(random_experts(1, first_expert_block=FIRST_BLOCK))
    asks = [Ask(path)] * len(chosen)
    pixels_BCHW = pixels_of(backbone, images, chosen)
    expected_BE = classifier.route(pixels_BCHW, asks).features_BE
    parts = [
        classifier.follow(frozen, [Ask(path)] * count).features_BE
        for frozen, count in frozen_buckets(classifier, kept.subset(chosen))
    ]
    assert torch.equal(torch.cat(parts), expected_BE)


def test_images_are_computed_once_and_read_ever_after(
    backbone: Backbone, images: ImageSet, tmp_path: Path
) -> None:
    first = FrozenStore(tmp_path, classifier_of(backbone), taps=TAPS).keep(images)
    (home,) = tmp_path.iterdir()
    written = {file.name: file.stat().st_mtime_ns for file in home.iterdir()}
    told: list[int] = []
    again = FrozenStore(tmp_path, classifier_of(backbone), taps=TAPS).keep(
        images, on_images=told.append
    )
    assert told == [len(images)]
    assert {file.name: file.stat().st_mtime_ns for file in home.iterdir()} == written
    classifier = classifier_of(backbone)
    assert torch.equal(frozen_features(classifier, first), frozen_features(classifier, again))


def test_splits_and_shots_of_kept_images_stay_kept(kept: ImageSet) -> None:
    rest, part = split(kept, 0.3, seed=0)
    for some in (rest, part, few_shot(kept, 2, seed=0)):
        assert all(isinstance(picture, KeptPicture) for picture, _ in some.items)


def test_a_kept_set_is_the_same_data(images: ImageSet, kept: ImageSet) -> None:
    assert kept.digest == images.digest
    assert kept.bytes_of(0) == images.bytes_of(0)
    assert np.array_equal(np.asarray(kept.image(0)), np.asarray(images.image(0)))


@pytest.fixture(params=["backbone", "first block", "batch size", "tap"])
def stranger(
    request: pytest.FixtureRequest, backbone: Backbone
) -> Iterator[tuple[Classifier, str]]:
    """Somebody for whom the kept rows are not the right ones."""
    match request.param:
        case "backbone":
            yield classifier_of(tiny_backbone(seed=1)), TAPS[0]
        case "first block":
            yield classifier_of(backbone, first=1), TAPS[0]
        case "batch size":
            yield classifier_of(backbone, bucket=8), TAPS[0]
        case _:
            yield classifier_of(backbone), "block2:mean"


def test_rows_that_do_not_fit_are_not_read_but_computed(
    stranger: tuple[Classifier, str], images: ImageSet, kept: ImageSet
) -> None:
    classifier, tap = stranger
    fresh = frozen_taps(classifier, images, [tap])[tap]
    assert torch.equal(frozen_taps(classifier, kept, [tap])[tap], fresh)


def test_hidden_states_too_large_to_keep_are_computed_when_asked_for(
    backbone: Backbone, images: ImageSet, tmp_path: Path
) -> None:
    store = FrozenStore(tmp_path, classifier_of(backbone), taps=TAPS, max_bytes=1000)
    kept = store.keep(images)
    assert kept_hidden(backbone, FIRST_BLOCK, kept, [0]) is None
    classifier = classifier_of(backbone)
    for (frozen, _), (fresh, _) in zip(
        frozen_buckets(classifier, kept), frozen_buckets(classifier, images), strict=True
    ):
        assert torch.equal(frozen.hidden_BLD, fresh.hidden_BLD)


def test_a_trunk_reads_kept_hidden_states_only_of_its_own_backbone_and_block(
    backbone: Backbone, kept: ImageSet
) -> None:
    hidden_BLD = kept_hidden(backbone, FIRST_BLOCK, kept, [3, 0])
    assert hidden_BLD is not None
    assert len(hidden_BLD) == 2
    assert kept_hidden(backbone, 1, kept, [0]) is None
    assert kept_hidden(tiny_backbone(seed=1), FIRST_BLOCK, kept, [0]) is None
    mixed = replace(kept, items=(kept.items[0], pictures(["red", "green"], 1).items[0]))
    assert kept_hidden(backbone, FIRST_BLOCK, mixed, [0, 1]) is None


def test_a_disk_that_fills_up_is_told_in_a_line_and_leaves_nothing_half_done(
    backbone: Backbone, images: ImageSet, tmp_path: Path, no_large_files: NoLargeFiles
) -> None:
    store = FrozenStore(tmp_path, classifier_of(backbone), taps=TAPS)
    with no_large_files(), pytest.raises(DataError, match="cannot write"):
        store.keep(images)
    assert list(tmp_path.iterdir()) == []
    assert len(store.keep(images)) == len(images)
