"""The authors' selector decides an image on its own as their code would a batch of one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medley.admission import admit
from medley.backbone import Backbone
from medley.bundle import read_bundle
from medley.classifier import Ask, Classifier
from medley.errors import BackboneError, BundleError, DataError
from medley.extractor import load_alexnet
from medley.pool import Capacity
from medley.routed import ZERO_SHOT, RoutedModel
from tests.golden_model import golden_backbone, golden_state_dict, load_golden
from tests.trainer.imports import authors
from tests.trainer.tiny import pictures
from trainer.imports.autochooser import read_autochooser
from trainer.imports.bundles import Source, write_bundles
from trainer.imports.checkpoint import read_checkpoint
from trainer.imports.tasks import TaskText

NUM_TASKS = 6
TASKS = tuple(
    TaskText(task=f"task{i}", class_names=("cat", "dog"), templates=("{}",))
    for i in range(NUM_TASKS)
)
ROOM = Capacity(paths=8, slots=6, experts=6, bottleneck=64, max_top_k=2)
WIDTH = 256  # of AlexNet's fifth convolution on 32 x 32 pixels


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_golden()


@pytest.fixture(scope="module")
def backbone(golden: dict[str, Tensor]) -> Backbone:
    return golden_backbone(golden)


def clouds(count: int, *, seed: int) -> Tensor:
    """uint8 images that differ a lot from each other."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=random)
    return (F.interpolate(coarse, (32, 32), mode="bilinear") * 255).to(torch.uint8)


def theirs(
    images_BCHW: Tensor,
    alexnet: dict[str, Tensor],
    chooser: dict[str, Tensor],
    limit: float,
    *,
    tasks: int = NUM_TASKS,
) -> tuple[list[int], list[Tensor]]:
    """The published rule in plain torch, one image at a time; answers tasks, -1 for none."""

    def feature(x: Tensor) -> Tensor:
        def conv(x: Tensor, n: int, **options: int) -> Tensor:
            weight, bias = (alexnet[f"features.{n}.{name}"] for name in ("weight", "bias"))
            return F.conv2d(x, weight, bias, **options)

        x = F.max_pool2d(F.relu(conv(x, 0, stride=4, padding=2)), 3, 2)
        x = F.max_pool2d(F.relu(conv(x, 3, padding=2)), 3, 2)
        x = F.relu(conv(x, 6, padding=1))
        x = F.relu(conv(x, 8, padding=1))
        return torch.sigmoid(conv(x, 10, padding=1).view(1, -1))

    def error(u: Tensor, number: int) -> Tensor:
        part = [
            chooser[f"{number}.{n}.0.{k}"]
            for n in ("encoder", "decoder")
            for k in ("weight", "bias")
        ]
        code = F.relu(F.linear(u, part[0], part[1]))
        return F.mse_loss(torch.sigmoid(F.linear(code, part[2], part[3])), u)

    decisions, all_errors = [], []
    for image in images_BCHW:
        u = feature(image[None])
        errors = torch.stack([error(u, number) for number in range(tasks + 1)])
        best = int(errors.argmin())
        decisions.append(-1 if errors[best] > limit else best - 1)
        all_errors.append(errors)
    return decisions, all_errors


@torch.inference_mode()
def test_every_image_goes_where_the_published_rule_sends_a_batch_of_one(
    golden: dict[str, Tensor], backbone: Backbone, tmp_path: Path
) -> None:
    weights = authors.alexnet(tmp_path / "alexnet.pth", gain=3)
    extractor = load_alexnet(tmp_path / "alexnet.pth")
    # Each autoencoder knows the pictures of one seed and nothing else.
    normalised = [backbone.normalise(clouds(3, seed=seed)) for seed in range(NUM_TASKS + 1)]
    biases = [extractor(images).mean(0).logit() for images in normalised]
    path = authors.autochooser(tmp_path / "chooser.pth", biases)
    torch.save({"state_dict": golden_state_dict(golden)}, tmp_path / "SUN397.pth")
    pixels = torch.cat([clouds(300, seed=100), *(clouds(3, seed=s) for s in range(NUM_TASKS + 1))])
    chooser = torch.load(path, weights_only=True)["state_dict"]
    _, errors = theirs(backbone.normalise(pixels), weights, chooser, 1.0)
    limit = float(torch.stack(errors).min(1).values.quantile(0.7))
    expected, _ = theirs(backbone.normalise(pixels), weights, chooser, limit)
    without_limit, _ = theirs(backbone.normalise(pixels), weights, chooser, 1.0)
    assert set(expected) == {-1, *range(NUM_TASKS)}
    assert without_limit.count(-1) > 10  # the reference wins
    assert expected.count(-1) > without_limit.count(-1) + 50  # and the threshold refuses

    source = Source(
        checkpoint=read_checkpoint(tmp_path / "SUN397.pth"),
        tasks=TASKS,
        autochooser=read_autochooser(path, tasks=NUM_TASKS, width=WIDTH),
        threshold=limit,
    )
    files = [
        tmp_path / f"{bundle.manifest.task}-1.safetensors"
        for bundle in write_bundles(source, backbone, tmp_path, extractors=[extractor])
    ]
    model = RoutedModel(backbone, capacity=ROOM, extractors=[extractor])
    classifier = Classifier(model, buckets=(4,))
    paths = {admit(read_bundle(file), classifier): task for task, file in enumerate(files)}
    ours = classifier.route(pixels, [Ask()] * len(pixels)).paths
    assert [-1 if path == ZERO_SHOT else paths[path] for path in ours] == expected


