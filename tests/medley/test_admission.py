"""A bundle becomes a path only on its own backbone, and only if it answers as it did."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from medley.admission import admit, backbone_ref, pack, prove, record_self_test, retire
from medley.backbone import Backbone
from medley.bundle import Bundle
from medley.classifier import Ask, Classifier
from medley.errors import BundleError, CapacityError
from medley.pool import Capacity
from medley.prompts import class_text_features
from medley.routed import ZERO_SHOT, RoutedModel
from tests.fakes import random_selector, tiny_bundle
from tests.models import random_experts, tiny_backbone

NAMES = ("cat", "dog", "hamster")
SMALL = Capacity(paths=2, slots=6, experts=4, bottleneck=8, max_top_k=2)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


def fresh(backbone: Backbone, **options: Any) -> Classifier:
    return Classifier(RoutedModel(backbone, first_expert_block=1, capacity=SMALL), **options)


def learnt_bundle(
    backbone: Backbone, *, seed: int = 1, taps: Mapping[str, int] | None = None, **fields: Any
) -> Bundle:
    """Make a bundle whose self-test was recorded on this very backbone."""
    classifier = fresh(backbone)
    experts = random_experts(seed, first_expert_block=1)
    random = torch.Generator().manual_seed(seed)
    selector = random_selector(taps or {"stem:mean_std": 128, "block3:mean": 64}, random=random)
    path = classifier.model.load(experts)
    manifest, tensors = tiny_bundle(
        seed=seed,
        backbone=backbone_ref(classifier.model.backbone),
        vision=experts.vision,
        text=experts.text,
        selector=replace(selector, threshold=1e9),
        **fields,
    )
    tensors["class_text_features"] = class_text_features(
        classifier.model, NAMES, manifest.templates, path
    )
    if taps is None:
        classifier.selectors.add(path, replace(selector, threshold=1e9))
        tensors |= record_self_test(
            classifier, path, tensors["class_text_features"], tensors["self_test.pixels"]
        )
    return Bundle(manifest, tensors)


def changed(bundle: Bundle, **tensors: Tensor) -> Bundle:
    return Bundle(bundle.manifest, {**bundle.tensors, **tensors})


def pixels(count: int) -> Tensor:
    return torch.randint(
        256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(5)
    )


def test_an_admitted_bundle_is_routed_to_by_ddas(backbone: Backbone) -> None:
    classifier = fresh(backbone)
    path = admit(learnt_bundle(backbone), classifier)
    routed = classifier.route(pixels(3), [Ask(), Ask(ZERO_SHOT), Ask(eligible=frozenset())])
    assert routed.paths == [path, ZERO_SHOT, ZERO_SHOT]
    plain = classifier.route(pixels(1), [Ask(ZERO_SHOT)])
    assert not torch.equal(routed.features_BE[0], plain.features_BE[0])


def test_a_retired_bundle_leaves_no_trace(backbone: Backbone) -> None:
    classifier = fresh(backbone)
    for _ in range(5):
        retire(admit(learnt_bundle(backbone), classifier), classifier)
    assert classifier.selectors.tasks == ()
    assert classifier.route(pixels(1), [Ask()]).paths == [ZERO_SHOT]


@pytest.mark.parametrize("bucket", [1, 4, 8])
def test_answers_do_not_depend_on_the_batch_a_request_came_in(
    backbone: Backbone, bucket: int
) -> None:
    classifier = fresh(backbone, buckets=(bucket,))
    path = admit(learnt_bundle(backbone), classifier)
    asks = [Ask(path), Ask(ZERO_SHOT), Ask(), Ask(path), Ask()] * 2
    together = classifier.route(pixels(10), asks)
    for i, ask in enumerate(asks):
        alone = classifier.route(pixels(10)[i : i + 1], [ask])
        assert torch.equal(alone.features_BE[0], together.features_BE[i])
        assert torch.equal(alone.scores_BT[0], together.scores_BT[i])


def test_an_empty_batch_is_answered_with_nothing(backbone: Backbone) -> None:
    assert fresh(backbone).route(pixels(0), []).paths == []


def test_a_bundle_for_another_backbone_is_refused_with_every_difference(
    backbone: Backbone,
) -> None:
    other = tiny_backbone(seed=7)
    classifier = fresh(other)
    with pytest.raises(BundleError) as refusal:
        admit(learnt_bundle(backbone), classifier)
    assert refusal.value.code == "wrong_backbone"
    assert "fingerprint: made for sha256:" in refusal.value.problems[0]
    assert classifier.selectors.tasks == ()


def test_a_bundle_that_answers_otherwise_than_it_did_is_refused_and_unloaded(
    backbone: Backbone,
) -> None:
    bundle = learnt_bundle(backbone)
    classifier = fresh(backbone)
    wrong = changed(bundle, **{"self_test.logits": bundle.tensors["self_test.logits"] + 1})
    for _ in range(SMALL.paths + 1):
        with pytest.raises(BundleError, match="logits differ by 1") as refusal:
            admit(wrong, classifier)
    assert refusal.value.code == "self_test_failed"
    assert classifier.selectors.tasks == ()
    admit(bundle, classifier)


def test_a_self_test_may_be_run_in_parts_and_each_is_judged(backbone: Backbone) -> None:
    bundle, classifier = learnt_bundle(backbone), fresh(backbone)
    logits_NC = bundle.tensors["self_test.logits"].clone()
    logits_NC[1] += 1
    wrong = changed(bundle, **{"self_test.logits": logits_NC})

    packed = pack(wrong, classifier)
    path = admit(packed, classifier, images=1)
    prove(packed, classifier, path, slice(0, 1))
    with pytest.raises(BundleError, match="logits differ by 1"):
        prove(packed, classifier, path, slice(1, 2))


def test_a_bundle_whose_ddas_scores_otherwise_is_refused(backbone: Backbone) -> None:
    bundle = learnt_bundle(backbone)
    wrong = changed(bundle, **{"self_test.scores": bundle.tensors["self_test.scores"] - 3})
    with pytest.raises(BundleError, match="DDAS scores differ by 3"):
        admit(wrong, fresh(backbone))


@pytest.mark.parametrize("taps", [{"block9:mean": 64}, {"block3:mean": 63}])
def test_a_bundle_whose_ddas_looks_at_a_feature_that_is_not_there_is_refused(
    taps: dict[str, int], backbone: Backbone
) -> None:
    classifier = fresh(backbone)
    with pytest.raises(BundleError, match="DDAS") as refusal:
        admit(learnt_bundle(backbone, taps=taps), classifier)
    assert refusal.value.code == "wrong_backbone"
    assert classifier.route(pixels(1), [Ask()]).paths == [ZERO_SHOT]


def test_a_bundle_that_finds_no_room_changes_nothing(backbone: Backbone) -> None:
    classifier = fresh(backbone)
    first = admit(learnt_bundle(backbone, seed=1), classifier)
    before = classifier.route(pixels(2), [Ask(first)] * 2).features_BE
    admit(learnt_bundle(backbone, seed=2), classifier)
    with pytest.raises(CapacityError, match="all 2 paths are taken"):
        admit(learnt_bundle(backbone, seed=3), classifier)
    assert torch.equal(classifier.route(pixels(2), [Ask(first)] * 2).features_BE, before)
