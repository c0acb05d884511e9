from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from medley.admission import admit
from medley.backbone import Backbone
from medley.bundle import Bundle, read_bundle
from medley.classifier import Ask, Classifier, logits
from medley.errors import BundleError, DataError
from medley.pool import Capacity
from medley.routed import RoutedModel
from tests.models import tiny_backbone
from tests.trainer.test_training import LABEL, SETTINGS, Watch
from tests.trainer.tiny import NoLargeFiles, pictures
from trainer.datasets import ImageSet, split
from trainer.freezing import Usage, frozen_experts, keep, measure_usage
from trainer.methods import FrozenExperts, MoeAdapter
from trainer.pixels import pixels_of
from trainer.run import learn
from trainer.settings import TrainSettings
from trainer.trunk import ImageTrunk, image_hidden

Learnt = tuple[list[Bundle], list[ImageSet], bytes]
COLOURS = ["red", "green", "blue", "yellow", "white", "black"]
CAPACITY = Capacity(paths=8, slots=64, experts=32, bottleneck=4, max_top_k=2)


def learnt(
    backbone: Backbone, folder: Path, index: int, after: list[Bundle], **changed: Any
) -> tuple[Bundle, ImageSet]:
    """One task of a sequence: two colours, one of them shared with the task before."""
    images = pictures([COLOURS[index], COLOURS[index + 1]], 12, seed=index)
    label = replace(LABEL, task=f"colours{index}")
    settings = replace(SETTINGS, iterations=8, **changed)
    outcome = learn(
        backbone, images, settings, label=label, folder=folder, after=after, watcher=Watch()
    )
    return outcome.bundle, images


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


