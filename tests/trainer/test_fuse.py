"""Tasks learnt on their own, fused, and what a server makes of them; and what cannot be fused."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from medley.backbone import Backbone
from medley.bundle import Bundle, read_bundle
from medley.classifier import Ask
from medley.decoupled import deltas_of, trigger_of
from medley.errors import BundleError, DataError
from medley.fusion import Deltas, unify
from medley.unified import Unified, read_unified, unified_of
from tests.models import tiny_backbone
from tests.trainer.test_training import LABEL, Watch
from tests.trainer.tiny import NoLargeFiles, pictures
from trainer.datasets import ImageSet, few_shot
from trainer.evaluation import Case, evaluate, served
from trainer.export import BUCKET
from trainer.frozen import frozen_features
from trainer.fuse import Fused, Member, fuse, fused_version
from trainer.methods import FrozenExperts, Lora, make_learner
from trainer.methods.lora import shared_start
from trainer.pixels import pixels_of
from trainer.prototypes import class_prototypes
from trainer.run import Outcome, learn
from trainer.settings import Method, TrainSettings
from trainer.trunk import image_hidden

TASKS = {"warm": ("red", "yellow"), "cold": ("green", "blue"), "grey": ("white", "black")}
SETTINGS = TrainSettings(
    method="lora",
    iterations=16,
    batch_size=16,
    bottleneck=4,
    lr=2e-2,
    first_expert_block=1,
    alpha=0.2,
    hold_out=0.4,
    ddas_iterations=20,
)
FINETUNE = replace(SETTINGS, method="finetune", lr=2e-3)
KINDS: dict[Method, TrainSettings] = {"lora": SETTINGS, "finetune": FINETUNE}


@dataclass(frozen=True)
class Learnt:
    """Three tasks of one method, each in a folder of its own."""

    folder: Path
    outcomes: Mapping[str, Outcome]

    def members(self, *tasks: str) -> list[Member]:
        """All of them, or those that are named."""
        chosen = [self.outcomes[task] for task in tasks or TASKS]
        return [Member(outcome.bundle, outcome.unified) for outcome in chosen]


def learnt(
    backbone: Backbone, folder: Path, task: str, settings: TrainSettings = SETTINGS, **more: Any
) -> Outcome:
    label = replace(LABEL, task=task)
    images = pictures(TASKS[task], 20, seed=1)
    options: dict[str, Any] = {"watcher": Watch(), "label": label} | more
    return learn(backbone, images, settings, folder=folder / task, **options)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


def learnt_by(method: Method, backbone: Backbone, factory: pytest.TempPathFactory) -> Learnt:
    folder, settings = factory.mktemp(method), KINDS[method]
    return Learnt(folder, {task: learnt(backbone, folder, task, settings) for task in TASKS})


@pytest.fixture(scope="module")
def loras(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Learnt:
    """Three tasks of lora."""
    return learnt_by("lora", backbone, tmp_path_factory)


@pytest.fixture(scope="module")
def finetunes(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Learnt:
    """Three tasks of finetune."""
    return learnt_by("finetune", backbone, tmp_path_factory)


@pytest.fixture(params=["loras", "finetunes"])
def three(request: pytest.FixtureRequest) -> Learnt:
    """Three tasks of each method."""
    tasks = request.getfixturevalue(request.param)
    assert isinstance(tasks, Learnt)
    return tasks


@pytest.fixture(scope="module")
def fused(loras: Learnt, backbone: Backbone) -> Fused:
    """These three as one."""
    return fuse(loras.members(), backbone, loras.folder / "fused")


def told(backbone: Backbone, bundles: list[Bundle], unified: list[Unified]) -> dict[str, float]:
    """How well each task answers when it is named, as a server serves it."""
    classifier, paths = served(bundles, backbone, unified=unified)
    cases = [
        Case(name=task, task=task, test=pictures(TASKS[task], 10, seed=2)) for task in sorted(paths)
    ]
    scores = evaluate(classifier, paths, cases, alphas={}).scores
    return {score.name: score.told for score in scores if score.told is not None}


def l1(deltas: Deltas) -> float:
    return float(sum(tensor.double().abs().sum() for tensor in deltas.values()))


def test_a_task_is_learnt_into_a_bundle_and_its_unified_model(
    three: Learnt, backbone: Backbone
) -> None:
    for task, outcome in three.outcomes.items():
        assert outcome.unified is not None
        assert outcome.unified_path is not None
        bundle, unified = read_bundle(outcome.path), read_unified(outcome.unified_path)
        assert {f.name for f in outcome.path.parent.glob("*.safetensors")} == {
            outcome.path.name,
            outcome.unified_path.name,
        }
        fusion = bundle.manifest.fusion
        assert fusion is not None
        assert (fusion.unified, fusion.rescaler) == (unified.digest, 1.0)
        assert fusion.tasks == (f"{task}@1",)
        assert outcome.report["unified"]["size_bytes"] == outcome.unified_path.stat().st_size
        report = (outcome.path.with_suffix("") / "report.md").read_text()
        assert f"| unified model | {outcome.unified_path.name}, 0." in report
        assert outcome.report["metrics"]["held_out_accuracy"] > 0.9
        assert told(backbone, [bundle], [unified])[task] > 0.9


def test_the_server_computes_what_was_trained(three: Learnt, backbone: Backbone) -> None:
    """The delta in a fusion of one is exact, so only the order of float32 sums differs."""
    outcome = three.outcomes["warm"]
    settings = KINDS[outcome.bundle.manifest.method]
    learner = make_learner(backbone, ["a red"], settings, FrozenExperts())
    state = torch.load(outcome.path.with_suffix("") / "checkpoint.pt", weights_only=True)
    learner.load_state_dict(state["learner"])
    classifier, paths = served([outcome.bundle], backbone, unified=[outcome.unified])
    pixels_BCHW = pixels_of(backbone, pictures(TASKS["warm"], 4), range(8))
    ours_BE = learner.image_features_of(image_hidden(backbone, pixels_BCHW, 1))
    routed = classifier.route(pixels_BCHW, [Ask(paths["warm"])] * 8)
    torch.testing.assert_close(routed.features_BE, ours_BE, rtol=0, atol=1e-5)
    text_CE = learner.text_features_of(TASKS["warm"], ("a {}",))
    theirs_CE = outcome.bundle.tensors["class_text_features"]
    torch.testing.assert_close(theirs_CE, text_CE, rtol=0, atol=1e-5)


def test_fused_tasks_are_served_together_and_still_know_their_classes(
    three: Learnt, backbone: Backbone, tmp_path: Path
) -> None:
    done: list[int] = []
    fused = fuse(three.members(), backbone, tmp_path / "fused", on_task=done.append)
    assert done == [1, 1, 1]
    bundles = [read_bundle(path) for path in fused.paths]
    unified = read_unified(fused.unified_path)
    assert [b.manifest.task for b in bundles] == sorted(TASKS)
    assert {b.manifest.fusion.unified for b in bundles if b.manifest.fusion} == {unified.digest}
    assert min(told(backbone, bundles, [unified]).values()) > 0.8


def test_what_a_fusion_writes_is_the_arithmetic_of_the_paper(loras: Learnt, fused: Fused) -> None:
    given = [deltas_of(member.bundle, member.unified) for member in loras.members(*sorted(TASKS))]
    expected = unify(given)
    for name, tensor in expected.unified.items():
        assert torch.equal(fused.unified.deltas[name], tensor)
    for bundle, theirs in zip(fused.bundles, expected.triggers, strict=True):
        trigger = trigger_of(bundle, fused.unified)
        assert trigger.rescaler == theirs.rescaler
        assert all(torch.equal(trigger.masks[name], mask) for name, mask in theirs.masks.items())


def test_the_last_fusion_and_a_new_task_make_the_next_one(
    loras: Learnt, backbone: Backbone, tmp_path: Path
) -> None:
    """The paper's session: the old tasks are decoupled from the unified model they have left."""
    two = fuse(loras.members("warm", "cold"), backbone, tmp_path / "two")
    old = [Member(bundle, two.unified) for bundle in two.bundles]
    three = fuse([*old, *loras.members("grey")], backbone, tmp_path / "three")
    given = [deltas_of(m.bundle, m.unified) for m in [*old, *loras.members("grey")]]
    for name, tensor in unify(given).unified.items():
        assert torch.equal(three.unified.deltas[name], tensor)
    once = fuse(loras.members(), backbone, tmp_path / "once")
    exact = [deltas_of(member.bundle, member.unified) for member in loras.members(*sorted(TASKS))]
    lost = {
        kind: [_apart(deltas_of(b, f.unified), d) for b, d in zip(f.bundles, exact, strict=True)]
        for kind, f in (("again", three), ("once", once))
    }
    assert sum(lost["once"]) < sum(lost["again"])


