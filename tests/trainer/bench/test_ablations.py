import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from medley.backbone import Backbone
from medley.errors import DataError
from tests.models import IMAGE_BLOCKS, tiny_backbone
from tests.trainer.bench.course import SUITE
from trainer.bench.ablation_command import AblationName
from trainer.bench.ablation_report import Cell, markdown
from trainer.bench.ablation_run import run_ablation
from trainer.bench.ablations import ABLATIONS, Ablation, ablation
from trainer.ddas import DEFAULT_ALPHA, DEFAULT_CODE_SIZE, DEFAULT_FEATURES
from trainer.progress import bars
from trainer.settings import TrainSettings

QUICK = {"iterations": 12, "bottleneck": 8, "hold_out": 0.4}
FREEZE = Ablation(
    name="freeze",
    question="Which?",
    kind="learning",
    tasks=("warm", "cold"),
    arms=lambda _: {
        "one": {**QUICK, "freeze": "count", "freeze_count": 1},
        "all": {**QUICK, "freeze_mass": 1.0},
        "linear": {**QUICK, "relu": False},
    },
)
ALPHA = Ablation(
    name="alpha",
    question="How many?",
    kind="routing",
    tasks=SUITE.tasks,
    arms=lambda _: {f"{alpha}": {"alpha": alpha, "iterations": 50} for alpha in (0.05, 0.5)},
)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


def run(
    which: Ablation, backbone: Backbone, folder: Path, *, seeds: Sequence[int] = (0, 1)
) -> dict[tuple[str, str, int], dict[str, float]]:
    """Metrics by arm, task and seed; not the seconds, which differ each time."""
    with bars(Console(quiet=True)) as show:
        text = run_ablation(
            which,
            SUITE,
            backbone,
            folder / "out",
            seeds=seeds,
            cache=folder / "cache",
            command="medley bench ablation",
            bars=show,
        )
    home = folder / "out" / which.name
    assert (home / "report.md").read_text() == text
    assert (home / "bars.png").read_bytes().startswith(b"\x89PNG")
    return {
        (cell["arm"], cell["task"], cell["seed"]): {
            name: value for name, value in cell["metrics"].items() if name != "CPU seconds"
        }
        for cell in json.loads((home / "cells.json").read_bytes())["cells"]
    }


@pytest.fixture(scope="module")
def finished(
    backbone: Backbone, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[tuple[str, str, int], dict[str, float]]]:
    folder = tmp_path_factory.mktemp("ablation")
    return folder, run(FREEZE, backbone, folder)


def test_every_arm_learns_every_task_with_every_seed(
    finished: tuple[Path, dict[tuple[str, str, int], dict[str, float]]],
) -> None:
    _, cells = finished
    wanted = {
        (arm, task, seed)
        for arm in ("one", "all", "linear")
        for task in ("warm", "cold")
        for seed in (0, 1)
    }
    assert cells.keys() == wanted
    assert all(0 <= metrics["trained"] <= 1 for metrics in cells.values())


def test_arms_that_differ_after_training_share_a_learner(
    finished: tuple[Path, dict[tuple[str, str, int], dict[str, float]]],
) -> None:
    folder, cells = finished
    # Two tasks and two seeds; "one" and "all" are trained alike, "linear" is not.
    assert len(list((folder / "out" / "trained").glob("*.pt"))) == 2 * 2 * 2
    for task, seed in (("warm", 0), ("cold", 1)):
        one, whole = cells["one", task, seed], cells["all", task, seed]
        assert one["trained"] == whole["trained"]
        assert one["stored parameters"] < whole["stored parameters"]
        assert one["active parameters"] < whole["active parameters"]


def test_linear_experts_are_in_no_bundle(
    finished: tuple[Path, dict[tuple[str, str, int], dict[str, float]]],
) -> None:
    _, cells = finished
    assert "kept" in cells["one", "warm", 0]
    assert "kept" not in cells["linear", "warm", 0]


def test_lora_is_compared_as_experts_are(backbone: Backbone, tmp_path: Path) -> None:
    shared = {**QUICK, "method": "lora", "bottleneck": 16}
    which = Ablation(
        name="ranks",
        question="Apart?",
        kind="learning",
        tasks=("warm",),
        arms=lambda _: {"off": {}, "apart": {"redundancy": "weight", "redundancy_weight": 1.0}},
        base=shared,
        against="off",
    )
    cells = run(which, backbone, tmp_path, seeds=(0,))
    off, apart = cells["off", "warm", 0], cells["apart", "warm", 0]
    assert apart["weight"] < off["weight"]
    assert "kept" not in off
    assert off["stored parameters"] == apart["stored parameters"] > 0


def test_an_interrupted_ablation_ends_in_the_same_numbers(
    backbone: Backbone,
    finished: tuple[Path, dict[tuple[str, str, int], dict[str, float]]],
    tmp_path: Path,
) -> None:
    _, cells = finished
    assert run(FREEZE, backbone, tmp_path, seeds=(0,)) == {
        key: metrics for key, metrics in cells.items() if key[2] == 0
    }
    file = tmp_path / "out" / "freeze" / "cells.json"
    content = json.loads(file.read_bytes())
    content["cells"] = content["cells"][:2]
    content["cells"][0]["metrics"]["trained"] = 0.125  # what is done is not done again
    file.write_text(json.dumps(content))
    again = run(FREEZE, backbone, tmp_path)
    assert again.pop(("one", "warm", 0))["trained"] == 0.125
    assert again == {key: m for key, m in cells.items() if key != ("one", "warm", 0)}