@pytest.fixture(scope="module")
def sequence(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Learnt:
    """Five tasks, each after all before it; and the first one's file as it was on its first day."""
    folder = tmp_path_factory.mktemp("sequence")
    bundles: list[Bundle] = []
    sets = []
    first = b""
    for index in range(5):
        bundle, images = learnt(backbone, folder, index, bundles)
        bundles.append(bundle)
        sets.append(images)
        first = first or (folder / "colours0-1.safetensors").read_bytes()
    assert (folder / "colours0-1.safetensors").read_bytes() == first
    return bundles, sets, first


def answers(classifier: Classifier, path: int, bundle: Bundle, images: ImageSet) -> torch.Tensor:
    backbone = classifier.model.backbone
    pixels_BCHW = pixels_of(backbone, images, range(len(images)))
    routed = classifier.route(pixels_BCHW, [Ask(path)] * len(images))
    text_CE = bundle.tensors["class_text_features"]
    rows = [logits(row, text_CE, backbone.logit_scale) for row in routed.features_BE]
    return torch.cat([torch.stack(rows), routed.scores_BT[:, [routed.tasks.index(path)]]], 1)


def server(backbone: Backbone) -> Classifier:
    return Classifier(RoutedModel(backbone, first_expert_block=1, capacity=CAPACITY), buckets=(4,))


def test_the_first_task_answers_the_same_bits_after_five_were_learnt(
    backbone: Backbone, sequence: Learnt
) -> None:
    bundles, _, first = sequence
    test = pictures(COLOURS[:2], 10, seed=99)
    alone = server(backbone)
    before = answers(alone, admit(read_bundle(first), alone), bundles[0], test)
    crowded = server(backbone)
    paths = [admit(bundle, crowded) for bundle in bundles]
    assert torch.equal(answers(crowded, paths[0], bundles[0], test), before)


def test_reused_experts_keep_their_digest_and_their_bits(sequence: Learnt) -> None:
    bundles, _, _ = sequence
    older: dict[tuple[str, int, str], torch.Tensor] = {}
    reused = 0
    for bundle in bundles:
        for tower in ("vision", "text"):
            for block, experts in bundle.experts(tower).items():
                for i in range(experts.num_experts):
                    place = (tower, block, experts.digest(i))
                    reused += place in older
                    assert torch.equal(
                        older.setdefault(place, experts.up_ERD[i]), experts.up_ERD[i]
                    )
    assert reused > 0


def test_a_bundle_names_the_bundles_it_could_draw_on(sequence: Learnt) -> None:
    bundles, _, _ = sequence
    for index, bundle in enumerate(bundles):
        assert bundle.manifest.training.after == tuple(b.digest for b in bundles[:index])


def test_an_expert_of_several_bundles_is_offered_once(backbone: Backbone, sequence: Learnt) -> None:
    bundles, _, _ = sequence
    frozen = frozen_experts([*bundles, *bundles], backbone, SETTINGS)
    for experts in (*frozen.vision.values(), *frozen.text.values()):
        digests = [experts.digest(i) for i in range(experts.num_experts)]
        assert len(set(digests)) == len(digests)


def test_frozen_experts_do_not_move_while_a_new_task_learns(
    backbone: Backbone, sequence: Learnt, tmp_path: Path
) -> None:
    bundles, _, _ = sequence
    before = [{name: t.clone() for name, t in b.tensors.items()} for b in bundles]
    learnt(backbone, tmp_path, 4, bundles)
    for bundle, tensors in zip(bundles, before, strict=True):
        for name, tensor in bundle.tensors.items():
            assert torch.equal(tensor, tensors[name]), name


def random_learner(backbone: Backbone, settings: TrainSettings) -> MoeAdapter:
    learner = MoeAdapter(backbone, ["a red", "a green"], settings, FrozenExperts()).eval()
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.normal_(std=0.3)
    return learner


def trunk_of(learner: MoeAdapter, images: ImageSet) -> ImageTrunk:
    return ImageTrunk(learner.backbone, images, 1, learner.enter, augment=False, copies=0, seed=0)


def test_the_routed_model_computes_what_was_trained(backbone: Backbone) -> None:
    settings = replace(SETTINGS, freeze_mass=1.0)
    learner, images = random_learner(backbone, settings), pictures(COLOURS[:2], 8)
    usage = measure_usage(learner, trunk_of(learner, images), settings)
    experts = keep(learner, FrozenExperts(), usage, settings)
    model = RoutedModel(backbone, first_expert_block=1, capacity=CAPACITY)
    path = model.load(experts)
    pixels_BCHW = pixels_of(backbone, images, range(16))
    ours_BE = learner.image_features_of(image_hidden(backbone, pixels_BCHW, 1))
    paths_B = torch.full((16,), path)
    theirs_BE = model.encode_image(backbone.normalise(pixels_BCHW), paths_B)
    # Rounding the experts to bfloat16 costs 2^-9 a weight; random ones are worse than learnt ones.
    assert torch.cosine_similarity(ours_BE, theirs_BE).min() > 0.999
    theirs_CE = model.encode_text(backbone.tokenize(["a red", "a green"]), path)
    assert torch.cosine_similarity(learner.text_features()[0], theirs_CE).min() > 0.999


def test_usage_is_a_share_of_the_gates(backbone: Backbone) -> None:
    learner = random_learner(backbone, SETTINGS)
    usage = measure_usage(learner, trunk_of(learner, pictures(["red"], 9)), SETTINGS)
    assert usage["vision"].keys() == {1, 2}
    assert usage["text"].keys() == {0, 1}
    for shares in (*usage["vision"].values(), *usage["text"].values()):
        assert float(shares.sum()) == pytest.approx(1)
    # Token 0 of a causal text tower is the same in all prompts: all take the same top 2.
    assert all(int((shares > 0).sum()) == 2 for shares in usage["text"].values())


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (replace(SETTINGS, freeze_mass=0.5), [2]),
        (replace(SETTINGS, freeze_mass=0.9), [0, 2]),
        (replace(SETTINGS, freeze_mass=0.99), [0, 2, 3]),
        (replace(SETTINGS, freeze="count"), [1, 3]),
        (replace(SETTINGS, freeze="count", freeze_count=3), [0, 1, 3]),
    ],
)
def test_the_experts_that_carry_the_task_are_kept_with_their_router_columns(
    backbone: Backbone, settings: TrainSettings, kept: list[int]
) -> None:
    learner = random_learner(backbone, settings)
    share_E, counts_E = torch.tensor([0.3, 0.005, 0.6, 0.095]), torch.tensor([5.0, 9, 1, 7])
    for block in (1, 2):
        learner.vision[block].counts_E.copy_(counts_E)
    assert learner.text is not None
    text = {block: learner.text[block].counts_E.copy_(counts_E) for block in (0, 1)}
    usage: Usage = {"vision": dict.fromkeys((1, 2), share_E), "text": dict.fromkeys(text, share_E)}
    experts = keep(learner, FrozenExperts(), usage, settings)
    for tower, mixtures in ((experts.vision, learner.vision), (experts.text, learner.text)):
        for block, block_experts in tower.items():
            mixture = mixtures[block]
            assert torch.equal(block_experts.router_DE, mixture.router.gate_DE[:, kept])
            assert torch.equal(block_experts.up_ERD, mixture.up_ERD[kept].bfloat16())


