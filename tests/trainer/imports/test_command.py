"""`medley import` as people meet it, on a small CLIP that open_clip is told about."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip import factory

from medley import cli
from medley.admission import admit
from medley.backbone import Backbone, load_backbone
from medley.bundle import Bundle, read_bundle
from medley.classifier import Ask, Classifier
from medley.extractor import load_alexnet
from medley.pool import Capacity
from medley.routed import ZERO_SHOT, RoutedModel
from tests.trainer.imports import authors
from tests.trainer.tiny import NoLargeFiles, folder_of, pictures

SMALL_CLIP = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 2},
}
ROOM = Capacity(paths=4, slots=4, experts=4, bottleneck=64, max_top_k=2)
TASKS = [
    {"task": "pets", "class_names": ["cat", "dog"], "templates": ["a photo of a {}."]},
    {"task": "cars", "class_names": ["van"], "templates": ["a {}.", "the {}."]},
    {"task": "food", "class_names": ["soup"], "templates": ["{}"]},
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a checkpoint of two learnt tasks, and open_clip knowing its architecture."""
    home = tmp_path_factory.mktemp("published")
    (home / "small-clip.json").write_text(json.dumps(SMALL_CLIP))
    plain = SMALL_CLIP | {"quick_gelu": False}
    (home / "small-clip-gelu.json").write_text(json.dumps(plain))
    paths, configs = list(factory._MODEL_CONFIG_PATHS), dict(factory._MODEL_CONFIGS)
    open_clip.add_model_config(home)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(open_clip.create_model("small-clip").state_dict(), home / "clip.pt")
    backbone = load_backbone("small-clip", weights=home / "clip.pt")
    authors.checkpoint(home / "cars.pth", backbone, tasks=3, learnt=2)
    (home / "tasks.json").write_text(json.dumps(TASKS))
    yield home
    factory._MODEL_CONFIG_PATHS[:] = paths
    factory._MODEL_CONFIGS.clear()
    factory._MODEL_CONFIGS.update(configs)


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever this machine's torchvision has in its cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))


def medley(monkeypatch: pytest.MonkeyPatch, home: Path, out: Path, *words: object) -> int:
    """Run the import; return the exit status."""
    given = ["--checkpoint", home / "cars.pth", "--tasks", home / "tasks.json", "--out", out]
    argv = ["medley", "import", "moe-adapters4cl", *given, *words]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


def bundles(out: Path) -> list[Bundle]:
    return [read_bundle(out / f"{task}-1.safetensors") for task in ("pets", "cars")]


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def own(home: Path) -> tuple[object, ...]:
    return ("--backbone", "small-clip", "--weights", home / "clip.pt")