def test_a_larger_alpha_refuses_more_and_accepts_less(backbone: Backbone, tmp_path: Path) -> None:
    cells = run(ALPHA, backbone, tmp_path, seeds=(0,))
    small, large = cells["0.05", "all", 0], cells["0.5", "all", 0]
    assert small["false reject"] < large["false reject"]
    assert small["false accept"] >= large["false accept"]
    assert small["AUROC"] == large["AUROC"]  # which no threshold changes


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"cells": [1]}', '{"cells": [{"arm": 1}]}'])
def test_a_damaged_ledger_is_refused(backbone: Backbone, tmp_path: Path, content: str) -> None:
    file = tmp_path / "out" / "freeze" / "cells.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(DataError, match=r"cells\.json is damaged"):
        run(FREEZE, backbone, tmp_path)


def test_the_folder_of_another_ablation_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    run(ALPHA, backbone, tmp_path, seeds=(0,))
    other = replace(ALPHA, tasks=SUITE.tasks[:2])
    with pytest.raises(DataError, match="another ablation: tasks differ; choose another folder"):
        run(other, backbone, tmp_path, seeds=(0,))


def cells() -> list[Cell]:
    """Two arms, two tasks, three seeds; the seed moves the first arm by 0.01."""
    return [
        Cell(
            arm,
            task,
            seed,
            {"trained": share + moved * seed, "stored parameters": 1000.0, "CPU seconds": 5.0},
        )
        for arm, moved in (("a", 0.01), ("b", 0.0))
        for task, share in (("warm", 0.5), ("cold", 0.7))
        for seed in (0, 1, 2)
    ]


def test_an_arm_is_compared_with_another_of_the_same_seed_and_task() -> None:
    against = replace(FREEZE, against="b")
    measured = [replace(c, metrics={**c.metrics, "weight": 0.25}) for c in cells()]
    text = markdown(against, measured, command="medley", machine="2 cores")
    head, _, *rows = [
        line for line in text.split("the seeds, left out")[1].splitlines() if "|" in line
    ]
    assert "| mean, kept | against b | better : worse | stored parameters |" in head
    # Seed 0 of both tasks is as good; seeds 1 and 2 are better by 1 and 2 points.
    assert "| 61.0 +- 1.0 | - | +1.0 +- 1.0 | 4 : 0 |" in rows[0]
    assert "| 60.0 | - | +0.0 | 0 : 0 |" in rows[1]
    assert rows[0].endswith("| - | - | - | 0.250 |")


def test_the_report_has_mean_and_spread_over_seeds() -> None:
    text = markdown(FREEZE, cells(), command="medley", machine="2 cores")
    head, _, *rows = [
        line for line in text.split("the seeds, left out")[1].splitlines() if "|" in line
    ]
    assert head.startswith("| arm | warm | cold | mean | mean, kept | stored parameters |")
    assert rows == [
        "| a | 51.0 +- 1.0 | 71.0 +- 1.0 | 61.0 +- 1.0 | - | 1,000 | - | 5.0 |",
        "| b | 50.0 | 70.0 | 60.0 | - | 1,000 | - | 5.0 |",
    ]
    assert text.startswith("# freeze: Which?")
    assert "| seeds | 0, 1, 2 |" in text


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_compares_the_default_with_something_else(
    backbone: Backbone, name: str
) -> None:
    which = ablation(name)
    arms = which.arms(backbone)
    assert len(arms) > 1
    assert sum(is_default(which, arm, backbone) for arm in arms.values()) == 1


def is_default(which: Ablation, arm: Mapping[str, Any], backbone: Backbone) -> bool:
    if which.kind == "routing":
        default: dict[str, Any] = {
            "features": [*DEFAULT_FEATURES],
            "code_size": DEFAULT_CODE_SIZE,
            "alpha": DEFAULT_ALPHA,
        }
        return {**default, **arm} == default
    settings, usual = which.settings(arm, 0), which.settings({}, 0)
    first = usual.first_image_block(backbone)
    assert settings.iterations == usual.iterations < TrainSettings().iterations
    return replace(settings, first_expert_block=settings.first_image_block(backbone)) == replace(
        usual, first_expert_block=first
    )


def test_arms_ask_how_deep_the_backbone_is(backbone: Backbone) -> None:
    assert len(ablation("first_expert_block").arms(backbone)) == IMAGE_BLOCKS
    off = ablation("text_experts").arms(backbone)["image experts only"]
    assert not TrainSettings(**off).text_blocks(backbone)


def test_the_command_knows_every_ablation() -> None:
    assert [name.value for name in AblationName] == list(ABLATIONS)


def test_an_unknown_ablation_is_refused() -> None:
    with pytest.raises(DataError, match="no ablation 'colour'; there are first_expert_block, ddas"):
        ablation("colour")
