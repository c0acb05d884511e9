import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from medley.backbone import Backbone
from medley.bundle import read_bundle
from medley.classifier import Ask
from medley.errors import DataError
from medley.prompts import class_text_features
from medley.routed import ZERO_SHOT
from medley.unified import unified_of
from tests.models import tiny_backbone
from tests.trainer.bench.course import COLOURS, KILLED_METHODS, PLAN, SUITE, bench
from tests.trainer.tiny import NoLargeFiles, pictures
from trainer.bench.metrics import sequential
from trainer.bench.record import Record, Row
from trainer.evaluation import Case, evaluate, served
from trainer.suites import Suite

TASKS = tuple(COLOURS)
SERVED = ("moe_adapter", "condu-lora", "condu-finetune")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


@pytest.fixture(scope="module")
def finished(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, Path]:
    folder = tmp_path_factory.mktemp("bench")
    (record,) = bench(backbone, folder)
    return record, folder / "run"


def row(record: Record, method: str, router: str, protocol: str) -> Row:
    (found,) = (
        r for r in record.rows if (r.method, r.router, r.protocol) == (method, router, protocol)
    )
    return found


def numbers(record: Record) -> tuple[object, ...]:
    """All that must not depend on when a run was interrupted; time and memory may."""
    parameters = [
        (c.method, c.task, c.trained_parameters, c.stored_parameters, c.active_parameters)
        for c in record.costs
        if c.method in KILLED_METHODS
    ]
    rows = [one for one in record.rows if one.method.startswith(KILLED_METHODS)]
    return rows, record.routings, record.scores, parameters


def test_bundles_forget_nothing_under_any_router_and_protocol(
    finished: tuple[Record, Path],
) -> None:
    told = row(finished[0], "moe_adapter", "told", "told")
    assert sequential(told.accuracy_TT).forgetting_T == (0.0, 0.0, 0.0)


def test_before_its_turn_a_told_task_gets_what_zero_shot_says(
    finished: tuple[Record, Path],
) -> None:
    zero_shot = row(finished[0], "zero-shot", "none", "agnostic").accuracy_TT
    for method in ("moe_adapter", "lora", "linear-probe"):
        told = row(finished[0], method, "told", "told").accuracy_TT
        for i in range(len(TASKS)):
            assert told[i][i + 1 :] == zero_shot[i][i + 1 :]


def test_shuffled_batches_of_all_data_sets_change_no_feature(
    finished: tuple[Record, Path],
) -> None:
    none = {"images": 60, "features_that_differ": 0}
    assert finished[0].settings["mixed_batches"] == dict.fromkeys(SERVED, none)


def test_the_last_row_is_what_medley_evaluate_measures(
    backbone: Backbone, finished: tuple[Record, Path]
) -> None:
    record, folder = finished
    bundles = [
        read_bundle(folder / "seed0" / "moe_adapter" / f"{task}-1.safetensors") for task in TASKS
    ]
    classifier, paths = served(bundles, backbone)
    cases = [Case(name=task, task=task, test=SUITE.load(task, "test")) for task in TASKS]
    measured = evaluate(classifier, paths, cases, alphas=dict.fromkeys(TASKS))
    told = row(record, "moe_adapter", "told", "told").accuracy_TT[-1]
    agnostic = row(record, "moe_adapter", "ddas", "agnostic").accuracy_TT[-1]
    assert told == tuple(score.told for score in measured.scores)
    assert agnostic == tuple(score.agnostic for score in measured.scores)
    ddas = next(r for r in record.routings if r.router == "ddas")
    assert ddas.counts == tuple(map(tuple, measured.confusion.tolist()))


def test_a_request_that_brings_its_labels_is_never_answered_by_another_task(
    finished: tuple[Record, Path],
) -> None:
    zero_shot = row(finished[0], "zero-shot", "none", "agnostic").accuracy_TT[0]
    labelled = row(finished[0], "moe_adapter", "ddas+labels", "agnostic").accuracy_TT
    assert labelled[0][1:] == zero_shot[1:]
    assert labelled[1][2:] == zero_shot[2:]


