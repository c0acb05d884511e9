"""A precision says how far it may be from exact, and bundles are admitted by that."""

from typing import get_args

import pytest
import torch

from medley.admission import admit, backbone_ref, record_self_test
from medley.bundle import Bundle
from medley.classifier import Ask, Classifier
from medley.errors import BundleError
from medley.pool import Capacity
from medley.precision import ADDED_TOLERANCE, PRECISIONS, Precision, dtype_of
from medley.prompts import class_text_features
from medley.routed import ZERO_SHOT, RoutedModel
from tests.fakes import random_selector, tiny_bundle
from tests.models import random_experts, tiny_backbone

CAPACITY = Capacity(paths=2, slots=6, experts=4, bottleneck=8, max_top_k=2)


def classifier_of(precision: Precision) -> Classifier:
    model = RoutedModel(
        tiny_backbone(), precision=precision, first_expert_block=None, capacity=CAPACITY
    )
    return Classifier(model, buckets=(4,))


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    """Made as the trainer makes one: exactly."""
    classifier = classifier_of("exact")
    experts = random_experts(1, first_expert_block=1, num_experts=2)
    selector = random_selector({"stem:mean_std": 128}, random=torch.Generator().manual_seed(1))
    path = classifier.model.load(experts)
    classifier.selectors.add(path, selector)
    manifest, tensors = tiny_bundle(
        backbone=backbone_ref(classifier.model.backbone),
        vision=experts.vision,
        text=experts.text,
        selector=selector,
    )
    tensors["class_text_features"] = class_text_features(
        classifier.model, ("cat", "dog", "hamster"), manifest.templates, path
    )
    pixels_NCHW = tensors["self_test.pixels"]
    tensors |= record_self_test(classifier, path, tensors["class_text_features"], pixels_NCHW)
    return Bundle(manifest, tensors)


def off_by(bundle: Bundle, logit: float) -> Bundle:
    moved = bundle.tensors["self_test.logits"] + logit
    return Bundle(bundle.manifest, {**bundle.tensors, "self_test.logits": moved})


def test_every_precision_has_a_dtype_and_a_tolerance() -> None:
    assert get_args(Precision) == PRECISIONS
    assert ADDED_TOLERANCE.keys() == set(PRECISIONS)
    assert [dtype_of(p) for p in PRECISIONS] == [torch.float32, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_bundle_that_was_made_exactly_is_admitted_at_any_precision(
    precision: Precision, bundle: Bundle
) -> None:
    classifier = classifier_of(precision)
    path = admit(bundle, classifier)
    pixels = bundle.tensors["self_test.pixels"]
    asks = [Ask(path), Ask(ZERO_SHOT)] * (len(pixels) // 2)
    assert classifier.route(pixels[: len(asks)], asks).paths == [a.path for a in asks]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_precision_adds_its_tolerance_and_no_more(precision: Precision, bundle: Bundle) -> None:
    own, added = bundle.manifest.self_test.tolerance, ADDED_TOLERANCE[precision]
    if added:
        admit(off_by(bundle, own + added / 2), classifier_of(precision))
    with pytest.raises(BundleError, match="self-test: logits differ"):
        admit(off_by(bundle, own + added * 1.5 + 0.01), classifier_of(precision))