def test_bundles_of_the_tasks_that_are_learnt(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert medley(monkeypatch, home, tmp_path, *own(home), "--licence", "CC-BY-4.0") == 0
    said = shown(capsys)
    assert "the checkpoint has not learnt food: left out" in said
    assert "MB, 2 classes); selector: none: imported without a selector" in said
    pets, cars = (bundle.manifest for bundle in bundles(tmp_path))
    assert pets.class_names == ("cat", "dog")
    assert cars.templates == ("a {}.", "the {}.")
    assert cars.training.settings == {
        "imported": "MoE-Adapters4CL",
        "checkpoint": "cars.pth",
        "router": 1,
    }
    assert (cars.licence, cars.top_k, cars.scale, cars.bottleneck) == ("CC-BY-4.0", 2, 0.1, 64)
    assert not (tmp_path / "food-1.safetensors").exists()


def test_the_clip_inside_the_checkpoint_serves_as_well_as_the_published_one(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--backbone-from-checkpoint", "--backbone", "small-clip")
    assert medley(monkeypatch, home, tmp_path, *words) == 0
    inside = load_backbone("small-clip", weights=tmp_path / "backbone.safetensors")
    assert inside.fingerprint == load_backbone("small-clip", weights=home / "clip.pt").fingerprint
    classifier = Classifier(RoutedModel(inside, capacity=ROOM))
    assert [admit(bundle, classifier) for bundle in bundles(tmp_path)] == [0, 1]


def route(backbone: Backbone, found: list[Bundle], weights: Path, seen: Path) -> list[int]:
    model = RoutedModel(backbone, capacity=ROOM, extractors=[load_alexnet(weights)])
    classifier = Classifier(model)
    for bundle in found:
        admit(bundle, classifier)
    images = pictures([seen.name], 4, seed=1)
    pixels = torch.stack([backbone.pixels(images.image(i)) for i in range(4)])
    return classifier.route(pixels, [Ask()] * 4).paths


def test_the_authors_selector_comes_along_where_alexnet_is_at_hand(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    authors.autochooser(tmp_path / "chooser.pth", [torch.full((256,), b) for b in (5.0, 0.0, 5.0)])
    chooser = ("--autochooser", tmp_path / "chooser.pth")
    assert medley(monkeypatch, home, tmp_path / "without", *own(home), *chooser) == 0
    assert "no AlexNet weights are at hand" in shown(capsys)
    assert bundles(tmp_path / "without")[0].manifest.selector.extractors == {}

    cached = tmp_path / "hub" / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    cached.parent.mkdir(parents=True)
    authors.alexnet(cached)
    assert medley(monkeypatch, home, tmp_path / "cached", *own(home), *chooser) == 0
    assert "reconstruction error at most 0.0655" in shown(capsys)
    named = ("--alexnet", cached, "--threshold", "0.06")
    assert medley(monkeypatch, home, tmp_path / "named", *own(home), *chooser, *named) == 0
    backbone = load_backbone("small-clip", weights=home / "clip.pt")
    for folder in ("cached", "named"):
        found = bundles(tmp_path / folder)
        assert route(backbone, found, cached, Path("red")) == [0] * 4  # features lie around 0.5


def test_imported_bundles_are_evaluated_with_the_network_they_need(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    authors.autochooser(tmp_path / "c.pth", [torch.full((256,), b) for b in (5.0, 0.0, 5.0)])
    authors.alexnet(tmp_path / "alexnet.pth")
    network = ("--alexnet", tmp_path / "alexnet.pth")
    words = (*own(home), "--autochooser", tmp_path / "c.pth", *network)
    assert medley(monkeypatch, home, tmp_path, *words) == 0
    data = folder_of(pictures(["red", "blue"], 3), tmp_path / "pets")
    for colour, name in (("red", "cat"), ("blue", "dog")):
        (data / colour).rename(data / name)
    bundle = tmp_path / "pets-1.safetensors"
    argv = ["medley", "evaluate", "--bundle", bundle, "--data", f"pets={data}", *own(home)]
    argv += ["--out", tmp_path / "evaluation"]
    for more, status in (((), 2), (network, 0)):
        monkeypatch.setattr(sys, "argv", list(map(str, [*argv, *more])))
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == status
    said = capsys.readouterr().err
    assert "its selector looks at alexnet:conv5, whose network is not loaded here" in said
    result = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert result["routing"] == {"columns": ["pets", "zero-shot"], "counts": [[6, 0]]}


def test_our_selector_is_fitted_on_images_that_are_given(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm = folder_of(pictures(["red", "yellow"], 30), tmp_path / "warm")
    assert medley(monkeypatch, home, tmp_path, *own(home), "--data", f"pets={warm}") == 0
    authors.alexnet(tmp_path / "alexnet.pth")
    backbone = load_backbone("small-clip", weights=home / "clip.pt")
    paths = route(backbone, bundles(tmp_path), tmp_path / "alexnet.pth", Path("red"))
    assert paths.count(0) >= 3
    assert set(paths) <= {0, ZERO_SHOT}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--tasks", "{out}/none.json"], "cannot read none.json: No such file or directory"),
        (["--checkpoint", "{home}/tasks.json"], "tasks.json holds something else than tensors, or"),
        (["--checkpoint", "{home}/clip.pt"], "clip.pt: it has no router_list, so it is not of MoE"),
        (["--data", "zoo={home}"], "--data zoo="),
        (["--root", "{home}/none"], "none/"),
        (["--version", "one two"], "version 'one two': String should match pattern"),
        (["--threshold", "0"], "threshold 0.0 is not a positive number"),
        (["--backbone", "medley-mini", "--weights", "{home}/none"], "none"),
        (["--backbone", "small-clip-gelu"], "was learnt with QuickGELU, which small-clip-gelu"),
        (["--backbone-from-checkpoint"], "--weights and --backbone-from-checkpoint exclude"),
        (["--out", "{home}/tasks.json/x"], "cannot write to"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    words: list[str],
    line: str,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [word.format(home=home, out=tmp_path) for word in words]
    assert medley(monkeypatch, home, tmp_path, *own(home), *words) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.startswith("medley: ")
    assert said.count("\n") == 1
    assert not list(tmp_path.glob("*.safetensors"))


def test_tasks_without_a_name_are_left_out(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "tasks.json").write_text(json.dumps(TASKS[:1]))
    assert medley(monkeypatch, home, tmp_path, *own(home), "--tasks", tmp_path / "tasks.json") == 0
    assert "the checkpoint has learnt 1 tasks more: left out" in shown(capsys)
    assert [path.name for path in tmp_path.glob("*-1.safetensors")] == ["pets-1.safetensors"]


def test_a_disk_that_is_full_leaves_no_half_file(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_large_files: NoLargeFiles,
) -> None:
    inside = ("--backbone-from-checkpoint", "--backbone", "small-clip")
    for words, line in ((inside, "backbone.safetensors: File"), (own(home), "cannot write pets-1")):
        with no_large_files():
            assert medley(monkeypatch, home, tmp_path / "out", *words) == 2
        assert line in capsys.readouterr().err
        assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("tasks", "problem"),
    [
        ("[", "tasks.json: Expecting value"),
        ("{}", "tasks.json: whole: Input should be a valid tuple"),
        ("[]", "tasks.json: whole: Tuple should have at least 1 item"),
        ([TASKS[0], TASKS[0]], "tasks.json: names must be unique"),
        ([TASKS[0] | {"task": "My Pets"}], "tasks.json: 0.task: String should match pattern"),
        ([TASKS[0] | {"class_names": ["cat", "cat"]}], "0.class_names: Value error, names must be"),
        ([TASKS[0] | {"templates": ["a photo"]}], "0.templates.0: Value error, a template has"),
        ([TASKS[0] | {"colour": "red"}], "0.colour: Extra inputs are not permitted"),
        ([{"task": "pets"}], "0.class_names: Field required"),
    ],
)
def test_a_list_of_tasks_that_cannot_be_used_is_refused(
    tasks: object,
    problem: str,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "tasks.json"
    file.write_text(tasks if isinstance(tasks, str) else json.dumps(tasks))
    assert medley(monkeypatch, home, tmp_path, *own(home), "--tasks", file) == 2
    said = capsys.readouterr().err
    assert problem in said
    assert said.count("\n") == 1


def test_without_a_list_the_tasks_are_those_of_mtil_in_the_order_that_was_learnt(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["medley", "import", "moe-adapters4cl", "--checkpoint", home / "cars.pth"]
    words += ["--out", tmp_path, "--order", "II", *own(home)]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    cars = read_bundle(tmp_path / "cars-1.safetensors").manifest
    food = read_bundle(tmp_path / "food-1.safetensors").manifest
    assert (len(cars.class_names), cars.training.settings["router"]) == (196, 0)
    assert (len(food.class_names), food.training.settings["router"]) == (101, 1)