@pytest.mark.parametrize("method", SERVED)
def test_a_class_list_names_a_learnt_task_and_leaves_all_others_to_the_neighbours(
    finished: tuple[Record, Path], method: str
) -> None:
    labelled = row(finished[0], method, "labels+aggregate", "agnostic").accuracy_TT
    told = row(finished[0], method, "told", "told").accuracy_TT
    everyone = row(finished[0], method, "aggregate", "agnostic").accuracy_TT
    for i in range(len(TASKS)):
        assert labelled[i] == (*told[i][: i + 1], *everyone[i][i + 1 :])


def test_neighbours_answer_as_they_do_when_they_are_served(
    backbone: Backbone, finished: tuple[Record, Path]
) -> None:
    record, folder = finished
    files = sorted((folder / "seed0" / "condu-lora" / "session-3").glob("*-1.f3-*.safetensors"))
    bundles = [read_bundle(file) for file in files]
    unified = unified_of(bundles[0].manifest, files[0].parent)
    classifier, paths = served(bundles, backbone, unified=[unified])
    ask = Ask(eligible=frozenset(), nearest=len(TASKS))
    for place, task in enumerate(TASKS):
        images = SUITE.load(task, "test")
        texts = {
            path: class_text_features(classifier.model, images.class_names, images.templates, path)
            for path in (ZERO_SHOT, *paths.values())
        }
        pixels = torch.stack([backbone.pixels(images.image(i)) for i in range(len(images))])
        routed = classifier.route(pixels, [ask] * len(images))
        hits = 0
        for label, own_E, others in zip(
            images.labels, routed.features_BE, routed.others, strict=True
        ):
            assert {other.path for other in others} == set(paths.values())
            said = [texts[ZERO_SHOT] @ own_E, *(texts[o.path] @ o.features_E for o in others)]
            hits += int(torch.stack(said).mean(0).argmax()) == label
        last = row(record, "condu-lora", "aggregate", "agnostic").accuracy_TT[-1]
        assert last[place] == hits / len(images)


def test_a_task_that_is_not_fused_is_as_good_as_it_was_learnt(
    finished: tuple[Record, Path],
) -> None:
    alone = row(finished[0], "condu-lora-alone", "told", "told").accuracy_TT
    assert alone == row(finished[0], "lora", "told", "told").accuracy_TT
    for variant in ("condu-lora", "condu-lora-once"):  # the first session has nothing to fuse
        assert row(finished[0], variant, "told", "told").accuracy_TT[0] == alone[0]


def test_a_fusion_costs_what_its_files_and_its_time_say(finished: tuple[Record, Path]) -> None:
    record, folder = finished
    for method in ("condu-lora", "condu-finetune"):
        costs = [cost for cost in record.costs if cost.method == method]
        assert [cost.fuse_cpu_seconds > 0 for cost in costs] == [False, True, True]
        (unified,) = (folder / "seed0" / method / "session-3").glob("unified-*")
        size = unified.stat().st_size  # they differ by the names of the tasks in them
        assert all(abs(cost.shared_bytes - size) < 500 for cost in costs)
        assert all(0 < cost.bundle_bytes < cost.shared_bytes for cost in costs)


def test_every_file_that_people_want_is_there(finished: tuple[Record, Path]) -> None:
    _, folder = finished
    assert (folder / "report.md").read_text().startswith("#")
    assert list(folder.glob("matrix-*.png"))
    assert list(folder.glob("routing-*.png"))


def test_a_finished_run_is_read_and_not_done_again(
    backbone: Backbone, finished: tuple[Record, Path]
) -> None:
    record, folder = finished
    bundle = folder / "seed0" / "moe_adapter" / "warm-1.safetensors"
    before = bundle.stat().st_mtime_ns
    (again,) = bench(backbone, folder.parent)
    assert again == record
    assert bundle.stat().st_mtime_ns == before