def test_no_gradient_and_no_autoencoder_sees_a_held_out_image(
    backbone: Backbone, tmp_path: Path
) -> None:
    images = pictures(COLOURS[:2], 20)
    settings = replace(SETTINGS, iterations=8, hold_out=0.4)
    _, held_out = split(images, settings.hold_out, settings.seed)
    others = iter(pictures(COLOURS[:2], 20, seed=7).items)
    secret = {id(picture) for picture, _ in held_out.items}
    changed = replace(
        images,
        items=[
            (next(others)[0] if id(picture) in secret else picture, label)
            for picture, label in images.items
        ],
    )
    plain, other = (
        learn(
            backbone, data, settings, label=LABEL, folder=tmp_path / str(i), watcher=Watch()
        ).bundle
        for i, data in enumerate((images, changed))
    )
    assert plain.manifest.selector.calibration.method == "split conformal"
    assert plain.manifest.selector.threshold != other.manifest.selector.threshold
    for name, tensor in plain.tensors.items():
        if name.startswith(("vision.", "text.", "ddas.")):
            assert torch.equal(tensor, other.tensors[name]), name


def test_bundles_of_another_backbone_or_shape_are_refused_with_reasons(
    backbone: Backbone, sequence: Learnt
) -> None:
    bundles, _, _ = sequence
    with pytest.raises(BundleError, match="colours0 1 was learnt on another backbone"):
        frozen_experts(bundles[:1], tiny_backbone(seed=1), SETTINGS)
    with pytest.raises(BundleError, match="has bottleneck 4, this run 8"):
        frozen_experts(bundles[:1], backbone, replace(SETTINGS, bottleneck=8))


def test_a_full_disk_leaves_the_older_bundle_and_nothing_else(
    backbone: Backbone, tmp_path: Path, no_large_files: NoLargeFiles
) -> None:
    bundle, _ = learnt(backbone, tmp_path, 0, [])
    files = sorted(tmp_path.rglob("*"))
    full = pytest.raises((BundleError, DataError), match=r"cannot write .*: File too large")
    with no_large_files(), full:
        learnt(backbone, tmp_path, 0, [], seed=3)
    assert sorted(tmp_path.rglob("*")) == files
    assert read_bundle(tmp_path / "colours0-1.safetensors").digest == bundle.digest


def test_reports_and_plots_lie_in_a_folder_beside_the_bundle(
    backbone: Backbone, tmp_path: Path
) -> None:
    learnt(backbone, tmp_path, 0, [])
    files = {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()}
    reports = ("checkpoint.pt", "curves.png", "report.json", "report.md", "usage.png")
    assert files == {"colours0-1.safetensors", *(f"colours0-1/{name}" for name in reports)}
    assert "bottleneck" in (tmp_path / "colours0-1" / "report.md").read_text()


@pytest.mark.parametrize("field", ["task", "version", "licence"])
def test_a_name_that_a_bundle_cannot_have_is_refused_before_training(
    backbone: Backbone, tmp_path: Path, field: str
) -> None:
    label = replace(LABEL, **{field: "" if field == "licence" else "No Name!"})
    watch = Watch()
    with pytest.raises(DataError, match=field):
        learn(
            backbone,
            pictures(COLOURS[:2], 9),
            SETTINGS,
            label=label,
            folder=tmp_path,
            watcher=watch,
        )
    assert watch.started_at == -1


@pytest.mark.parametrize("selector", ["ddas", "gaussian", "class-gaussians", "prototype"])
def test_every_kind_of_selector_comes_back_from_its_bundle_and_knows_its_images(
    backbone: Backbone, tmp_path: Path, selector: str
) -> None:
    bundle, images = learnt(backbone, tmp_path, 0, [], selector=selector, hold_out=0.4)
    read = read_bundle(tmp_path / f"{bundle.manifest.task}-1.safetensors")
    model = RoutedModel(backbone, first_expert_block=1, capacity=CAPACITY)
    classifier = Classifier(model, buckets=(4,))
    path = admit(read, classifier)
    routed = classifier.route(pixels_of(backbone, images, range(8)), [Ask()] * 8)
    assert routed.paths.count(path) >= 6
    assert read.manifest.training.settings["selector"] == selector


def test_a_reference_that_the_backbone_does_not_have_is_asked_for_in_a_line(
    backbone: Backbone, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="needs a reference, and tiny has none"):
        learnt(backbone, tmp_path, 0, [], selector="gaussian+reference")
