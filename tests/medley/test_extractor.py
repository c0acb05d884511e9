"""A second frozen network for selectors that look at one: AlexNet, as MoE-Adapters used it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import AlexNet

from medley.admission import admit, backbone_ref, record_self_test
from medley.backbone import Backbone
from medley.bundle import Bundle, read_bundle, selector_spec, selector_tensors, write_bundle
from medley.classifier import Classifier
from medley.errors import BackboneError, BundleError
from medley.extractor import ALEXNET_CONV5, Extractor, load_alexnet
from medley.pool import Capacity
from medley.prompts import class_text_features
from medley.routed import RoutedModel
from medley.selector import TaskSelector
from tests.fakes import random_selector, tiny_bundle
from tests.models import random_experts, tiny_backbone

SMALL = Capacity(paths=2, slots=6, experts=4, bottleneck=8, max_top_k=2)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


def weights(folder: Path, *, seed: int = 0) -> Path:
    """torchvision's file for AlexNet, as far as its convolutions go."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = AlexNet(num_classes=1).features
    path = folder / f"alexnet-{seed}.pth"
    torch.save({f"features.{name}": t for name, t in layers.state_dict().items()}, path)
    return path


def plain(path: Path, images: Tensor) -> Tensor:
    """AlexNet's own modules, put together by hand."""
    layers = AlexNet(num_classes=1).features
    saved = torch.load(path, weights_only=True)
    layers.load_state_dict({name.removeprefix("features."): t for name, t in saved.items()})
    return torch.sigmoid(torch.flatten(layers[:11](images), 1))


def pictures(count: int, size: int = 32, *, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def test_the_feature_is_the_sigmoid_of_the_fifth_convolution_before_its_relu(
    tmp_path: Path,
) -> None:
    path = weights(tmp_path)
    extractor = load_alexnet(path)
    images = pictures(2, 224)
    features = extractor(images)
    assert features.shape == (2, 43_264)
    assert extractor.tap == ALEXNET_CONV5
    torch.testing.assert_close(features, plain(path, images), atol=0, rtol=0)
    assert (features < 0.5).any()  # before the ReLU: half of a sigmoid's inputs are negative


def test_loading_draws_no_random_number(tmp_path: Path) -> None:
    path = weights(tmp_path)
    before = torch.get_rng_state()
    load_alexnet(path)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_digest_is_of_the_convolutions_alone_and_of_their_values(tmp_path: Path) -> None:
    one = weights(tmp_path)
    tensors = torch.load(one, weights_only=True)
    torch.save(tensors | {"classifier.1.weight": torch.zeros(3)}, tmp_path / "whole.pth")
    save_file(tensors, tmp_path / "same.safetensors")
    digest = load_alexnet(one).digest
    assert digest == load_alexnet(tmp_path / "whole.pth").digest
    assert digest == load_alexnet(tmp_path / "same.safetensors").digest
    assert digest != load_alexnet(weights(tmp_path, seed=1)).digest


def test_weights_of_something_else_are_refused_in_one_line(tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(64, 3, 11, 11)}, tmp_path / "vgg.pth")
    with pytest.raises(BackboneError, match=r"^vgg.pth is not of torchvision's AlexNet$"):
        load_alexnet(tmp_path / "vgg.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 5)
    with pytest.raises(BackboneError, match=r"^cut.safetensors is damaged, cut short or"):
        load_alexnet(tmp_path / "cut.safetensors")
    with pytest.raises(BackboneError, match=r"^none.pth cannot be read: No such file"):
        load_alexnet(tmp_path / "none.pth")


@torch.inference_mode()
def test_a_routed_model_offers_the_feature_beside_its_own(
    backbone: Backbone, tmp_path: Path
) -> None:
    extractor = load_alexnet(weights(tmp_path))
    model = RoutedModel(backbone, capacity=SMALL, extractors=[extractor])
    images = pictures(3)
    frozen = model.frozen(images, taps=["stem:mean", ALEXNET_CONV5])
    assert torch.equal(frozen.taps[ALEXNET_CONV5], extractor(images))
    assert frozen.taps["stem:mean"].shape == (3, 64)
    assert frozen.features_BE is None  # it asks no block of the backbone


def test_a_model_without_the_network_does_not_know_the_feature(backbone: Backbone) -> None:
    with pytest.raises(BackboneError, match="has no feature 'alexnet:conv5'"):
        RoutedModel(backbone, capacity=SMALL).frozen(pictures(1), taps=[ALEXNET_CONV5])


def fresh(backbone: Backbone, *extractors: Extractor) -> Classifier:
    model = RoutedModel(backbone, first_expert_block=1, capacity=SMALL, extractors=extractors)
    return Classifier(model)


def bundle_with(backbone: Backbone, extractor: Extractor, path: Path) -> Bundle:
    """A bundle whose selector looks at the extractor's feature."""
    classifier = fresh(backbone, extractor)
    random = torch.Generator().manual_seed(3)
    selector = random_selector({ALEXNET_CONV5: 256}, random=random)
    selector = TaskSelector(selector.levels, threshold=1e9, alpha=None)
    experts = random_experts(first_expert_block=1)
    route = classifier.model.load(experts)
    classifier.selectors.add(route, selector)
    manifest, tensors = tiny_bundle(
        backbone=backbone_ref(classifier.model.backbone), vision=experts.vision, text=experts.text
    )
    names = manifest.class_names
    class_text_CE = class_text_features(classifier.model, names, manifest.templates, route)
    tensors = {n: t for n, t in tensors.items() if not n.startswith("ddas.")}
    tensors |= selector_tensors(selector) | {"class_text_features": class_text_CE}
    pixels = tensors["self_test.pixels"]
    tensors |= record_self_test(classifier, route, class_text_CE, pixels)
    spec = selector_spec(
        selector,
        manifest.selector.calibration,
        extractors={ALEXNET_CONV5: extractor.digest},
    )
    return write_bundle(manifest.model_copy(update={"selector": spec}), tensors, path)


def test_a_bundle_whose_selector_looks_at_a_network_needs_that_network(
    backbone: Backbone, tmp_path: Path
) -> None:
    right, wrong = (load_alexnet(weights(tmp_path, seed=seed)) for seed in (0, 1))
    path = tmp_path / "bundle.safetensors"
    bundle = bundle_with(backbone, right, path)
    assert admit(read_bundle(path), fresh(backbone, right)) == 0
    for extractors, problem in (
        ((), "its selector looks at alexnet:conv5, whose network is not loaded here"),
        ((wrong,), f"alexnet:conv5: made with weights {right.digest}, here are {wrong.digest}"),
    ):
        classifier = fresh(backbone, *extractors)
        with pytest.raises(BundleError) as caught:
            admit(bundle, classifier)
        assert caught.value.problems == [problem]
        assert caught.value.code == "wrong_backbone"
        assert classifier.selectors.tasks == ()


@pytest.mark.parametrize("extractors", [{}, {"stem:mean": "sha256:" + "0" * 64}])
def test_a_manifest_names_the_weights_behind_every_foreign_feature_and_no_other(
    extractors: dict[str, str], backbone: Backbone, tmp_path: Path
) -> None:
    path = tmp_path / "bundle.safetensors"
    bundle = bundle_with(backbone, load_alexnet(weights(tmp_path)), path)
    selector = bundle.manifest.selector.model_copy(update={"extractors": extractors})
    manifest = bundle.manifest.model_copy(update={"selector": selector})
    with pytest.raises(BundleError, match=r"extractors of \[.*\], but features \['alexnet:conv5'"):
        write_bundle(manifest, bundle.tensors, tmp_path / "other.safetensors")