def _apart(ours: Deltas, theirs: Deltas) -> float:
    return float(sum((ours[n] - theirs[n]).double().square().sum() for n in theirs))


def test_equal_members_in_any_order_give_equal_bytes(
    loras: Learnt, fused: Fused, backbone: Backbone, tmp_path: Path
) -> None:
    def bytes_of(folder: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    first = bytes_of(fused.unified_path.parent)
    assert {"report.json", "report.md", "signs.png"} < first.keys()
    for index, order in enumerate(permutations(loras.members())):
        if index in (3, 5):
            folder = tmp_path / str(index)
            fuse(order, backbone, folder)
            assert bytes_of(folder) == first


def test_rescalers_keep_the_l1_norm_or_what_the_paper_keeps(
    loras: Learnt, fused: Fused, backbone: Backbone, tmp_path: Path
) -> None:
    paper = fuse(loras.members(), backbone, tmp_path / "paper", rescale="paper")
    members = loras.members(*sorted(TASKS))
    for member, ours, theirs in zip(members, fused.bundles, paper.bundles, strict=True):
        given = l1(deltas_of(member.bundle, member.unified))
        assert l1(deltas_of(ours, fused.unified)) == pytest.approx(given, rel=1e-5)
        assert l1(deltas_of(theirs, paper.unified)) != pytest.approx(given, rel=1e-5)
        assert theirs.manifest.training.settings["rescale"] == "paper"
    assert fused.unified.digest == paper.unified.digest  # u does not depend on rescalers


def test_selector_prototypes_and_test_images_are_carried_over_and_answers_made_anew(
    loras: Learnt, fused: Fused
) -> None:
    for bundle in fused.bundles:
        before = loras.outcomes[bundle.manifest.task].bundle
        same = ["prototypes", "self_test.pixels", "self_test.scores"]
        same += [name for name in before.tensors if name.startswith("ddas.")]
        for name in same:
            assert torch.equal(bundle.tensors[name], before.tensors[name]), name
        for name in ("self_test.logits", "class_text_features"):
            assert not torch.equal(bundle.tensors[name], before.tensors[name]), name
        training = bundle.manifest.training
        assert training.settings["fused_from"] == before.digest
        assert training.metrics == {
            f"alone_{name}": value for name, value in before.manifest.training.metrics.items()
        }


def test_versions_say_how_many_tasks_and_which_unified_model(fused: Fused) -> None:
    short = fused.unified.digest.removeprefix("sha256:")[:6]
    assert {bundle.manifest.version for bundle in fused.bundles} == {f"1.f3-{short}"}
    assert fused_version(f"1.f3-{short}", 4, "sha256:00ff11") == "1.f4-00ff11"
    assert fused_version("2.final", 4, "sha256:00ff11") == "2.final.f4-00ff11"


def test_a_fusion_of_one_task_gives_it_back_exactly(
    loras: Learnt, fused: Fused, backbone: Backbone, tmp_path: Path
) -> None:
    warm = next(bundle for bundle in fused.bundles if bundle.manifest.task == "warm")
    alone = fuse([Member(warm, fused.unified)], backbone, tmp_path / "alone")
    before, after = deltas_of(warm, fused.unified), deltas_of(alone.bundles[0], alone.unified)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert (alone.report.tasks[0].rescaler, alone.report.tasks[0].relative_error) == (1.0, 0.0)


def test_the_report_says_what_was_kept_of_each_task(loras: Learnt, fused: Fused) -> None:
    report = json.loads((fused.unified_path.parent / "report.json").read_text())
    given = [deltas_of(member.bundle, member.unified) for member in loras.members(*sorted(TASKS))]
    for task, bundle, path, delta in zip(
        report["tasks"], fused.bundles, fused.paths, given, strict=True
    ):
        ours = deltas_of(bundle, fused.unified)
        length = sum(float(tensor.double().square().sum()) for tensor in delta.values())
        assert task["relative_error"] == pytest.approx((_apart(ours, delta) / length) ** 0.5)
        kept = sum(int(m.sum()) for m in trigger_of(bundle, fused.unified).masks.values())
        changed = sum(int((tensor != 0).sum()) for tensor in delta.values())
        assert task["kept"] == pytest.approx(kept / changed)
        assert 0.5 < task["kept"] < 1
        assert task["size_bytes"] == path.stat().st_size
    cold, grey = (
        torch.cat([delta[name].flatten() for name in sorted(delta)]).sign() for delta in given[:2]
    )
    both = (cold != 0) & (grey != 0)
    share = float((cold[both] == grey[both]).double().mean())
    assert report["agreement_TT"][0][1] == pytest.approx(share)
    assert [row[i] for i, row in enumerate(report["agreement_TT"])] == pytest.approx([1, 1, 1])
    assert "| warm | warm@1 |" in (fused.unified_path.parent / "report.md").read_text()


def test_tasks_of_any_seed_start_from_the_same_factors(backbone: Backbone) -> None:
    starts = []
    for seed in (0, 7):
        torch.manual_seed(seed)
        lora = make_learner(backbone, ["a red"], replace(SETTINGS, seed=seed), FrozenExperts())
        assert isinstance(lora, Lora)
        assert not any(tensor.any() for tensor in lora.deltas().values())
        starts.append(lora.start())
    assert starts[0].keys() == starts[1].keys()
    assert all(torch.equal(tensor, starts[1][name]) for name, tensor in starts[0].items())
    assert torch.equal(
        starts[0]["vision.1.fc.down"].float(), shared_start(backbone, "vision.1.fc", 4, 64)
    )
    others = (
        shared_start(tiny_backbone(seed=1), "vision.1.fc", 4, 64),
        shared_start(backbone, "vision.2.fc", 4, 64),
    )
    for other_RI in others:
        assert not torch.equal(starts[0]["vision.1.fc.down"].float(), other_RI)


def test_prototypes_lie_halfway_between_images_and_prompts(backbone: Backbone) -> None:
    image_NE = normalize(torch.randn(5, backbone.embed_dim), dim=1)
    labels_N = torch.tensor([0, 1, 0, 1, 1])
    names, templates = ("red", "blue"), ("a {}", "the {}")
    found_CE = class_prototypes(backbone, names, templates, image_NE=image_NE, labels_N=labels_N)
    for label, name in enumerate(names):
        tokens = backbone.tokenize([t.replace("{}", name) for t in templates])
        reads_E = backbone.model.encode_text(tokens, normalize=True).mean(0)
        looks_E = image_NE[labels_N == label].mean(0)
        torch.testing.assert_close(found_CE[label], normalize((looks_E + reads_E) / 2, dim=0))


@pytest.mark.parametrize("method", ["moe_adapter", "lora"])
def test_prototypes_in_a_bundle_are_of_the_shots_alone(
    backbone: Backbone, tmp_path: Path, method: Method
) -> None:
    images = pictures(TASKS["warm"], 12, seed=1)
    settings = replace(SETTINGS, method=method, iterations=2, shots=5)
    outcome = learn(backbone, images, settings, label=LABEL, folder=tmp_path, watcher=Watch())
    classifier, _ = served([outcome.bundle], backbone, unified=[outcome.unified], bucket=BUCKET)

    def prototypes(part: ImageSet) -> Tensor:
        return class_prototypes(
            backbone,
            part.class_names,
            part.templates,
            image_NE=frozen_features(classifier, part),
            labels_N=torch.from_numpy(part.labels.copy()),
        )

    found_CE = outcome.bundle.prototypes
    assert found_CE is not None
    torch.testing.assert_close(found_CE, prototypes(few_shot(images, 5, settings.seed)))
    assert not torch.allclose(found_CE, prototypes(images))


def test_what_does_not_belong_together_is_refused_with_reasons(
    loras: Learnt, backbone: Backbone, tmp_path: Path
) -> None:
    def of(settings: TrainSettings, base: Backbone = backbone) -> Member:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        outcome = learnt(base, folder, "warm", replace(settings, iterations=1))
        return Member(outcome.bundle, outcome.unified)

    cold = loras.members("cold")[0]
    two_blocks = replace(SETTINGS, first_expert_block=2)
    for other, said in (
        (of(replace(SETTINGS, bottleneck=8)), "warm@1 has rank 8, cold@1 has 4"),
        (of(FINETUNE), "warm@1 has method finetune, cold@1 has lora"),
        (of(two_blocks), "warm@1 has first_expert_block 2, cold@1 has 1"),
        (of(replace(SETTINGS, first_text_block=1)), "have not changed the same tensors"),
        (of(SETTINGS, tiny_backbone(seed=1)), "warm@1 was learnt on another backbone"),
        (of(replace(SETTINGS, method="moe_adapter")), "warm@1 was learnt by moe_adapter, which"),
        (loras.members("cold")[0], "2 bundles of the task cold"),
    ):
        with pytest.raises(BundleError, match=said) as refused:
            fuse([cold, other], backbone, tmp_path / "out")
        assert refused.value.code == "fusion"
    with pytest.raises(BundleError, match="there is no bundle to fuse"):
        fuse([], backbone, tmp_path / "out")
    start = {name: tensor + 1 for name, tensor in cold.unified.start.items()}  # type: ignore[union-attr]
    moved = Member(cold.bundle, Unified(cold.unified.manifest, cold.unified.deltas, start))  # type: ignore[union-attr]
    with pytest.raises(BundleError, match="did not start from the same factors"):
        fuse([moved, loras.members("warm")[0]], backbone, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_unified_model_or_none_is_refused(
    loras: Learnt, fused: Fused, backbone: Backbone, tmp_path: Path
) -> None:
    bundle = loras.outcomes["warm"].bundle
    with pytest.raises(BundleError, match="belongs to the unified model") as refused:
        fuse([Member(bundle, fused.unified)], backbone, tmp_path / "out")
    assert refused.value.code == "unified_mismatch"
    shutil.copy(loras.outcomes["warm"].path, tmp_path)
    with pytest.raises(BundleError, match="needs the unified model") as missing:
        unified_of(bundle.manifest, tmp_path)
    assert missing.value.code == "unified_missing"
    with pytest.raises(BundleError, match="needs the unified model"):
        served([bundle], backbone)


def test_a_folder_with_files_in_it_is_not_written_to(
    loras: Learnt, backbone: Backbone, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(DataError, match="is there already, and not an empty folder"):
            fuse(loras.members(), backbone, folder)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    fuse(loras.members("warm"), backbone, tmp_path / "empty")
    assert len(list((tmp_path / "empty").glob("*.safetensors"))) == 2


def test_what_is_interrupted_or_finds_the_disk_full_leaves_nothing(
    loras: Learnt, backbone: Backbone, tmp_path: Path, no_large_files: NoLargeFiles
) -> None:
    def pull_the_plug(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fuse(loras.members(), backbone, tmp_path / "out", on_task=pull_the_plug)
    with no_large_files(4096), pytest.raises(BundleError, match="cannot write unified-"):
        fuse(loras.members(), backbone, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_earlier_experts_are_of_no_use_to_a_method_without(
    loras: Learnt, backbone: Backbone, tmp_path: Path
) -> None:
    earlier = [loras.outcomes["warm"].bundle]
    with pytest.raises(DataError, match="lora cannot use experts of earlier tasks"):
        learnt(backbone, tmp_path, "cold", after=earlier)
    experts = replace(SETTINGS, method="moe_adapter")
    with pytest.raises(BundleError, match="warm 1 was learnt by lora and has no experts"):
        learnt(backbone, tmp_path, "cold", experts, after=earlier)
