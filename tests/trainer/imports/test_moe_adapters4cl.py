"""A checkpoint in the authors' format becomes bundles that compute what the reference computes."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medley.admission import admit
from medley.backbone import Backbone, wrap
from medley.bundle import read_bundle
from medley.classifier import Ask, Classifier
from medley.errors import BackboneError, BundleError
from medley.pool import Capacity
from medley.routed import ZERO_SHOT, RoutedModel
from tests.golden_model import close, golden_backbone, golden_state_dict, load_golden
from tests.trainer.imports import authors
from tests.trainer.tiny import pictures
from trainer.imports.bundles import Source, write_bundles
from trainer.imports.checkpoint import read_checkpoint
from trainer.imports.tasks import TaskText

TASKS = tuple(
    TaskText(task=f"task{i}", class_names=tuple("abcdefghi"), templates=("{}",)) for i in range(6)
)
ROOM = Capacity(paths=8, slots=6, experts=6, bottleneck=64, max_top_k=2)

State = dict[str, Any]


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_golden()


@pytest.fixture(scope="module")
def backbone(golden: dict[str, Tensor]) -> Backbone:
    return golden_backbone(golden)


@pytest.fixture(scope="module")
def folder(
    golden: dict[str, Tensor], backbone: Backbone, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Bundles of the first six tasks, imported from a checkpoint."""
    folder = tmp_path_factory.mktemp("bundles")
    path = saved(golden_state_dict(golden), folder)
    source = Source(checkpoint=read_checkpoint(path), tasks=TASKS)
    assert len(list(write_bundles(source, backbone, folder))) == 6
    return folder


@pytest.fixture(scope="module")
def served(folder: Path, backbone: Backbone) -> tuple[Classifier, dict[str, int]]:
    """Three of the bundles, each through its file, its seal and its self-test."""
    classifier = Classifier(RoutedModel(backbone, capacity=ROOM), buckets=(4,))
    paths = {"zero_shot": ZERO_SHOT}
    for name in ("task5", "task0", "task1"):
        paths[name] = admit(read_bundle(folder / f"{name}-1.safetensors"), classifier)
    return classifier, paths


def saved(state_dict: State, folder: Path, *, prefix: str = "") -> Path:
    """Save as the authors do."""
    path = folder / "SUN397.pth"
    torch.save({"state_dict": {prefix + k: v for k, v in state_dict.items()}}, path)
    return path


@pytest.mark.parametrize("name", ["zero_shot", "task0", "task1", "task5"])
def test_an_admitted_bundle_gives_the_features_and_logits_of_the_reference(
    name: str, served: tuple[Classifier, dict[str, int]], golden: dict[str, Tensor]
) -> None:
    model, path = served[0].model, served[1][name]
    with torch.inference_mode():
        image = model.encode_image(golden["input.images"], torch.full((7,), path))
        text = model.encode_text(golden["input.text"], path)
    close(image, golden[f"output.{name}.image_features"])
    close(text, golden[f"output.{name}.text_features"])
    close(
        100 * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T,
        golden[f"output.{name}.logits"],
    )


def test_one_batch_may_mix_imported_tasks_and_zero_shot(
    served: tuple[Classifier, dict[str, int]], golden: dict[str, Tensor]
) -> None:
    classifier, paths = served
    names = ["task5", "zero_shot", "task0", "task1", "task0", "zero_shot", "task5"]
    with torch.inference_mode():
        ours = classifier.model.encode_image(
            golden["input.images"], torch.tensor([paths[name] for name in names])
        )
    theirs = [golden[f"output.{name}.image_features"][i] for i, name in enumerate(names)]
    close(ours, torch.stack(theirs))


def test_the_class_text_features_in_a_bundle_are_those_of_the_text_experts(
    folder: Path, golden: dict[str, Tensor]
) -> None:
    for name in ("task0", "task5"):
        bundle = read_bundle(folder / f"{name}-1.safetensors")
        expected = F.normalize(golden[f"output.{name}.text_features"], dim=-1)
        close(bundle.tensors["class_text_features"], expected)


