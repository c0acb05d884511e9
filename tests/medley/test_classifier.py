"""A batch of (image, ask): buckets, told and decided paths, and neighbours that come and go."""

import gc
import itertools
import resource
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medley.backbone import Backbone
from medley.classifier import Ask, Classifier
from medley.experts import TaskExperts
from medley.pool import Capacity
from medley.precision import PRECISIONS, Precision
from medley.replay import ReplayedClassifier
from medley.routed import ZERO_SHOT, RoutedModel
from tests.fakes import random_selector
from tests.models import random_experts, tiny_backbone

SMALL = Capacity(paths=6, slots=20, experts=4, bottleneck=8)
STEM = {"stem:mean_std": 128}
SWAPS = 1000
# Of features of unit length: some thirty roundings of 2^-8 or 2^-24 each, that mostly cancel.
ROUNDING = {"exact": 1e-5, "fp32": 1e-5, "bf16": 0.02}
MIB = 2**20


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


def classifier_of(
    backbone: Backbone,
    *,
    buckets: Sequence[int] = (1,),
    precision: Precision = "exact",
    replayed: bool = False,
) -> Classifier:
    kind = ReplayedClassifier if replayed else Classifier
    model = RoutedModel(backbone, precision=precision, first_expert_block=None, capacity=SMALL)
    return kind(model, buckets=buckets)


def enter(classifier: Classifier, experts: TaskExperts, *, seed: int) -> int:
    path = classifier.model.load(experts)
    selector = random_selector(STEM, random=torch.Generator().manual_seed(seed))
    classifier.selectors.add(path, replace(selector, threshold=0.5))
    return path


def leave(classifier: Classifier, path: int) -> None:
    classifier.selectors.remove(path)
    classifier.model.unload(path)


def pixels(count: int, *, seed: int = 0) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=chance)


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ((), r"the batch sizes \[\] must be one or more, and ascend"),
        ((4, 1), r"the batch sizes \[4, 1\] must be one or more, and ascend"),
        ((4, 4), r"the batch sizes \[4, 4\] must be one or more, and ascend"),
        ((0,), "the batch size 0 is not a power of two"),
        ((1, 6), "the batch size 6 is not a power of two"),
        ((-2,), "the batch size -2 is not a power of two"),
    ],
)
def test_buckets_are_ascending_powers_of_two(
    backbone: Backbone, buckets: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        classifier_of(backbone, buckets=buckets)


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (2, 4), (4, 4), (5, 8), (8, 8)])
def test_a_batch_runs_at_the_smallest_bucket_that_holds_it(
    backbone: Backbone, count: int, rows: int
) -> None:
    classifier = classifier_of(backbone, buckets=(1, 4, 8))
    assert classifier.max_batch == 8
    assert len(classifier.frozen(pixels(count)).hidden_BLD) == rows


def test_more_images_than_the_largest_bucket_holds_are_not_one_forward(backbone: Backbone) -> None:
    classifier = classifier_of(backbone, buckets=(1, 4))
    with pytest.raises(ValueError, match="5 images, the largest batch size is 4"):
        classifier.frozen(pixels(5))
    assert len(classifier.route(pixels(5), [Ask()] * 5).paths) == 5


Case = tuple[Tensor, list[Ask], Classifier]


def drawn(seed: int, count: int, precision: Precision) -> Case:
    """Images and asks of all kinds for a classifier with two tasks and a bucket of four."""
    classifier = classifier_of(tiny_backbone(), buckets=(4,), precision=precision)
    paths = [enter(classifier, random_experts(n, first_expert_block=n), seed=n) for n in (1, 2)]
    kinds = [Ask(), Ask(ZERO_SHOT), *map(Ask, paths), Ask(eligible=frozenset(paths[:1]))]
    return pixels(count, seed=seed), [kinds[(seed + n) % 5] for n in range(count)], classifier


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), place=st.integers(0, 3), precision=st.sampled_from(PRECISIONS))
def test_at_one_bucket_an_image_depends_on_no_neighbour(
    seed: int, place: int, precision: Precision
) -> None:
    """Least of all on whether a neighbour takes a path and experts run at all."""
    images, asks, classifier = drawn(seed, 4, precision)
    together = classifier.route(images, asks)
    others = pixels(4, seed=seed + 1)
    others[place] = images[place]
    alone = classifier.route(others, [asks[n] if n == place else Ask(ZERO_SHOT) for n in range(4)])

    assert alone.paths[place] == together.paths[place]
    assert torch.equal(alone.features_BE[place], together.features_BE[place])
    assert torch.equal(alone.scores_BT[place], together.scores_BT[place])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 9), precision=st.sampled_from(PRECISIONS))