def test_a_bundle_says_which_rule_and_which_network_it_was_made_with(
    golden: dict[str, Tensor], backbone: Backbone, tmp_path: Path
) -> None:
    authors.alexnet(tmp_path / "alexnet.pth")
    extractor = load_alexnet(tmp_path / "alexnet.pth")
    path = authors.autochooser(tmp_path / "chooser.pth", [torch.zeros(WIDTH)] * 3)
    torch.save({"state_dict": golden_state_dict(golden)}, tmp_path / "SUN397.pth")
    source = Source(
        checkpoint=read_checkpoint(tmp_path / "SUN397.pth"),
        tasks=TASKS[:1],
        autochooser=read_autochooser(path, tasks=2, width=WIDTH),
        threshold=0.06,
    )
    (bundle,) = write_bundles(source, backbone, tmp_path, extractors=[extractor])
    selector = bundle.manifest.selector
    assert selector.extractors == {"alexnet:conv5": extractor.digest}
    assert selector.threshold == pytest.approx(torch.tensor(0.06).log().item())
    assert selector.calibration.method == (
        "MoE-Adapters4CL: reconstruction error at most 0.06 and less than the reference"
    )
    with pytest.raises(BundleError, match="looks at alexnet:conv5, whose network is not loaded"):
        admit(bundle, Classifier(RoutedModel(backbone, capacity=ROOM)))


def test_with_images_it_is_measured_how_many_the_authors_rule_refuses(
    golden: dict[str, Tensor], backbone: Backbone, tmp_path: Path
) -> None:
    weights = authors.alexnet(tmp_path / "alexnet.pth", gain=3)
    extractor = load_alexnet(tmp_path / "alexnet.pth")
    images = pictures(["red", "blue"], 20)
    pixels = torch.stack([backbone.pixels(images.image(i)) for i in range(40)])
    normalised = backbone.normalise(pixels)
    with torch.inference_mode():
        biases = [extractor(normalised[i : i + 20]).mean(0).logit() for i in (20, 0)]
    path = authors.autochooser(tmp_path / "chooser.pth", biases)
    torch.save({"state_dict": golden_state_dict(golden)}, tmp_path / "SUN397.pth")
    source = Source(
        checkpoint=read_checkpoint(tmp_path / "SUN397.pth"),
        tasks=TASKS[:1],
        autochooser=read_autochooser(path, tasks=1, width=WIDTH),
        threshold=1.0,
        images={"task0": images},
    )
    (bundle,) = write_bundles(source, backbone, tmp_path, extractors=[extractor])
    chooser = torch.load(path, weights_only=True)["state_dict"]
    decisions, _ = theirs(normalised, weights, chooser, 1.0, tasks=1)
    calibration = bundle.manifest.selector.calibration
    assert calibration.images == 40
    assert calibration.false_reject_rate == pytest.approx(decisions.count(-1) / 40)
    assert 0.3 < calibration.false_reject_rate < 0.7


def test_too_few_autoencoders_for_the_tasks_are_refused(tmp_path: Path) -> None:
    path = authors.autochooser(tmp_path / "c.pth", [torch.zeros(WIDTH)] * 5)
    with pytest.raises(BundleError, match=r"^c.pth: 5 autoencoders, 6 tasks .* need 7$") as caught:
        read_autochooser(path, tasks=6, width=WIDTH)
    assert caught.value.code == "checkpoint"
    assert len(read_autochooser(path, tasks=4, width=WIDTH).levels) == 4


def test_autoencoders_of_another_feature_are_refused(tmp_path: Path) -> None:
    path = authors.autochooser(tmp_path / "c.pth", [torch.zeros(WIDTH)] * 2)
    with pytest.raises(BundleError, match=r"0.encoder.0.weight has shape \(100, 256\), expected"):
        read_autochooser(path, tasks=1, width=43_264)
    torch.save({"state_dict": {"a": torch.zeros(1), "b": torch.zeros(1)}}, tmp_path / "x.pth")
    with pytest.raises(BundleError, match=r"^x.pth: 0.encoder.0.weight is missing, expected"):
        read_autochooser(tmp_path / "x.pth", tasks=1, width=WIDTH)
    with pytest.raises(BackboneError, match=r"^no.pth cannot be read"):
        read_autochooser(tmp_path / "no.pth", tasks=1, width=WIDTH)


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan"), float("inf")])
def test_a_threshold_that_is_none_is_refused(
    threshold: float, golden: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save({"state_dict": golden_state_dict(golden)}, tmp_path / "SUN397.pth")
    published = read_checkpoint(tmp_path / "SUN397.pth")
    with pytest.raises(DataError, match=r"threshold .* is not a positive number"):
        Source(checkpoint=published, tasks=TASKS, threshold=threshold)