def test_bundles_share_every_expert(
    folder: Path, served: tuple[Classifier, dict[str, int]]
) -> None:
    one, other = (read_bundle(folder / f"task{i}-1.safetensors").manifest for i in (0, 4))
    assert one.vision == other.vision
    assert one.text == other.text
    assert served[0].model._vision.free_slots == 0  # six slots hold the experts of three tasks


def test_weights_saved_inside_dataparallel_and_without_the_outer_dict_are_read_too(
    golden: dict[str, Tensor], tmp_path: Path
) -> None:
    plain = read_checkpoint(saved(golden_state_dict(golden), tmp_path))
    wrapped = read_checkpoint(saved(golden_state_dict(golden), tmp_path, prefix="module."))
    torch.save(golden_state_dict(golden), tmp_path / "bare.pth")
    bare = read_checkpoint(tmp_path / "bare.pth")
    assert plain.tensors.keys() == wrapped.tensors.keys() == bare.tensors.keys()
    assert plain.learnt() == wrapped.learnt() == bare.learnt() == 11


def test_without_a_selector_no_image_is_given_to_a_task_and_it_answers_when_told(
    served: tuple[Classifier, dict[str, int]], folder: Path
) -> None:
    classifier, paths = served
    pixels = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8)
    assert set(classifier.route(pixels, [Ask()] * 40).paths) == {ZERO_SHOT}
    assert classifier.route(pixels[:1], [Ask(paths["task1"])]).paths == [paths["task1"]]
    calibration = read_bundle(folder / "task1-1.safetensors").manifest.selector.calibration
    assert calibration.method == "none: imported without a selector, answers only when told"
    assert calibration.false_reject_rate == 1


def test_with_images_of_a_task_our_own_selector_is_fitted_on_them(
    golden: dict[str, Tensor], backbone: Backbone, tmp_path: Path
) -> None:
    reds = pictures(["red"], 60)
    source = Source(
        checkpoint=read_checkpoint(saved(golden_state_dict(golden), tmp_path)),
        tasks=TASKS[:2],
        images={"task1": reds},
    )
    told, routed = write_bundles(source, backbone, tmp_path)
    assert told.manifest.selector.calibration.images == 0
    assert routed.manifest.selector.calibration.images == 60
    assert routed.manifest.selector.calibration.false_reject_rate <= 0.05
    classifier = Classifier(RoutedModel(backbone, capacity=ROOM))
    path = admit(routed, classifier)
    near = torch.stack([backbone.pixels(pictures(["red"], 20, seed=1).image(i)) for i in range(20)])
    far = torch.stack([backbone.pixels(pictures(["blue"], 20).image(i)) for i in range(20)])
    assert classifier.route(near, [Ask()] * 20).paths.count(path) >= 18
    assert classifier.route(far, [Ask()] * 20).paths.count(path) == 0


def test_equal_checkpoints_give_equal_bundles(
    golden: dict[str, Tensor], backbone: Backbone, folder: Path, tmp_path: Path
) -> None:
    path = saved(golden_state_dict(golden), tmp_path)
    source = Source(checkpoint=read_checkpoint(path), tasks=TASKS[:1])
    (again,) = write_bundles(source, backbone, tmp_path)
    assert again.digest == read_bundle(folder / "task0-1.safetensors").digest


def test_a_task_that_was_not_learnt_yet_is_not_imported(
    golden: dict[str, Tensor], backbone: Backbone, tmp_path: Path
) -> None:
    state = golden_state_dict(golden)
    for name in state:
        if name.endswith(tuple(f"router_list.{t}" for t in range(2, 11))):
            state[name] = torch.zeros_like(state[name])
    checkpoint = read_checkpoint(saved(state, tmp_path))
    assert checkpoint.learnt() == 2
    bundles = list(write_bundles(Source(checkpoint=checkpoint, tasks=TASKS), backbone, tmp_path))
    assert [bundle.manifest.task for bundle in bundles] == ["task0", "task1"]