def test_at_one_bucket_an_image_does_not_depend_on_its_place(
    seed: int, count: int, precision: Precision
) -> None:
    """The fast forms end in products of few rows, which two threads may round otherwise."""
    images, asks, classifier = drawn(seed, count, precision)
    together = classifier.route(images, asks)
    for n in range(count):
        alone = classifier.route(images[n][None], asks[n : n + 1])
        assert alone.paths == together.paths[n : n + 1]
        atol = 0.0 if precision == "exact" else ROUNDING[precision]
        torch.testing.assert_close(alone.features_BE[0], together.features_BE[n], atol=atol, rtol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_buckets_agree_to_rounding(backbone: Backbone, precision: Precision) -> None:
    one, several = (
        classifier_of(backbone, buckets=buckets, precision=precision) for buckets in ((1,), (1, 8))
    )
    paths = [enter(c, random_experts(1, first_expert_block=1), seed=1) for c in (one, several)]
    asks = [Ask(paths[0]), Ask(ZERO_SHOT)] * 3
    ours, theirs = (c.route(pixels(6), asks).features_BE for c in (one, several))
    torch.testing.assert_close(ours, theirs, atol=ROUNDING[precision], rtol=0)


def test_answers_are_on_the_host_and_there_at_once_on_a_cpu(backbone: Backbone) -> None:
    classifier = classifier_of(backbone, buckets=(1, 4))
    enter(classifier, random_experts(1), seed=1)
    launched = classifier.launch(pixels(9), [Ask()] * 9)
    assert launched.ready
    routed = launched.wait()
    assert routed.features_BE.shape == (9, 24)
    assert routed.scores_BT.shape == routed.accepted_BT.shape == (9, 1)
    assert routed.accepted_BT.dtype == torch.bool
    nobody = classifier.route(pixels(0), [])
    assert (nobody.paths, nobody.tasks, len(nobody.features_BE)) == ([], [0], 0)


def test_as_many_asks_as_images(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match="2 asks for 3 images"):
        classifier_of(backbone).launch(pixels(3), [Ask(), Ask()])


@pytest.mark.parametrize("wrong", [1, 6, 100, -2, -3])
def test_a_path_that_is_not_loaded_is_named(backbone: Backbone, wrong: int) -> None:
    classifier = classifier_of(backbone)
    path = enter(classifier, random_experts(1), seed=1)
    asks = [Ask(path), Ask(wrong)]
    with pytest.raises(ValueError, match=f"path {wrong} is not loaded"):
        classifier.route(pixels(2), asks)
    with pytest.raises(ValueError, match=f"path {wrong} is not loaded"):
        classifier.follow(classifier.frozen(pixels(1), taps=list(STEM)), asks[1:])
    leave(classifier, path)
    with pytest.raises(ValueError, match=f"path {path} is not loaded"):
        classifier.route(pixels(1), [Ask(path)])


def test_eligible_paths_that_are_not_there_are_nobody(backbone: Backbone) -> None:
    classifier = classifier_of(backbone)
    path = enter(classifier, random_experts(1), seed=1)
    for eligible in ({path, 5, 77, -1}, {path}):
        routed = classifier.route(pixels(1), [Ask(eligible=frozenset(eligible))])
        assert routed.paths == classifier.route(pixels(1), [Ask()]).paths


@pytest.mark.parametrize(("precision", "replayed"), [("exact", False), ("bf16", True)])
def test_a_thousand_swaps_change_no_bit_of_other_tasks_and_leave_no_memory(
    backbone: Backbone, precision: Precision, replayed: bool
) -> None:
    """Some versions share experts with a task that stays, or move the end of the trunk."""
    classifier = classifier_of(backbone, buckets=(4,), precision=precision, replayed=replayed)
    stays = [random_experts(seed, first_expert_block=1) for seed in (1, 2)]
    paths = [enter(classifier, experts, seed=seed) for seed, experts in enumerate(stays)]
    asks = [Ask(paths[0]), Ask(ZERO_SHOT), Ask(paths[1]), Ask(eligible=frozenset(paths))]
    images = pixels(4)
    versions = [random_experts(10 + n, first_expert_block=n % 3) for n in range(6)]
    versions[1] = replace(versions[1], vision={**versions[1].vision, 2: stays[0].vision[2]})
    before = classifier.route(images, asks)
    addresses = addresses_of(classifier)
    objects, resident = [], []
    for swap in range(SWAPS):
        path = enter(classifier, versions[swap % 6], seed=swap % 7)
        if swap % 20 == 0:
            during = classifier.route(images, asks)
            assert during.paths == before.paths
            assert torch.equal(during.features_BE, before.features_BE)
        leave(classifier, path)
        if swap in (SWAPS // 2, SWAPS - 1):
            gc.collect()
            objects.append(len(gc.get_objects()))
            resident.append(resident_bytes())
    after = classifier.route(images, asks)

    assert after.paths == before.paths
    assert torch.equal(after.features_BE, before.features_BE)
    assert torch.equal(after.scores_BT, before.scores_BT)
    assert addresses_of(classifier) == addresses
    # What a swap packs is 50 kB: to keep it would be 25 MB over the second half.
    assert resident[1] - resident[0] < 4 * MIB
    assert objects[1] - objects[0] < 500


def addresses_of(classifier: Classifier) -> list[int]:
    """Where everything is that experts are written into."""
    model = classifier.model
    assert model._text is not None
    tensors = (vars(pool).values() for pool in (model._vision, model._text.pool))
    return [t.data_ptr() for t in itertools.chain(*tensors) if isinstance(t, Tensor)]


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