def test_killed_again_and_again_it_still_ends_in_the_same_numbers(
    backbone: Backbone, finished: tuple[Record, Path], tmp_path: Path
) -> None:
    # In the order in which a run comes by: a task half learnt, a bundle whose learner is trained
    # but not exported, and tasks that are fused, but nobody has noted it.
    moments = (
        "finetune/cold.unfinished.pt",
        "moe_adapter/cold-1/checkpoint.pt",
        "condu-lora/session-2",
    )
    killed = subprocess.run(
        [
            *(sys.executable, "-m", "tests.trainer.bench.killed", str(tmp_path)),
            *(f"run/seed0/{moment}" for moment in moments),
        ],
        env={**os.environ, "PYTHONPATH": "."},
        check=False,
    )
    assert killed.returncode == 0, "a run had ended before it could be killed"
    (record,) = bench(backbone, tmp_path, methods=KILLED_METHODS)
    assert numbers(record) == numbers(finished[0])


def test_a_disk_that_fills_up_while_results_are_written_loses_none_of_the_learnt(
    backbone: Backbone, tmp_path: Path, no_large_files: NoLargeFiles
) -> None:
    methods = ["zero-shot"]
    (first,) = bench(backbone, tmp_path, methods=methods)
    (tmp_path / "run" / "report.md").unlink()
    with no_large_files(1024), pytest.raises(DataError, match="cannot write"):
        bench(backbone, tmp_path, methods=methods)
    (again,) = bench(backbone, tmp_path, methods=methods)
    assert again == first
    assert (tmp_path / "run" / "report.md").exists()


def test_a_folder_of_another_plan_is_refused_by_what_differs(
    backbone: Backbone, finished: tuple[Record, Path]
) -> None:
    other = replace(PLAN, order=TASKS[::-1])
    with pytest.raises(DataError, match="holds another benchmark: order differ"):
        bench(backbone, finished[1].parent, plan=other)


def test_a_damaged_plan_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan.json").write_text("{")
    with pytest.raises(DataError, match=r"plan\.json is damaged"):
        bench(backbone, tmp_path)


def test_a_missing_data_set_is_told_before_anything_is_learnt(
    backbone: Backbone, tmp_path: Path
) -> None:
    def load(task: str, split: str) -> object:
        if task == "grey":
            raise DataError("grey: no such folder")
        return SUITE.loader(task, "train" if split == "train" else "test")

    broken = Suite(name="tiny", tasks=TASKS, orders={"I": TASKS}, loader=load)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="grey: no such folder"):
        bench(backbone, tmp_path, plan=replace(PLAN, suite=broken))
    assert not (tmp_path / "run" / "seed0").exists()


def test_sharing_offers_the_experts_of_earlier_tasks(backbone: Backbone, tmp_path: Path) -> None:
    bench(backbone, tmp_path, plan=replace(PLAN, share=True, rivals=False), methods=["moe_adapter"])
    folder = tmp_path / "run" / "seed0" / "moe_adapter"
    warm, cold = (read_bundle(folder / f"{task}-1.safetensors") for task in ("warm", "cold"))
    assert cold.manifest.training.after == (warm.digest,)


def test_few_shots_are_all_that_any_method_sees(backbone: Backbone, tmp_path: Path) -> None:
    plan = replace(PLAN, settings=replace(PLAN.settings, shots=2, iterations=4), rivals=False)
    (record,) = bench(backbone, tmp_path, plan=plan, methods=["linear-probe", "moe_adapter"])
    assert record.shots == 2


def test_one_class_name_in_two_tasks_is_one_class_among_all(
    backbone: Backbone, tmp_path: Path
) -> None:
    def load(task: str, split: str) -> object:
        colours = ("red", "green" if task == "one" else "blue")
        names = (colours[0].title() if task == "two" else colours[0], colours[1])
        return replace(pictures(colours, 10, seed=1), class_names=names)

    twins = Suite(name="twins", tasks=("one", "two"), orders={}, loader=load)  # type: ignore[arg-type]
    plan = replace(PLAN, suite=twins, order=("one", "two"))
    (record,) = bench(backbone, tmp_path, plan=plan, methods=["zero-shot"])
    own = row(record, "zero-shot", "none", "agnostic").accuracy_TT
    union = row(record, "zero-shot", "none", "union").accuracy_TT
    assert all(u <= o for u, o in zip(union[0], own[0], strict=True))