def test_a_text_tower_that_was_trained_without_experts_stays_untouched(
    golden: dict[str, Tensor], backbone: Backbone, tmp_path: Path
) -> None:
    marks = ("adaptmlp", "router_list", "w_noise_list")
    state = {
        name: tensor
        for name, tensor in golden_state_dict(golden).items()
        if name.startswith("visual.") or not any(mark in name for mark in marks)
    }
    source = Source(checkpoint=read_checkpoint(saved(state, tmp_path)), tasks=TASKS[:1])
    (bundle,) = write_bundles(source, backbone, tmp_path)
    assert bundle.manifest.text.blocks == {}
    expected = F.normalize(golden["output.zero_shot.text_features"], dim=-1)
    close(bundle.tensors["class_text_features"], expected)


class Harm:
    """What a malicious file would run."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (Path("harm"),)


def test_a_file_that_would_run_code_is_refused_and_runs_none(
    golden: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved(golden_state_dict(golden) | {"harm": Harm()}, tmp_path)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Harm(), protocol=2))
    for file in (path, tmp_path / "plain.pth"):
        with pytest.raises(BackboneError, match=r"holds something else than tensors") as caught:
            read_checkpoint(file)
        assert caught.value.code == "weights"
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_file_that_was_cut_short_is_refused_in_one_line(
    share: float, golden: dict[str, Tensor], tmp_path: Path
) -> None:
    path = saved(golden_state_dict(golden), tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(BackboneError, match=r"^SUN397.pth .*damaged") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([1, 2], "is no state dict"),
        ({}, "is no state dict"),
        ({"state_dict": {"epoch": 3}}, "holds something else than tensors: 'epoch'"),
        ({"w": torch.zeros(3, device="meta")}, "holds something else than tensors: 'w'"),
    ],
)
def test_a_file_of_something_else_is_refused(content: Any, problem: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(BackboneError, match=f"x.pth {problem}"):
        read_checkpoint(tmp_path / "x.pth")
    with pytest.raises(BackboneError, match=r"missing.pth cannot be read: No such file"):
        read_checkpoint(tmp_path / "missing.pth")


BLOCK = "visual.transformer.resblocks.1"


def shortened(state: State) -> None:
    state[f"{BLOCK}.adaptmlp_list.3.up_proj.weight"] = torch.zeros(128, 63)


def without(*names: str) -> Callable[[State], None]:
    def remove(state: State) -> None:
        for name in names:
            del state[name]

    return remove


def not_finite(state: State) -> None:
    state[f"{BLOCK}.adaptmlp_list.2.down_proj.bias"] = torch.full((64,), torch.nan)


def untrained_in_between(state: State) -> None:
    for name in state:
        if name.endswith("router_list.3"):
            state[name] = torch.zeros_like(state[name])


def numbered_wildly(state: State) -> None:
    for name in [name for name in state if name.startswith(f"{BLOCK}.adaptmlp_list.4.")]:
        state[name.replace("list.4.", "list.999999999999.")] = state.pop(name)


def without_image_experts(state: State) -> None:
    for name in [name for name in state if name.startswith("visual.") and "adaptmlp" in name]:
        del state[name]


def class_incremental(state: State) -> None:
    for name in [name for name in state if "router_list" in name]:
        router = state.pop(name)
        state[f"{name.partition('.router_list')[0]}.router1"] = router


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (shortened, r"adaptmlp_list.3.up_proj.weight has shape \(128, 63\), expected \(128, 64\)"),
        (without(f"{BLOCK}.router_list.4"), r"resblocks.1.router_list.4 is missing$"),
        (
            without(*(f"{BLOCK}.adaptmlp_list.2.{n}_proj.bias" for n in ("down", "up"))),
            r"adaptmlp_list.2.down_proj.bias is missing, and 1 more problem",
        ),
        (numbered_wildly, r"resblocks.1.adaptmlp_list.4.down_proj.weight is missing, and"),
        (without_image_experts, r"resblocks.0.adaptmlp_list.0.down_proj.weight is missing, and 44"),
        (not_finite, r"adaptmlp_list.2.down_proj.bias has values that are not finite"),
        (untrained_in_between, r"the routers of tasks \[0, 1, 2, 4, .*, 10\] are trained"),
        (class_incremental, r"it is of class-incremental learning"),
    ],
)
def test_a_checkpoint_that_lacks_something_is_refused_and_says_what(
    harm: Callable[[State], None],
    problem: str,
    golden: dict[str, Tensor],
    backbone: Backbone,
    tmp_path: Path,
) -> None:
    state = golden_state_dict(golden)
    harm(state)
    source = Source(checkpoint=read_checkpoint(saved(state, tmp_path)), tasks=TASKS)
    with pytest.raises(BundleError, match=rf"^SUN397.pth: .*{problem}") as caught:
        list(write_bundles(source, backbone, tmp_path))
    assert caught.value.code == "checkpoint"
    assert list(tmp_path.iterdir()) == [tmp_path / "SUN397.pth"]


@pytest.mark.slow  # 1.5 GB of files and 4 GB of memory
def test_a_checkpoint_of_the_published_size_fits_a_server_with_default_settings(
    tmp_path: Path,
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = open_clip.create_model("ViT-B-16-quickgelu", load_weights=False)
    backbone = wrap(clip, name="b16", tokenizer=open_clip.get_tokenizer("ViT-B-16-quickgelu"))
    path = authors.checkpoint(tmp_path / "SUN397.pth", backbone, tasks=11, learnt=2, E=22)
    source = Source(checkpoint=read_checkpoint(path), tasks=TASKS)
    files = [
        tmp_path / f"{bundle.manifest.task}-1.safetensors"
        for bundle in write_bundles(source, backbone, tmp_path)
    ]
    assert [176e6 < file.stat().st_size < 177e6 for file in files] == [True, True]
    classifier = Classifier(RoutedModel(backbone))
    assert [admit(read_bundle(file), classifier) for file in files] == [0, 1]
    assert classifier.model._vision.free_slots == 128 - 22


def test_a_plain_clip_is_no_checkpoint(
    golden: dict[str, Tensor], backbone: Backbone, tmp_path: Path
) -> None:
    path = saved(backbone.model.state_dict(), tmp_path)
    with pytest.raises(BundleError, match="it has no router_list, so it is not of MoE-Adapters4CL"):
        list(write_bundles(Source(checkpoint=read_checkpoint(path), tasks=TASKS), backbone, path))


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("visual.proj", lambda t: t + 0.01, r"visual.proj differs by 0.01$"),
        ("visual.proj", lambda t: t[:, :40], r"visual.proj has shape \(128, 40\), the backbone"),
        ("ln_final.bias", lambda t: t + 1, r"ln_final.bias differs by 1"),
    ],
)
def test_the_checkpoint_of_another_backbone_is_refused_by_the_tensor_that_differs(
    name: str,
    change: Callable[[Tensor], Tensor],
    problem: str,
    golden: dict[str, Tensor],
    backbone: Backbone,
    tmp_path: Path,
) -> None:
    state = golden_state_dict(golden)
    state[name] = change(state[name])
    source = Source(checkpoint=read_checkpoint(saved(state, tmp_path)), tasks=TASKS)
    with pytest.raises(BackboneError, match=problem) as caught:
        list(write_bundles(source, backbone, tmp_path))
    assert caught.value.code == "wrong_backbone"


def test_a_frozen_part_that_went_through_half_precision_is_the_same_backbone(
    golden: dict[str, Tensor], backbone: Backbone, tmp_path: Path
) -> None:
    frozen = backbone.model.state_dict().keys()
    state = {
        name: tensor.half().float() if name in frozen else tensor
        for name, tensor in golden_state_dict(golden).items()
    }
    read_checkpoint(saved(state, tmp_path)).check_backbone(backbone)


def test_the_same_weights_under_another_activation_are_refused(
    golden: dict[str, Tensor], tmp_path: Path
) -> None:
    checkpoint = read_checkpoint(saved(golden_state_dict(golden), tmp_path))
    with pytest.raises(BackboneError, match=r"learnt with QuickGELU, which golden does not have"):
        checkpoint.check_backbone(golden_backbone(golden, quick_gelu=False))
