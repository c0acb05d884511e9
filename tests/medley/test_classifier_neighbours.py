"""Images that nobody claims, and what their nearest tasks make of them, in mixed batches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medley.backbone import Backbone
from medley.classifier import MAX_NEAREST, Ask, Classifier, Other, Routed
from medley.experts import TaskUpdate
from medley.pool import Capacity
from medley.precision import Precision
from medley.routed import ZERO_SHOT, RoutedModel
from tests.fakes import random_selector
from tests.models import random_experts, random_low_rank, random_weights, tiny_backbone

SMALL = Capacity(paths=6, slots=20, experts=4, bottleneck=8, low_rank_slots=2, low_rank=4)
STEM = {"stem:mean_std": 128}
THRESHOLD = 12.5  # some images are the third task's
NOBODY: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


def tasks_of(backbone: Backbone) -> list[TaskUpdate]:
    """All kinds of tasks, none of which owns block 0."""
    return [
        random_experts(0, first_expert_block=1),
        random_low_rank(backbone, 1, first_block=2),
        random_experts(2, first_expert_block=2),
        random_weights(backbone, 3, first_block=2),
    ]


def classifier_of(
    backbone: Backbone, *, bucket: int = 1, tasks: int = 4, precision: Precision = "exact"
) -> Classifier:
    """Tasks whose selectors accept some images and refuse others."""
    model = RoutedModel(backbone, precision=precision, first_expert_block=None, capacity=SMALL)
    classifier = Classifier(model, buckets=(bucket,))
    for seed, task in enumerate(tasks_of(backbone)[:tasks]):
        enter(classifier, task, seed)
    return classifier


def enter(classifier: Classifier, task: TaskUpdate, seed: int, *, prototypes: bool = True) -> int:
    chance = torch.Generator().manual_seed(seed)
    path = classifier.model.load(task)
    selector = random_selector(STEM, random=chance)
    classifier.selectors.add(path, replace(selector, threshold=THRESHOLD))
    if prototypes:
        classifier.neighbours.add(path, torch.randn(4, 24, generator=chance))
    return path


def pixels(count: int, *, seed: int = 0) -> Tensor:
    """Noise of different strengths, which selectors tell apart."""
    chance = torch.Generator().manual_seed(seed)
    strengths = 255 * torch.rand(count, 1, 1, 1, generator=chance)
    return (strengths * torch.rand(count, 3, 32, 32, generator=chance)).to(torch.uint8)


def asks_of(paths: Sequence[int]) -> list[Ask]:
    """Every kind of ask there is."""
    return [
        Ask(),
        Ask(nearest=2),
        Ask(ZERO_SHOT),
        Ask(eligible=NOBODY, nearest=1),
        *map(Ask, paths),
        Ask(eligible=NOBODY, nearest=MAX_NEAREST),
        Ask(eligible=frozenset(paths[:1]), nearest=2, among=frozenset(paths[1:])),
    ]


def assert_equal(ours: Routed, row: int, theirs: Routed, other_row: int) -> None:
    assert ours.paths[row] == theirs.paths[other_row]
    assert torch.equal(ours.features_BE[row], theirs.features_BE[other_row])
    assert torch.equal(ours.scores_BT[row], theirs.scores_BT[other_row])
    assert_same_others(ours.others[row], theirs.others[other_row])


def assert_same_others(ours: Sequence[Other], theirs: Sequence[Other]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert (one.path, one.similarity) == (other.path, other.similarity)
        assert torch.equal(one.features_E, other.features_E)


@cache
def unchanged(bucket: int, precision: Precision) -> Classifier:
    return classifier_of(tiny_backbone(), bucket=bucket, precision=precision)


@pytest.mark.parametrize(
    ("bucket", "precision"), [(1, "exact"), (1, "fp32"), (1, "bf16"), (8, "exact")]
)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 10), offset=st.integers(0, 20))
def test_a_mixed_batch_answers_as_each_alone(
    bucket: int, precision: Precision, seed: int, count: int, offset: int
) -> None:
    """At one batch size bit by bit, whatever rows the neighbours of others make it run.

    Zero-shot, experts, low-rank updates, weights of their own, and whom nobody claims.
    """
    classifier = unchanged(bucket, precision)
    kinds = asks_of(sorted(classifier.model.paths))
    asks = [kinds[(offset + n) % len(kinds)] for n in range(count)]
    images = pixels(count, seed=seed)
    together = classifier.route(images, asks)
    for n in range(count):
        alone = classifier.route(images[n : n + 1], asks[n : n + 1])
        assert_equal(together, n, alone, 0)


@pytest.mark.parametrize("bucket", [1, 4])
def test_a_neighbour_answers_as_if_its_path_had_been_named(backbone: Backbone, bucket: int) -> None:
    classifier = classifier_of(backbone, bucket=bucket)
    images = pixels(6)
    routed = classifier.route(images, [Ask(eligible=NOBODY, nearest=4)] * 6)
    zero_shot = classifier.route(images, [Ask(ZERO_SHOT)] * 6)
    named = {path: classifier.route(images, [Ask(path)] * 6) for path in classifier.model.paths}

    assert routed.paths == [ZERO_SHOT] * 6
    assert torch.equal(routed.features_BE, zero_shot.features_BE)
    for row, others in enumerate(routed.others):
        assert sorted(other.path for other in others) == [0, 1, 2, 3]
        assert similarities(others) == sorted(similarities(others), reverse=True)
        for other in others:
            assert torch.equal(other.features_E, named[other.path].features_BE[row])


def similarities(others: Sequence[Other]) -> list[float]:
    return [other.similarity for other in others]


def test_only_who_is_claimed_by_nobody_has_neighbours(backbone: Backbone) -> None:
    classifier = classifier_of(backbone)
    routed = classifier.route(pixels(30), [Ask(nearest=2)] * 30)
    assert {path == ZERO_SHOT for path in routed.paths} == {True, False}
    for path, others in zip(routed.paths, routed.others, strict=True):
        assert len(others) == (2 if path == ZERO_SHOT else 0)


def test_who_names_a_path_or_none_or_asks_for_no_neighbour_has_none(backbone: Backbone) -> None:
    classifier = classifier_of(backbone)
    asks = [Ask(ZERO_SHOT, nearest=3), Ask(0, nearest=3), Ask(eligible=NOBODY), Ask()]
    assert classifier.route(pixels(4), asks).others == [()] * 4


def test_among_whom_is_asked_is_kept_and_more_than_there_are_is_all(backbone: Backbone) -> None:
    classifier = classifier_of(backbone)
    bare = enter(classifier, random_experts(7), 7, prototypes=False)
    for among, expected in (
        (None, [0, 1, 2, 3]),
        ({0, 2}, [0, 2]),
        ({1}, [1]),
        ({bare, 5, 77, -1}, []),
        (set(), []),
    ):
        ask = Ask(eligible=NOBODY, nearest=9, among=None if among is None else frozenset(among))
        (others,) = classifier.route(pixels(1), [ask]).others
        assert sorted(other.path for other in others) == expected


def test_without_any_task_an_image_is_zero_shot_alone(backbone: Backbone) -> None:
    classifier = classifier_of(backbone, tasks=0)
    routed = classifier.route(pixels(2), [Ask(nearest=4)] * 2)
    assert (routed.paths, routed.others) == ([ZERO_SHOT] * 2, [(), ()])
    assert classifier.route(pixels(0), []).others == []


def test_neighbours_that_come_and_go_change_no_bit_of_the_others(backbone: Backbone) -> None:
    classifier = classifier_of(backbone, bucket=4)
    asks = asks_of([0, 1, 2, 3])
    images = pixels(len(asks))
    before = classifier.route(images, asks)
    newcomer = enter(classifier, random_low_rank(backbone, 9), 9)
    old = frozenset(range(4))
    during = classifier.route(images, [replace(ask, among=ask.among or old) for ask in asks])
    nearer = classifier.route(images, asks)
    classifier.neighbours.remove(newcomer)
    classifier.selectors.remove(newcomer)
    classifier.model.unload(newcomer)
    after = classifier.route(images, asks)

    assert newcomer in {other.path for others in nearer.others for other in others}
    for row in range(len(asks)):
        assert_equal(after, row, before, row)
        if during.paths[row] != newcomer:
            assert_same_others(during.others[row], before.others[row])


@pytest.mark.parametrize("nearest", [-1, MAX_NEAREST + 1])
def test_too_many_neighbours_are_refused(backbone: Backbone, nearest: int) -> None:
    classifier = classifier_of(backbone)
    with pytest.raises(ValueError, match=f"nearest is {nearest}, must lie between 0 and 16"):
        classifier.launch(pixels(2), [Ask(), Ask(nearest=nearest)])


def test_follow_answers_for_neighbours_too(backbone: Backbone) -> None:
    classifier = classifier_of(backbone, bucket=4)
    ask, images = Ask(eligible=NOBODY, nearest=2), pixels(3)
    followed = classifier.follow(classifier.frozen(images, taps=list(STEM)), [ask] * 3)
    routed = classifier.route(images, [ask] * 3)
    for row in range(3):
        assert_equal(followed, row, routed, row)


def test_an_image_runs_its_trunk_once_and_rows_share_forwards(backbone: Backbone) -> None:
    """Three neighbours of two images are six rows, one forward of eight from block 1 on."""
    classifier = classifier_of(backbone, bucket=8, tasks=3)
    ask = Ask(eligible=NOBODY, nearest=3)
    with counted(backbone) as calls:
        classifier.route(pixels(8), [Ask(ZERO_SHOT)] * 6 + [ask] * 2)
    assert calls == [1, 1, 2, 2]
    with counted(backbone) as calls:
        classifier.route(pixels(8), [ask] * 8)
    assert calls == [1, 1, 4, 4]


@contextmanager
def counted(backbone: Backbone) -> Iterator[list[int]]:
    """Count how often the stem and each block of an image tower run."""
    visual = backbone.model.visual
    modules = [visual.conv1, *(block.ln_1 for block in visual.transformer.resblocks)]
    calls = [0] * len(modules)

    def counts(place: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            calls[place] += 1

        return hook

    hooks = [module.register_forward_hook(counts(n)) for n, module in enumerate(modules)]
    yield calls
    for hook in hooks:
        hook.remove()
